"""What `peers.py` found, as arithmetic, tables, a figure and the page docs/speed.md."""

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peers_cases import CANDIDATES, CASES
from settings import ROOT

from fastvae import figures

Row = dict[str, Any]

TITLES = {
    "fastvae": "fastvae train",
    "fastvae-binarized": "fastvae train, pixels binarised afresh",
    "hand-written": "hand-written, compiled",
    "hand-written-allocator": "hand-written, with our allocator setting",
    "accelerate": "Accelerate's example",
    "script": "the usual script",
    "pythae": "pythae 0.1.2",
    "limit": "matrix products alone",
}

MARKS = ("<!-- tables -->", "<!-- end of tables -->")
"""In docs/speed.md, around what a run writes."""

WORTH_A_ROW = 0.02
"""Less than this share is no difference that the allocator's setting makes."""


class Middle(NamedTuple):
    """The median over rounds, and the quartiles."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Middle":
        if len(values) < 2:
            return cls(*(3 * list(values)))
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3)


# -------------------------------------------------------------------------------- arithmetic


def rates(row: Row | None) -> list[float]:
    """Images per second of the better variant in each round; none where there is no row."""
    return [turn["images_per_second"] for turn in best(row)[1]["turns"]] if row else []


def best(row: Row) -> tuple[str, Row]:
    """The variant with the highest median, by name."""
    return max(
        row.items(),
        key=lambda item: statistics.median(t["images_per_second"] for t in item[1]["turns"]),
    )


def ratio(a: Row | None, b: Row | None) -> Middle | None:
    """How many times as fast a is as b, round by round."""
    pairs = list(zip(rates(a), rates(b), strict=False))
    return Middle.of([x / y for x, y in pairs]) if pairs else None


def faster_by_hand(rows: Row) -> Row | None:
    """The hand-written candidate, with or without our allocator setting."""
    found = [rows[n] for n in ("hand-written", "hand-written-allocator") if n in rows]
    return max(found, key=lambda row: statistics.median(rates(row)), default=None)


def own_deviation(row: Row) -> float:
    """How far fastvae's own figures lie from the wall clock's, at most, as a share."""
    turns = [turn for variant in row.values() for turn in variant["turns"]]
    return max(abs(t["own_images_per_second"] / t["images_per_second"] - 1) for t in turns)


class Target(NamedTuple):
    """One thing that was set out to be reached."""

    text: str
    case: str
    against: str
    least: float


TARGETS = (
    Target("2.6 times pythae", "mlp-128-float32", "pythae", 2.6),
    Target("2.6 times pythae", "mlp-512-float32", "pythae", 2.6),
    Target("3.6 times pythae (its float32)", "mlp-512-bf16", "pythae", 3.6),
    Target("1.8 times pythae (its float32)", "conv-128-bf16", "pythae", 1.8),
    Target("70 % of the matrix products alone", "mlp-512-float32", "limit", 0.7),
    *(Target("no slower than hand-written", case, "hand-written", 1.0) for case in CASES),
)


def reached(target: Target, cases: dict[str, Row]) -> Middle | None:
    """What was measured against a target; None where it was not."""
    rows = cases.get(target.case, {}).get("rows", {})
    by_hand = target.against == "hand-written"
    rival = faster_by_hand(rows) if by_hand else rows.get(target.against)
    return ratio(rows.get("fastvae"), rival)


# ------------------------------------------------------------------------------------ tables


def to_markdown(results: Row) -> str:
    """The report of one run."""
    machine = results["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    parts = [
        f"# Peers on {machine['device']}, {results['date'][:10]}",
        f"`{results['command']}`, {results['date']}",
        f"{machine['cpu']}, {results['cores']} cores; {machine['system']}; {versions}. "
        f"{results['data']}. {results['rounds']} rounds of {results['seconds']:g} s after "
        f"{results['warm']:g} s of warming up, all candidates of a configuration taking turns in "
        "each; medians, and in brackets the quartiles.",
        *tables(results),
    ]
    return "\n\n".join(parts) + "\n"


def tables(results: Row, level: str = "##") -> Iterator[str]:
    """A table for each configuration, and the targets."""
    if results["quick"]:
        yield "**A quick run at tiny sizes: no number in it means anything.**"
    elif results["rounds"] < 5:
        yield f"**Only {results['rounds']} round(s): a trial, not a measurement.**"
    for name, case in results["cases"].items():
        yield f"{level} {name}"
        if case["rows"]:
            yield "\n".join(_table(case["rows"]))
        for row in ("fastvae", "fastvae-binarized"):
            if row in case["rows"] and (deviation := own_deviation(case["rows"][row])) > 0.02:
                yield (
                    f"**The figures that {TITLES[row]} logs lie up to {deviation:.1%} from the "
                    "wall clock's.**"
                )
        for failed, why in case["failures"].items():
            yield f"Failed: {failed}\n\n```\n{why}\n```"
    yield f"{level} Targets"
    yield "\n".join(_targets(results["cases"]))


def _table(rows: Row) -> Iterator[str]:
    yield "| | images/s | times pythae | of the limit | first step, s: cold | warm |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name in CANDIDATES:
        if name not in rows or (name == "hand-written-allocator" and not _worth_a_row(rows)):
            continue
        variant, found = best(rows[name])
        middle = Middle.of(rates(rows[name]))
        first = found["seconds_to_first_step"]
        cells = [
            TITLES[name] + (f" ({variant.replace('-', ' ')})" if len(rows[name]) > 1 else ""),
            f"{middle.median:,.0f} [{middle.q1:,.0f}–{middle.q3:,.0f}]",
            _ratio(ratio(rows[name], rows.get("pythae"))),
            _percent(ratio(rows[name], rows.get("limit"))),
            *(_seconds(first.get(state)) for state in ("cold", "warm")),
        ]
        yield f"| {' | '.join(cells)} |"


def _worth_a_row(rows: Row) -> bool:
    change = ratio(rows["hand-written-allocator"], rows.get("hand-written"))
    return change is None or abs(change.median - 1) > WORTH_A_ROW


def _targets(cases: dict[str, Row]) -> Iterator[str]:
    yield "| configuration | target for fastvae train | measured | met |"
    yield "| --- | --- | --- | --- |"
    for target in TARGETS:
        found = reached(target, cases)
        met = "not measured" if found is None else "yes" if found.median >= target.least else "no"
        show = _percent if target.against == "limit" else _ratio
        yield f"| {target.case} | {target.text} | {show(found)} | {met} |"


def _ratio(value: Middle | None) -> str:
    return f"{value.median:.2f} [{value.q1:.2f}–{value.q3:.2f}]" if value else "–"


def _percent(value: Middle | None) -> str:
    return f"{100 * value.median:.0f} %" if value else "–"


def _seconds(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.1f}"


# ------------------------------------------------------------------------------ page and figure


def write_page(results: Row, page: Path, picture: Path) -> None:
    """docs/speed.md with the tables of a run in place of those before, written to `page`."""
    words = (ROOT / "docs/speed.md").read_text()
    machine = results["machine"]
    head = (
        f"{results['date'][:10]}, {machine['cpu']}, {results['cores']} cores, "
        f"torch {machine['versions']['torch']}, {results['data']}; {results['rounds']} rounds of "
        f"{results['seconds']:g} s; medians, and in brackets the quartiles."
    )
    draw(results, picture)
    shown = f"![Images per second of each]({picture.relative_to(page.parent)})"
    body = "\n\n".join([head, shown, *tables(results, "###")])
    before, rest = words.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    page.write_text(f"{before}{MARKS[0]}\n{body}\n{MARKS[1]}{after}")


def draw(results: Row, path: Path) -> None:
    """Images per second of every candidate, a panel for each configuration."""
    import matplotlib

    matplotlib.use("Agg")  # draws without a screen
    from matplotlib import pyplot

    cases = {name: case["rows"] for name, case in results["cases"].items() if case["rows"]}
    if not cases:
        return
    columns = min(2, len(cases))
    figure, axes = pyplot.subplots(
        math.ceil(len(cases) / columns),
        columns,
        figsize=(figures.WIDTH * columns / 1.6, 2.3 * math.ceil(len(cases) / columns)),
        layout="constrained",
        squeeze=False,
    )
    for axis, (name, rows) in zip(axes.flat, cases.items(), strict=False):
        shown = [n for n in CANDIDATES if n in rows and n != "limit"][::-1]
        middles = [Middle.of(rates(rows[n])) for n in shown]
        axis.barh(
            [TITLES[n] for n in shown],
            [m.median / 1e3 for m in middles],
            xerr=[
                [(m.median - m.q1) / 1e3 for m in middles],
                [(m.q3 - m.median) / 1e3 for m in middles],
            ],
            color=[figures.BLUE if n.startswith("fastvae") else figures.GREY for n in shown],
            error_kw={"linewidth": 1},
        )
        if "limit" in rows:
            limit = statistics.median(rates(rows["limit"])) / 1e3
            axis.axvline(limit, color=figures.ORANGE, label=TITLES["limit"])
            axis.legend(fontsize=7, loc="lower right")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("thousand images/s", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    for axis in list(axes.flat)[len(cases) :]:
        axis.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=figures.DPI)
    pyplot.close(figure)
