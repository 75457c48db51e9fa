"""The results as tables: Markdown to keep, and a short one for the terminal."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

Row = dict[str, Any]

DIRECTIONS = ("forward", "backward", "forward+backward")


def to_markdown(results: dict[str, Any]) -> str:
    """The whole report."""
    sections = results["sections"]
    parts = [_head(results)]
    for name, render in (
        ("parity", _parity),
        ("copy", _copy),
        ("ops", _ops),
        ("limits", _limits),
        ("step", _step),
        ("mnist", _mnist),
    ):
        if name in sections:
            parts.append("\n".join(_section(name, sections[name], render)))
    return "\n\n".join(parts) + "\n"


def short_table(results: dict[str, Any]) -> str:
    """What a terminal should show last."""
    lines = [""]
    sections = results["sections"]
    for row in sections.get("ops", {}).get("rows", []):
        if row["direction"] == "forward+backward" or row["op"] in ("normal", "uniform"):
            lines.append(
                f"{row['op']:<31}{row['dtype']:<9}{row['rows']:>7} × {row['columns']:<5}"
                f"{_us(row['device']['fastvae']['median']):>9} µs"
                f"{row['bytes_per_second'] / 1e9:>7.0f} GB/s {_percent(row['share_of_copy']):>5} "
                f"eager {row['pytorch_over_fastvae']:5.2f}× "
                f"compiled {row['compiled_over_fastvae']:5.2f}×"
            )
    for row in sections.get("step", {}).get("rows", []):
        rates = row["images_per_second"]
        shown = "  ".join(f"{name} {rate['median']:,.0f}" for name, rate in rates.items())
        lines.append(f"step {row['model']}-{row['batch']} {row['precision']}, images/s:  {shown}")
    for row in sections.get("mnist", {}).get("rows", []):
        lines.append(_mnist_line(row))
    if copied := sections.get("copy", {}).get("bytes_per_second"):
        lines.append(f"copy: {copied / 1e9:.0f} GB/s")
    lines.append("  ".join(f"{name}: {section['status']}" for name, section in sections.items()))
    return "\n".join(lines)


# ----------------------------------------------------------------------------------- sections


def _head(results: dict[str, Any]) -> str:
    machine = results["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    driver = f", driver {machine['driver']}" if machine.get("driver") else ""
    quick = "\n\n**A quick run at tiny sizes: no number in it means anything.**"
    return (
        f"# {machine['device']}, {results['date'][:10]}\n\n"
        f"`{results['command']}`, {results['date']}\n\n"
        f"{machine['device']}{driver}; {machine['cpu']}; {machine['system']}; {versions}.\n\n"
        f"All timings: {results['rounds']} rounds, the candidates of a row taking turns in each; "
        "the median, and in brackets the quartiles." + (quick if results["quick"] else "")
    )


def _section(name: str, section: Row, render: Any) -> Iterator[str]:
    titles = {
        "parity": "Parity",
        "copy": "Memory",
        "ops": "Operators",
        "limits": "What binds each kernel",
        "step": "Training step",
        "mnist": "A run on MNIST",
    }
    yield f"## {titles[name]}\n"
    if section["status"] == "skipped":
        yield f"Skipped: {section['why']}."
        return
    if section["status"] == "failed":
        yield f"**Failed:**\n\n```\n{section['error']}\n```\n"
    try:
        yield from list(render(section))
    except KeyError:  # a section that failed before it had results
        return
    if section.get("left_out") and name != "parity":
        yield "\nLeft out:\n"
        yield from (f"- {line}" for line in section["left_out"])


def _parity(section: Row) -> Iterator[str]:
    yield (
        f"`{section['command']}`: {section['passed']} passed, {section['failed']} failed, "
        f"{section['skipped']} skipped, in {section['seconds']} s; "
        f"{section['kernels_on_gpu']} of those that passed ran Triton kernels on the GPU."
    )
    yield from (f"- failed: {name}" for name in section["failures"])
    if section["left_out"]:
        yield "\nSkipped:\n"
        yield from (f"- {count} × {reason}" for reason, count in section["left_out"].items())
    if section["not_importable"]:
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
        "too, and all rows meet it. Sizes in bold move more bytes than the L2 cache holds.\n"
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
        "(exp, log, square root, conversions). Instructions are counted in the machine code of "
        "one tile of 1024 columns, divided by its elements; what takes longest binds, and the "
        "last column is the share of that rate of bytes which it leaves within reach.\n"
    )
    yield from limits_table(section["rows"], {})


def limits_table(rows: list[Row], resources: dict[int, list[Row]]) -> Iterator[str]:
    """What each kernel needs and what binds it. `resources`: registers, spills and shared memory
    by compute capability, in the order of `rows`; where they differ, one number for each."""
    described = list(zip(*resources.values(), strict=True)) or [(row,) for row in rows]
    yield from _table(
        "kernel|direction|dtype|registers|spilled|shared|loads|stores|bytes|instructions|integer|"
        "special|binds|within reach",
        (
            [
                row["op"],
                row["direction"],
                row["dtype"],
                *(
                    _one_or_each([each[key] for each in compiled])
                    for key in ("registers", "spilled_bytes", "shared_bytes")
                ),
                *(_accesses(row[key]) for key in ("load_bits", "store_bits")),
                *(f"{row[k]:.1f}" for k in ("bytes", "instructions", "integer", "special")),
                {"instructions": "issue"}.get(row["binds"], row["binds"]),
                _percent(row["most_share_of_copy"]),
            ]
            for row, compiled in zip(rows, described, strict=True)
        ),
    )


def _one_or_each(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else " / ".join(map(str, values))


def _accesses(widths: dict[int, int]) -> str:
    """3 × 128 bits are "3×128"."""
    return " + ".join(f"{count}×{bits}" for bits, count in widths.items())


def _step(section: Row) -> Iterator[str]:
    names = ("pytorch", "compiled", "tuned", "fastvae", "fastvae-compiled")
    yield (
        "Images per second of one training step: 784–400–400–20 (mlp) or two convolutions and 256 "
        "hidden units (conv), Bernoulli likelihood, fresh binarisation, Adam. PyTorch is a plain "
        "loop with its images on the device, `compiled` the same under torch.compile, `tuned` "
        "that with fused Adam.\n"
    )
    yield from _table(
        "model|batch|precision|PyTorch|compiled|tuned|fastvae|fastvae compiled|"
        "fastvae / PyTorch|fastvae compiled / compiled|fastvae compiled / tuned",
        (
            [
                row["model"],
                str(row["batch"]),
                row["precision"],
                *(_rate(row["images_per_second"][name]) for name in names),
                f"{row['ratios']['fastvae / pytorch']:.2f}",
                f"{row['ratios']['fastvae-compiled / compiled']:.2f}",
                f"{row['ratios']['fastvae-compiled / tuned']:.2f}",
            ]
            for row in section["rows"]
        ),
    )


def _mnist(section: Row) -> Iterator[str]:
    yield from (f"- {_mnist_line(row)}" for row in section["rows"])


def _mnist_line(row: Row) -> str:
    steps = f", at most {row['max_steps']} steps" if row["max_steps"] else ""
    values = ", ".join(
        f"{name} {value:.2f}" for name, value in row["heldout"].items() if name != "images"
    )
    return (
        f"{row['preset']}, {row['epochs']:g} epochs{steps}, precision {row['precision']}, "
        f"{'compiled' if row['compiled'] else 'not compiled'}: held out (nats per image) {values}; "
        f"{row['images_per_second']:,.0f} images/s, {row['seconds']} s in all"
    )


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


def _rate(rate: Row) -> str:
    return f"{rate['median']:,.0f} [{rate['q1']:,.0f}–{rate['q3']:,.0f}]"


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.0f} %"
