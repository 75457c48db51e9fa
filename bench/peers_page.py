"""What `peers.py` found as tables, a figure and the page docs/speed.md."""

import math
import statistics
from collections.abc import Iterator
from pathlib import Path

from peers_cases import CANDIDATES
from peers_ratios import TARGETS, Middle, Row, best, own_deviation, rates, ratio, reached
from settings import ROOT

from fastvae import figures

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

BUSY = 0.25
"""A load average above this share of the cores spoils a measurement."""

DOUBTFUL = 0.02
"""Two clocks that differ by more than this share do not measure the same."""


# ------------------------------------------------------------------------------------ tables


def to_markdown(results: Row) -> str:
    """The report of one run."""
    machine = results["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    parts = [
        f"# Peers on {machine['device']}, {results['date'][:10]}",
        f"`{results['command']}`, {results['date']}",
        f"{machine['cpu']}, {results['cores']} core(s); {machine['system']}; {versions}. "
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
    if (load := results["load_before"]) > BUSY * results["cores"]:
        yield f"**Others were at work on the machine (load average {load:.1f} before the start).**"
    for name, case in results["cases"].items():
        yield f"{level} {name}"
        if case["rows"]:
            yield "\n".join(_table(case["rows"]))
        for row in ("fastvae", "fastvae-binarized"):
            if row in case["rows"]:
                yield _clocks(TITLES[row], own_deviation(case["rows"][row]))
        for failed, why in case["failures"].items():
            yield f"Failed: {failed}\n\n```\n{why}\n```"
    yield f"{level} Targets"
    yield "\n".join(_targets(results["cases"]))


def _clocks(title: str, deviation: float) -> str:
    text = f"What {title} logs lies within {deviation:.1%} of the wall clock's images/s."
    return f"**{text}**" if deviation > DOUBTFUL else text


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
        f"{results['date'][:10]}, {machine['cpu']}, {results['cores']} core(s), "
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
