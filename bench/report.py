"""The results as tables: Markdown to keep, and a short one for the terminal."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from statistics import mean, stdev
from typing import Any

from sections import SECTIONS

Row = dict[str, Any]

PARITY = ("smoke", "parity")
PAPER_STEPS = 3280 * 60_000 // 20

DIRECTIONS = ("forward", "backward", "forward+backward")


def to_markdown(results: dict[str, Any]) -> str:
    """The whole report, of a run that goes on, too."""
    sections = results["sections"]
    parts = [_head(results)]
    for section in SECTIONS:
        if section.name in sections:
            render = RENDER[section.name]
            parts.append("\n".join(_section(section.title, sections[section.name], render)))
    return "\n\n".join(parts) + "\n"


def short_table(results: dict[str, Any]) -> str:
    """What a terminal should show last."""
    lines = [""]
    sections = results["sections"]
    for row in _rows(sections, "ops", "more-ops"):
        if row["direction"] == "forward+backward" or row["op"] in ("normal", "uniform"):
            lines.append(
                f"{row['op']:<31}{row['dtype']:<9}{row['rows']:>7} × {row['columns']:<5}"
                f"{_us(row['device']['fastvae']['median']):>9} µs"
                f"{row['bytes_per_second'] / 1e9:>7.0f} GB/s {_percent(row['share_of_copy']):>5} "
                f"eager {row['pytorch_over_fastvae']:5.2f}× "
                f"compiled {row['compiled_over_fastvae']:5.2f}×"
            )
    for row in _rows(sections, "steps", "more-steps"):
        rates = row["images_per_second"]
        shown = "  ".join(f"{name} {rate['median']:,.0f}" for name, rate in rates.items())
        lines.append(f"step {row['case']}, images/s:  {shown}")
    if share := _shares(_rows(sections, "train")):
        lines.append(f"whole runs: {share}")
    for row in _rows(sections, "growth"):
        lines.append(
            f"growth {row['axis']}: time by the power {row['exponent']:.2f}, "
            f"work by {row['work_exponent']:.2f}"
        )
    if found := sections.get("speedrun", {}).get("seeds"):
        lines.append(f"speedrun: {_seeds(found)}")
    if copied := sections.get("copy", {}).get("bytes_per_second"):
        lines.append(f"copy: {copied / 1e9:.0f} GB/s")
    lines.append("  ".join(f"{name}: {section['status']}" for name, section in sections.items()))
    return "\n".join(lines)


# ----------------------------------------------------------------------------------- sections


def _rows(sections: dict[str, Row], *names: str) -> list[Row]:
    return [row for name in names for row in sections.get(name, {}).get("rows", [])]


def _head(results: dict[str, Any]) -> str:
    machine = results["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    driver = f", driver {machine['driver']}" if machine.get("driver") else ""
    remarks = []
    if results["quick"]:
        remarks.append("**A quick run at tiny sizes: no number in it means anything.**")
    if results["cut"]:
        remarks.append("**Not at its end: it goes on, or was cut.**")
    if red := [row["suite"] for row in _rows(results["sections"], *PARITY) if row["problem"]]:
        remarks.append(f"**Parity is red ({', '.join(red)}): no speed of what it tests counts.**")
    if warm := results.get("warm"):
        remarks.append(
            f"{warm['processes']} processes compiled {warm['cases']} cases ahead, beside the first "
            f"parity tests, in {warm['seconds']} s; {warm['ended']} of them ended in that time. "
            "Nothing was timed meanwhile."
        )
    return "\n\n".join(
        [
            f"# {machine['device']}, {results['date'][:10]}",
            f"`{results['command']}`, {results['date']}",
            f"{machine['device']}{driver}; {machine['cpu']}; {machine['system']}; {versions}.",
            f"All timings: {results['rounds']} rounds, the candidates of a row taking turns in "
            "each; the median, and in brackets the quartiles.",
            *remarks,
        ]
    )


def _section(title: str, section: Row, render: Any) -> Iterator[str]:
    yield f"## {title}\n"
    if section["status"] == "skipped":
        yield f"Skipped: {section['why']}."
        return
    if section["status"] == "running":
        yield "**Not at its end.**\n"
    with contextlib.suppress(KeyError):  # it ended before it had results
        yield from list(render(section))
    if section.get("failures"):
        yield "\n**Failed:**\n"
        yield "```"
        yield from section["failures"]
        yield "```"
    if section.get("left_out"):
        yield "\nLeft out:\n"
        yield from (f"- {line}" for line in section["left_out"])


def _parity(section: Row) -> Iterator[str]:
    yield from _table(
        "suite|outcome|passed|failed|skipped|on the GPU|seconds|command",
        (
            [
                row["suite"],
                ("green" if row["green"] else "red" if row["problem"] else "did not end in time")
                + (", shown before" if row["seen_before"] else ""),
                *(str(row[key]) for key in ("passed", "failed", "skipped")),
                str(row["kernels_on_gpu"]),
                str(row["seconds"]),
                f"`{row['command']}`",
            ]
            for row in section["rows"]
        ),
    )
    yield (
        "\nShown before: by the same code, on the same machine and versions. On the GPU: tests of "
        "Triton kernels that passed there.\n"
    )
    yield from (f"- failed: {name}" for row in section["rows"] for name in row["failed_tests"])
    reasons: Counter[str] = Counter()
    for row in section["rows"]:
        reasons.update(row["skipped_because"])
    if reasons:
        yield "\nSkipped:\n"
        yield from (f"- {count} × {reason}" for reason, count in reasons.items())
    if section.get("not_importable"):
        yield "\nNot importable here, so neither run nor tested:\n"
        yield from (f"- {name}: {why}" for name, why in section["not_importable"].items())


def _copy(section: Row) -> Iterator[str]:
    timing = section["timing"]
    low, high = (2 * section["buffer_bytes"] / timing[q] / 1e9 for q in ("q3", "q1"))
    yield (
        f"A copy of {section['buffer_bytes'] / 2**20:.0f} MiB within the device's memory moves "
        f"{section['bytes_per_second'] / 1e9:.0f} GB/s [{low:.0f}–{high:.0f}], bytes read and "
        "bytes written both counted. Shares below are of this."
    )


def _ops(section: Row) -> Iterator[str]:
    yield (
        "Microseconds. On a GPU without the time to launch from Python (CUDA graphs, up to sizes "
        "where launching takes no time beside the work), and with inputs that rotate, four times "
        "the L2 cache in all where that takes no more than 256 sets. GB/s: the fewest bytes that "
        "must move, over fastvae's time. Ratios: the rival's time over fastvae's, more than 1 "
        "where fastvae is faster. PyTorch computes in float32 inside, like the kernels; forward "
        "passes keep what backward needs. With `row_weight` the forward pass writes the gradient "
        "too, and all rows meet it. The mixture of logistics stands beside the library's plain "
        "reference. Sizes in bold move more bytes than the L2 cache holds.\n"
    )
    timed = section["rows"]
    held = [row for row in timed if row["missed"] is not None]
    if held:
        yield (
            "Targets: `reparameterize_kl`, separate and packed, 85 % of the copy's rate beyond the "
            "L2 cache, 4 times as fast as eager and 1.5 times as fast as compiled PyTorch; "
            "likelihoods, forward and backward together, 1.2 times as fast as compiled. "
            f"{sum(bool(row['missed']) for row in held)} of {len(held)} rows miss one; the last "
            "column says which.\n"
        )
    for direction in DIRECTIONS:
        rows = [row for row in timed if row["direction"] == direction]
        if not rows:
            continue
        yield f"\n### {direction.capitalize()}\n"
        yield from _table(
            "operator|dtype|rows × columns|PyTorch|compiled|fastvae|GB/s|of copy|"
            "vs PyTorch|vs compiled|misses",
            (
                [
                    row["op"],
                    row["dtype"],
                    _size(row),
                    *(_timing(row["device"][name]) for name in ("pytorch", "compiled", "fastvae")),
                    f"{row['bytes_per_second'] / 1e9:.0f}",
                    _percent(row["share_of_copy"]),
                    f"{row['pytorch_over_fastvae']:.2f}",
                    f"{row['compiled_over_fastvae']:.2f}",
                    ", ".join(row["missed"] or []),
                ]
                for row in rows
            ),
        )
    yield "\n### As called from Python\n"
    yield "The same with the time to launch, which is what a call costs in an eager loop.\n"
    yield from _table(
        "operator|dtype|rows × columns|direction|PyTorch|compiled|fastvae|vs PyTorch|vs compiled",
        (
            [
                row["op"],
                row["dtype"],
                f"{row['rows']} × {row['columns']}",
                row["direction"],
                *(_timing(row["called"][name]) for name in ("pytorch", "compiled", "fastvae")),
                f"{row['called_pytorch_over_fastvae']:.2f}",
                f"{row['called_compiled_over_fastvae']:.2f}",
            ]
            for row in timed
        ),
    )


def _limits(section: Row) -> Iterator[str]:
    lanes = section["lanes_per_multiprocessor"]
    yield (
        f"Arithmetic, not measurement, for {section['chip']}: bytes at "
        f"{section['copy_bytes_per_second'] / 1e9:.0f} GB/s; a multiprocessor at "
        f"{section['sm_mhz']:.0f} MHz issues {lanes['instructions']} lanes a clock, of them "
        f"{lanes['integer']} integer (Philox is made of these) and {lanes['special']} special "
        f"(exp, root, conversions), of which {_percent(section['reachable'])} can be reached. "
        "Instructions are counted in the machine code, what a loop repeats as often as it does, "
        "and shared among the elements that there are; what takes longest binds, and the last "
        "column is the share of that rate of bytes which it leaves within reach.\n"
    )
    yield from limits_table(section["rows"])


def limits_table(rows: list[Row]) -> Iterator[str]:
    """What each kernel needs, what binds it, and the share of a copy's rate that each chip's
    leaves within reach."""
    chips = list(rows[0]["within_reach"])
    yield from _table(
        "kernel|direction|dtype|columns|idle lanes|registers|spilled|loads|stores|bytes|"
        "instructions|integer|special|" + "|".join(f"{chip}: binds|of copy" for chip in chips),
        (
            [
                row["op"],
                row["direction"],
                row["dtype"],
                str(row["columns"]),
                _percent(row["idle"]),
                *(str(row[key]) for key in ("registers", "spilled_bytes")),
                *(_accesses(row[key]) for key in ("load_bits", "store_bits")),
                f"{row['bytes']}",
                *(f"{row[k]:.1f}" for k in ("instructions", "integer", "special")),
                *(
                    cell
                    for found in row["within_reach"].values()
                    for cell in (
                        {"instructions": "issue"}.get(found["binds"], found["binds"]),
                        _percent(found["share_of_copy"]),
                    )
                ),
            ]
            for row in rows
        ),
    )


def _accesses(widths: dict[int, int]) -> str:
    """3 × 128 bits are "3×128"."""
    return " + ".join(f"{count}×{bits}" for bits, count in widths.items())


def _step(section: Row) -> Iterator[str]:
    targets = section["targets"]
    yield (
        "Whole optimizer steps of presets, with gather, learning rate and sums to log: fastvae's "
        "are those of `Updates.advance`, as a run takes them, without the wait at a line of the "
        "log. All have the same parameters and begin with the same weights; the bytes are random "
        "and look like digits. float32 products: "
        f"`{section['matmul_precision']}` for all. Images per second; × is fastvae over the rival."
        "\n"
    )
    yield from (f"- {name}: {what}" for name, what in section["what"].items())
    ratios = ", ".join(f"{value:g} × {name}" for name, value in targets["ratios"].items())
    steps = ", ".join(
        f"{value:,.0f} steps/s at batch {batch}"
        for batch, value in targets["steps_per_second"].items()
    )
    yield f"\nTargets, on a GPU: {ratios}; {steps}.\n"
    names = list(section["what"])
    rivals = [name for name in names if name != "fastvae"]
    yield from _table(
        "|".join(
            ["case", "steps/s", *names, *(f"× {name}" for name in rivals), "replayed", "misses"]
        ),
        (
            [
                row["case"],
                _rate(row["steps_per_second"].get("fastvae")),
                *(_rate(row["images_per_second"].get(name)) for name in names),
                *(
                    f"{row['ratios'][name]:.2f}" if name in row["ratios"] else "–"
                    for name in rivals
                ),
                _replayed(row["replay"]),
                "–" if row["missed"] is None else ", ".join(row["missed"]),
            ]
            for row in section["rows"]
        ),
    )
    yield "\nReplayed: steps that one CUDA graph holds, or why there is none.\n"
    for row in section["rows"]:
        if row["case"] == "vae-20" and "fastvae" in row["steps_per_second"]:
            rate = row["steps_per_second"]["fastvae"]["median"]
            yield (
                f"\nThe schedule of Burda et al. 2016 (preset `vae-paper`: {PAPER_STEPS:,} steps "
                f"of 20 images, this network) takes {PAPER_STEPS / rate / 3600:.2f} h at "
                f"{rate:,.0f} steps/s."
            )
    absent = {f"- {name}: {why}" for row in section["rows"] for name, why in row["absent"].items()}
    if absent:
        yield "\nNot everywhere:\n"
        yield from sorted(absent)


def _replayed(found: Row) -> str:
    """Of each candidate that replays its steps."""
    return (
        "; ".join(
            f"{name}: {each['problem'] or each['steps_per_launch']}" for name, each in found.items()
        )
        or "–"
    )


def _train(section: Row) -> Iterator[str]:
    yield (
        f"Preset `{section['preset']}` at batch {section['batch']} on {section['data']}, by "
        "`fastvae.training.train`, as the command calls it, each time with one thing more; not "
        "compiled, as `--compile auto` decides for runs of this length, on a GPU replayed. "
        "Seconds: of the call, from outside. Images a second, log: as the run says them, without "
        "evaluations and checkpoints; outside: images over the seconds beyond those of the run of "
        "few steps. Lost: seconds beyond the row above, as a share of the row's own steps.\n"
    )
    rows = section["rows"]
    yield from _table(
        "run|steps|seconds|lines of the log|images/s, log|images/s, outside|lost",
        (
            [
                row["kind"],
                f"{row['steps']:,}",
                f"{row['seconds']:.2f}",
                str(row["lines"]),
                f"{row['logged_images_per_second']:,.0f}",
                _outside(row, rows[0], section["batch"]),
                _lost(before, row, rows[0]),
            ]
            for before, row in zip([None, *rows], rows, strict=False)
        ),
    )


def _outside(row: Row, few: Row, batch: int) -> str:
    """The beginning and the end of a run, which all have, are the same seconds."""
    if row is few or row["seconds"] <= few["seconds"]:
        return "–"
    return f"{batch * (row['steps'] - few['steps']) / (row['seconds'] - few['seconds']):,.0f}"


def _lost(before: Row | None, row: Row, few: Row) -> str:
    if before is None or before is few or row["seconds"] <= few["seconds"]:
        return "–"
    return _percent((row["seconds"] - before["seconds"]) / (row["seconds"] - few["seconds"]))


def _shares(rows: list[Row]) -> str:
    """What each thing costs, in a line."""
    return ", ".join(
        f"{row['kind']} {_lost(before, row, rows[0])}" for before, row in pairwise(rows[1:])
    )


def _memory(section: Row) -> Iterator[str]:
    yield (
        "Bytes that autograd keeps between forward and backward pass, but for inputs, weights and "
        "outputs: of the operators alone, for each latent of each row, and of loss and gradients "
        "of the whole preset `mnist-mlp`, in MiB. The peak is what a step allocates beyond what "
        "was there, in MiB, on a GPU. The kernels draw the noise again; on a CPU fastvae runs its "
        "reference, which keeps it. fastvae-compiled is one graph of both passes: nothing lies "
        "between them.\n"
    )
    names = ("pytorch", "compiled", "fastvae", "fastvae-compiled")

    def of_latents(row: Row, count: int | None) -> str:
        if count is None:
            return "–"
        if row["what"] == "step":
            return f"{count / 2**20:.2f} MiB"
        return f"{count / (row['rows'] * row['latents']):.2f} B"

    yield from _table(
        "|".join(
            [
                "what",
                "rows × latents",
                *(f"kept: {n}" for n in names),
                *(f"peak: {n}" for n in names),
            ]
        ),
        (
            [
                row["what"],
                f"{row['rows']} × {row['latents']}",
                *(of_latents(row, row["kept"].get(name)) for name in names),
                *(_mebibytes(row["peak"].get(name)) for name in names),
            ]
            for row in section["rows"]
        ),
    )


def _growth(section: Row) -> Iterator[str]:
    threads = f", {section['threads']} thread" if section["threads"] else ""
    yield (
        f"Milliseconds of one training step, not compiled{threads}, as one quantity grows (batch, "
        "latents and images: `mnist-mlp`; side of the images: `mnist-conv`), and of drawing the "
        "order of an epoch. Work: operations of matrix products and convolutions, or images to "
        f"order. Exponents are of the {section['fitted']} largest sizes.\n"
    )
    yield from _table(
        "of|exponent of time|of work|excess|allowed",
        (
            [
                row["axis"],
                *(f"{row[k]:.2f}" for k in ("exponent", "work_exponent", "excess", "tolerance")),
            ]
            for row in section["rows"]
        ),
    )
    for row in section["rows"]:
        yield f"\n### {row['axis'].capitalize()}\n"
        yield from _table(
            "size|milliseconds|work",
            (
                [f"{size:,}", _milliseconds(timing), f"{work:.3g}"]
                for size, timing, work in zip(
                    row["sizes"], row["seconds"], row["work"], strict=True
                )
            ),
        )
    if section["figure"]:
        yield f"\nFigure: {section['figure']}"


def _speedrun(section: Row) -> Iterator[str]:
    yield (
        f"docs/speedrun.md: to {section['target']} nats on MNIST. NLL: importance-weighted, "
        f"{section['samples']:,} samples for each of {section['images']:,} held-out images. Wall "
        "clock: of each seed's process from start to end, in seconds, imports, compilation and "
        "scoring included; steps without the first.\n"
    )
    yield from _table(
        "seed|NLL|wall clock|steps|scoring",
        (
            [
                seed,
                f"{found['nll']:.2f} ± {found['standard_error']:.2f}",
                *(f"{found[f'{k}_seconds']:.1f}" for k in ("wall", "steps", "scoring")),
            ]
            for seed, found in section["seeds"].items()
        ),
    )
    yield f"\n{_seeds(section['seeds'])}"


def _seeds(seeds: dict[str, Row]) -> str:
    """Means and standard deviations over the seeds."""

    def over(name: str) -> str:
        values = [found[name] for found in seeds.values()]
        spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
        return f"{mean(values):.2f}{spread}"

    return (
        f"{len(seeds)} seed(s): NLL {over('nll')} nats, wall clock {over('wall_seconds')} s, of "
        f"which steps {over('steps_seconds')} s and scoring {over('scoring_seconds')} s"
    )


RENDER = {
    "copy": _copy,
    "smoke": _parity,
    "ops": _ops,
    "steps": _step,
    "train": _train,
    "speedrun": _speedrun,
    "memory": _memory,
    "parity": _parity,
    "growth": _growth,
    "limits": _limits,
    "more-ops": _ops,
    "more-steps": _step,
}

# -------------------------------------------------------------------------------------- cells


def _table(head: str, rows: Iterable[list[str]]) -> Iterator[str]:
    columns = head.split("|")
    yield f"| {' | '.join(columns)} |"
    yield f"| {' | '.join('---' for _ in columns)} |"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _size(row: Row) -> str:
    size = f"{row['rows']} × {row['columns']}"
    return f"**{size}**" if row["beyond_cache"] else size


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}"


def _timing(timing: Row) -> str:
    return f"{_us(timing['median'])} [{_us(timing['q1'])}–{_us(timing['q3'])}]"


def _milliseconds(timing: Row) -> str:
    return "{:.3f} [{:.3f}–{:.3f}]".format(*(1e3 * timing[k] for k in ("median", "q1", "q3")))


def _mebibytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 2**20:.2f}"


def _rate(rate: Row | None) -> str:
    if rate is None:
        return "–"
    return f"{rate['median']:,.0f} [{rate['q1']:,.0f}–{rate['q3']:,.0f}]"


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.0f} %"
