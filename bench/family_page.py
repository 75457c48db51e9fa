"""The page of the family: its tables, its figures, and what the numbers say in words."""

import math
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from family_runs import PLACES, QUICK, Plan, Run, difference, flags, is_same_run
from family_systems import (
    BASE,
    COMPARISONS,
    PUBLISHED,
    PUBLISHED_NLL,
    SECTIONS,
    STATIC,
    SYSTEMS,
    Section,
    System,
)
from PIL import Image

from fastvae import figures, runs
from fastvae.config import Config, differences
from fastvae.presets import preset

# How often a run is looked at is no property of the system.
UNSHOWN = PLACES | {"log_every", "eval_every", "checkpoint_every"}
# Of an improvement that counts.
STANDARD_ERRORS = 2

PICTURE_WIDTH, PICTURE_COLOURS = 240, 64


def write_page(page: Path, plans: dict[str, Plan], found: dict[str, Run], *, quick: bool) -> None:
    """Write the page, and its pictures into the folder figures/family beside it."""
    pictures = page.parent / "figures/family"
    pictures.mkdir(parents=True, exist_ok=True)
    for name, run in found.items():
        if source := _picture(run, plans[name].system):
            save_picture(source, pictures / f"{name}.png")
    parts = [*_head(plans, found, quick)]
    for section in SECTIONS:
        parts += [f"## {section.title}", section.text, *_table(section, plans, found)]
    parts += ["## What the numbers say", *_findings(found)]
    parts += [f"## {STATIC.title}", STATIC.text, *_table(STATIC, plans, found)]
    if static := found.get(PUBLISHED[0].preset):
        _draw_static(static, pictures / "static.png")
        parts.append(_beside_the_published(static))
        parts.append("![Held-out −ELBO by epoch, and the published NLL](figures/family/static.png)")
    page.write_text("\n\n".join(parts) + "\n")


def _head(plans: dict[str, Plan], found: dict[str, Run], quick: bool) -> Iterator[str]:
    yield "# The family, trained and measured"
    if quick:
        yield "**A quick run at tiny sizes: no number in it means anything.**"
    yield (
        f"`make family` trains each of {len(plans)} systems from its preset, evaluates it and "
        "writes this page, numbers and words alike. Each step is a process of its own:"
    )
    yield (
        "```sh\n"
        "accelerate launch launch/train.py --preset NAME --output runs/family/NAME\n"
        "fastvae evaluate runs/family/NAME --iw-samples DRAWS\n"
        "```"
    )
    seconds = sum(run.train_seconds + run.evaluate_seconds for run in found.values())
    yield (
        f"{datetime.now(timezone.utc):%Y-%m-%d}: {len(found)} of {len(plans)} systems, "
        f"{_duration(seconds)} of training and evaluation in all."
    )
    yield from sorted({_circumstances(run) for run in found.values()})
    yield (
        "One run of each: the standard errors are over held-out images and say nothing of how "
        "another seed would do."
    )
    base = differences(Config(), preset(BASE))
    yield (
        f"- settings: what differs from `{BASE}`, the base, which is "
        f"`{_shown({key: new for key, (_, new) in base.items()}, UNSHOWN)}` and the defaults\n"
        "- −ELBO, KL: nats per held-out image, with β = 1 whatever was trained\n"
        "- NLL: the importance-weighted bound on −log p(x) (Burda et al. 2016), in nats, ± its "
        "standard error over images; the more draws of z for each image, the tighter\n"
        "- active: latents whose posterior mean has a variance above 0.01 over the images\n"
        "- probe: share of held-out images whose class a logistic regression on the posterior "
        "means gets right (none where the encoder is told the class)\n"
        "- time: training + evaluation"
    )


def _circumstances(run: Run) -> str:
    """Hardware and versions in one line."""
    hardware, versions = run.results["hardware"], run.results["versions"]
    threads = f", {hardware['threads']} thread(s) a run" if "threads" in hardware else ""
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{hardware['name']}{threads}; {listed}."


def _table(section: Section, plans: dict[str, Plan], found: dict[str, Run]) -> Iterator[str]:
    """A row for each run, and below it what has no row."""
    names = [system.preset for system in section.systems]
    rows = [_cells(plans[name].system, found[name]) for name in names if name in found]
    if rows:
        columns = section.columns
        lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
        lines += [" | ".join(row[column] for column in columns) for row in rows]
        yield "\n".join(f"| {line} |" for line in lines)
    if missing := [name for name in names if name not in found]:
        yield f"Not run yet, or failed: {', '.join(missing)}."
    if changed := [name for name in names if name in found and _is_old(found[name], plans[name])]:
        yield f"Run with settings that have changed since: {', '.join(changed)}."


def _is_old(run: Run, plan: Plan) -> bool:
    return not is_same_run(run.config, plan.config) or run.effort != plan.effort


def _cells(system: System, run: Run) -> dict[str, str]:
    """Every cell that a table may ask of a run; what a kind of model has not is a dash."""
    measured = run.evaluation
    is_bound = "elbo" in measured
    weighted = measured.get("importance_weighted", {})
    latents = measured.get("latents", {})
    # An encoder that is told the class hands it on: no news for a probe.
    probe = {} if run.config.model.conditional else measured.get("linear_probe", {})
    nll, error = weighted.get("nll"), weighted.get("standard_error")
    # A network that predicts labels has these instead.
    scores = measured.get("predictions", measured)
    is_real = "rmse" in scores
    calibration = scores.get("coverage_error" if is_real else "expected_calibration_error")
    unlike = {key: new for key, (_, new) in differences(preset(BASE), run.config).items()}
    settings = _shown(unlike, UNSHOWN | QUICK.keys())
    return {
        "system": f"{system.name}<br>{system.paper}<br>`{system.preset}`",
        "settings": f"`{settings}`" if settings else "the base",
        "−ELBO": _number(-measured["elbo"] if is_bound else None),
        "NLL": _number(nll) + (f" ± {_number(error)}" if error is not None else ""),
        "draws": _number(weighted.get("samples"), "d"),
        "KL": _number(measured["kl"] if is_bound else None),
        "active": f"{_number(latents.get('active_units'), 'd')} of {latents.get('latent_dim')}",
        "probe": _number(probe.get("score"), ".1%"),
        "PSNR": f"{_number(measured.get('reconstruction', {}).get('psnr'), '.1f')} dB",
        "bits/dim": _number(weighted.get("bits_per_dim"), ".3f"),
        "log p(y given x)": _number(scores.get("log_likelihood"), ".3f"),
        "right": f"RMSE {scores['rmse']:.2f}"
        if is_real
        else _number(scores.get("accuracy"), ".2%"),
        "calibration error": _number(calibration, ".4f"),
        "time": f"{_duration(run.train_seconds)} + {_duration(run.evaluate_seconds)}",
        "": f"![{system.name}](figures/family/{system.preset}.png)",
    }


def _shown(settings: dict[str, Any], unshown: AbstractSet[str]) -> str:
    return " ".join(flags({key: value for key, value in settings.items() if key not in unshown}))


def _findings(found: dict[str, Run]) -> Iterator[str]:
    """What the comparisons come to, in sentences."""
    yield (
        "NLL of the first less NLL of the second, in nats ± one standard error. More than "
        f"{STANDARD_ERRORS} standard errors count as a difference."
    )
    names = {system.preset: system.name for system in SYSTEMS}
    lines = []
    for one, other in COMPARISONS:
        both = one in found and other in found
        finding = _finding(found[one], found[other]) if both else "not both run yet."
        lines.append(f"- **{names[one]}** and **{names[other]}**: {finding}")
    yield "\n".join(lines)


def _finding(a: Run, b: Run) -> str:
    gap = difference(a, b)
    first, second = (run.evaluation["importance_weighted"]["nll"] for run in (a, b))
    size = f"{abs(gap.mean):.2f} ± {gap.error:.2f}"
    if abs(gap.mean) <= STANDARD_ERRORS * gap.error:
        verdict = f"no difference that counts, {_number(gap.mean)} ± {gap.error:.2f}"
    elif gap.mean > 0:
        verdict = f"the first is worse by {size}"
    else:
        verdict = f"the first is better by {size}"
        if a.config.model.conditional and not b.config.model.conditional:
            verdict += f", of which being told the class is worth at most {math.log(10):.2f}"
    how = "image by image" if gap.paired else "as independent samples"
    images = a.evaluation["images"]
    return f"{_number(first)} and {_number(second)}: {verdict} ({images:,} images, {how})."


def _beside_the_published(run: Run) -> str:
    weighted = run.evaluation["importance_weighted"]
    gap = weighted["nll"] - PUBLISHED_NLL
    curve = _heldout_curve(run)
    (early, before), (last, after) = curve[-len(curve) // 5], curve[-1]
    return (
        f"NLL {_number(weighted['nll'])} ± {_number(weighted['standard_error'])} with "
        f"{weighted['samples']} draws, {_number(abs(gap))} nats {'above' if gap > 0 else 'below'} "
        f"the published {PUBLISHED_NLL}. Between epochs {early:.0f} and {last:.0f} the held-out "
        f"−ELBO went from {_number(before)} to {_number(after)} nats."
    )


def _heldout_curve(run: Run) -> list[tuple[float, float]]:
    """Epochs, and the held-out −ELBO after them."""
    lines = [line for line in runs.read_metrics(run.folder) if "heldout_elbo" in line]
    return [(line["epoch"], -line["heldout_elbo"]) for line in lines]


def _draw_static(run: Run, path: Path) -> None:
    figures.save_comparison(
        {"held-out −ELBO": _heldout_curve(run)},
        path,
        "epoch",
        "nats per image",
        {f"published NLL, 200 draws (pythae): {PUBLISHED_NLL}": PUBLISHED_NLL},
    )


def _picture(run: Run, system: System) -> Path | None:
    """The figure for the table, of the evaluation or else of the training."""
    places = (run.folder / "evaluation", run.folder)
    return next((p for place in places if (p := place / system.picture).is_file()), None)


def save_picture(source: Path, target: Path) -> None:
    """A figure made small enough for a table: at most 240 pixels wide, 64 colours."""
    with Image.open(source) as file:
        image = file.convert("RGB")
    if source.name == runs.RECONSTRUCTIONS:  # of eight by eight pairs, four by four can be seen
        image = image.crop((0, 0, image.width // 2, image.height // 2))
    image.thumbnail((PICTURE_WIDTH, image.height), Image.Resampling.LANCZOS)
    # The octree keeps colours that few pixels have, such as those of dots.
    image.quantize(PICTURE_COLOURS, Image.Quantize.FASTOCTREE).save(target, optimize=True)


def _number(value: float | None, form: str = ".2f") -> str:
    """For a table: a dash where there is none, a true minus sign."""
    if value is None:
        return "–"
    return f"{value:{form}}".replace("-", "−").replace("%", " %")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
