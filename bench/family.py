"""Every system of the family trained and evaluated by the real commands, in one page of tables.

    python bench/family.py [--only PRESET …] [--jobs N] [--data-dir DIR] [--fresh] [--quick]

A run lies in runs/family/PRESET; its family.json says with which settings it was made and how long
that took. A system whose settings are still the same is not run again. The page, docs/family.md,
is written from all the runs there are. Status: 0, or 1 if a system failed.

`--quick` trains for a few steps on a few images, to see that everything runs: into
runs/family-quick, with its page.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from fastvae import figures, runs
from fastvae.config import Config, differences, from_json
from fastvae.errors import UserError
from fastvae.presets import preset

ROOT = Path(__file__).resolve().parents[1]


class System(NamedTuple):
    """One row of a table."""

    preset: str
    name: str
    """What papers call it."""
    paper: str
    draws: int
    """Draws of z for each image in the importance-weighted NLL (0: it has none)."""
    picture: str
    """The figure of the run that shows it best."""


# fmt: off
AUTOENCODERS = (
    System("autoencoder",        "Autoencoder",                      "Hinton & Salakhutdinov 2006",     0, "reconstructions.png"),  # noqa: E501
    System("wae-mmd",            "WAE-MMD",                          "Tolstikhin et al. 2018",          0, "samples.png"),  # noqa: E501
    System("vae-gaussian-mlp",   "VAE, fixed σ",                     "Kingma & Welling 2014",         100, "samples.png"),  # noqa: E501
    System("vae-gaussian-conv",  "VAE, fixed σ, convolutions",       "Kingma & Welling 2014",         100, "samples.png"),  # noqa: E501
    System("vae-gaussian-pixel", "VAE, σ of each pixel",             "Kingma & Welling 2014, app. C", 100, "samples.png"),  # noqa: E501
    System("sigma-vae",          "σ-VAE, optimal σ",                 "Rybkin et al. 2021",            100, "samples.png"),  # noqa: E501
    System("sigma-vae-learned",  "σ-VAE, learned σ",                 "Rybkin et al. 2021",            100, "samples.png"),  # noqa: E501
)
BERNOULLI = (
    System("vae",                "VAE",                              "Kingma & Welling 2014",        1000, "samples.png"),  # noqa: E501
    System("vae-5-draws",        "VAE, five draws",                  "Burda et al. 2016",            1000, "samples.png"),  # noqa: E501
    System("vae-softplus-2d",    "VAE, two latents",                 "Kingma & Welling 2014, fig. 4", 500, "manifold.png"),  # noqa: E501
    System("cvae",               "CVAE, p(z)",                       "Sohn et al. 2015",             1000, "classes.png"),  # noqa: E501
    System("cvae-class-prior",   "CVAE, p(z given y)",               "Sohn et al. 2015",             1000, "classes.png"),  # noqa: E501
    System("svi",                "SVI: a table of q, no encoder",    "Hoffman et al. 2013",           500, "reconstructions.png"),  # noqa: E501
    System("semi-amortized",     "Semi-amortised VAE",               "Kim et al. 2018",               500, "reconstructions.png"),  # noqa: E501
)
IMPORTANCE_WEIGHTED = (
    System("iwae-5",             "IWAE, k = 5",                      "Burda et al. 2016",            1000, "samples.png"),  # noqa: E501
    System("iwae-50",            "IWAE, k = 50",                     "Burda et al. 2016",            1000, "samples.png"),  # noqa: E501
    System("iwae-5-dreg",        "IWAE, k = 5, DReG gradient",       "Tucker et al. 2019",           1000, "samples.png"),  # noqa: E501
    System("miwae",              "MIWAE, 2 × 4 draws",               "Rainforth et al. 2018",        1000, "samples.png"),  # noqa: E501
    System("piwae",              "PIWAE, 2 × 4 draws",               "Rainforth et al. 2018",        1000, "samples.png"),  # noqa: E501
    System("ciwae",              "CIWAE, half ELBO, half k = 5",     "Rainforth et al. 2018",        1000, "samples.png"),  # noqa: E501
)
WEIGHTED = (
    System("beta-vae",           "β-VAE",                            "Higgins et al. 2017",           500, "traversals.png"),  # noqa: E501
    System("capacity",           "β-VAE with capacity",              "Burgess et al. 2018",           500, "traversals.png"),  # noqa: E501
    System("free-bits",          "Free bits",                        "Kingma et al. 2016",            500, "latent_plane.png"),  # noqa: E501
    System("kl-warmup",          "KL warm-up",                       "Bowman et al. 2016",            500, "samples.png"),  # noqa: E501
    System("kl-cycles",          "Cyclical KL warm-up",              "Fu et al. 2019",                500, "samples.png"),  # noqa: E501
    System("beta-tcvae",         "β-TCVAE",                          "Chen et al. 2018",              500, "traversals.png"),  # noqa: E501
    System("infovae",            "InfoVAE (MMD-VAE)",                "Zhao et al. 2019",              500, "latent_plane.png"),  # noqa: E501
)
PRIORS = (
    System("mixture-prior",      "VAE, mixture prior",               "Tomczak & Welling 2018 (MoG)", 1000, "samples.png"),  # noqa: E501
    System("vampprior",          "VampPrior",                        "Tomczak & Welling 2018",       1000, "samples.png"),  # noqa: E501
    System("iaf",                "IAF posterior",                    "Kingma et al. 2016",           1000, "samples.png"),  # noqa: E501
)
LIKELIHOODS = (
    System("categorical",        "VAE, categorical pixels",          "van den Oord et al. 2016",      100, "samples.png"),  # noqa: E501
    System("logistic-mixture",   "VAE, discretised logistics",       "Salimans et al. 2017",           20, "samples.png"),  # noqa: E501
)
NETWORKS = (
    System("bnn-classes",        "Bayes by Backprop, classes",       "Blundell et al. 2015",            0, "calibration.png"),  # noqa: E501
    System("bnn-regression",     "Bayes by Backprop, regression",    "Blundell et al. 2015",            0, "predictions.png"),  # noqa: E501
)
PUBLISHED = (
    System("mnist-static-400",   "VAE, 784–400–40, static pixels",   "Kingma & Welling 2014",         200, "samples.png"),  # noqa: E501
)
# fmt: on

BINARY = (
    "All systems here and in the next three tables model the same binary images: MNIST, each held-"
    "out pixel drawn once from its grey value, by noise that is the same for all. Their NLLs "
    "compare with one another"
)
OF_A_VAE = ("system", "settings", "−ELBO", "NLL", "draws", "KL", "active", "probe", "time", "")


class Section(NamedTuple):
    """One table: what is in it, and what in it compares with what."""

    title: str
    text: str
    systems: tuple[System, ...]
    columns: tuple[str, ...] = OF_A_VAE


SECTIONS = (
    Section(
        "Autoencoder and Gaussian decoders",
        "The likelihood is a density of grey MNIST pixels on [0, 1], so it may exceed 1 and an NLL "
        "may be negative. NLLs compare within this table only. The first two have a deterministic "
        "posterior, hence no bound and no likelihood: of them only the reconstructions compare.",
        AUTOENCODERS,
        (*OF_A_VAE[:-2], "PSNR", *OF_A_VAE[-2:]),
    ),
    Section(
        "Bernoulli VAE, conditional, inference",
        f"{BINARY}, but for the two conditional ones: theirs is −log p(x given y), which the label "
        "alone lowers by the information that it has of the image, at most log 10 = 2.3 nats. A "
        "table's row moves only when its image is met, once an epoch, so SVI has far to go after "
        "as many epochs as the encoders had.",
        BERNOULLI,
    ),
    Section(
        "Importance-weighted",
        "Trained on other bounds, measured alike: the −ELBO is the bound of a single draw whatever "
        "was trained, and may be worse where that was another bound.",
        IMPORTANCE_WEIGHTED,
    ),
    Section(
        "β and relatives",
        "The −ELBO is unweighted, whatever the objective weighs. These objectives give likelihood "
        "away for other ends: fewer nats of KL, latents in use, independent latents.",
        WEIGHTED,
    ),
    Section("Priors and posteriors", "Compare with the VAE above.", PRIORS),
    Section(
        "Other likelihoods",
        "Probabilities of integer pixels. The first is of MNIST cut to 16 levels, the second of "
        "CIFAR-10 with its 256: neither compares with anything else on this page.",
        LIKELIHOODS,
        (*OF_A_VAE[:4], "bits/dim", *OF_A_VAE[4:]),
    ),
    Section(
        "Bayesian networks",
        "Networks with random weights that predict labels: the classes of MNIST's images, and the "
        "targets of the diabetes table in their unit. Scores are those of predictions averaged "
        "over draws of the weights, on held-out rows; log p(y given x) in nats per row.",
        NETWORKS,
        ("system", "settings", "log p(y given x)", "right", "calibration error", "time", ""),
    ),
)
PUBLISHED_NLL = 89.8
STATIC = Section(
    "The setting of a published number",
    "A VAE of 784–400–40 ReLU units on MNIST binarised once, batch 100, Adam from 1e-4, 500 "
    f"epochs: pythae's reproduction has an importance-weighted NLL of {PUBLISHED_NLL} nats with "
    "200 draws. That is what NLL below compares with; the curve in the chart is the −ELBO, a "
    "looser bound. Not the same: the published images are one fixed binarisation (Larochelle & "
    "Murray 2011), ours are drawn from the grey pixels by the run's seed; theirs trains on "
    "50,000 images and keeps the weights that were best on 10,000 more, ours trains on all "
    "60,000 and keeps the last; their rate falls by 10^(−1/5) after epochs 200 and 350, ours "
    "after 175 and 350.",
    PUBLISHED,
)
SYSTEMS = tuple(system for section in (*SECTIONS, STATIC) for system in section.systems)

# Better than which other, in importance-weighted NLL?
COMPARISONS = (
    ("iwae-5", "vae"),
    ("iwae-50", "vae"),
    ("cvae", "vae"),
    ("cvae-class-prior", "cvae"),
    ("vampprior", "vae"),
    ("iaf", "vae"),
    ("mixture-prior", "vae"),
)

BASE = "vae"
IMAGES = ("mnist", "cifar10")
QUICK = {"max_steps": 30, "compile": "off", "data.train_limit": 1000, "data.heldout_limit": 200}
QUICK_DRAWS = 20
# Where things lie changes no number.
PLACES = {"output", "data.data_dir", "data.download"}
# How often a run is looked at is no property of the system.
UNSHOWN = PLACES | {"log_every", "eval_every", "checkpoint_every"}
# Of an improvement that counts.
STANDARD_ERRORS = 2

RECORD, EVALUATION, SCORES = "family.json", "evaluation.json", "evaluation/scores.parquet"
PICTURE_WIDTH, PICTURE_COLOURS = 240, 64


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    folder = Path("runs/family-quick" if arguments.quick else "runs/family")
    page = folder / "family.md" if arguments.quick else ROOT / "docs/family.md"
    plans = {system.preset: plan_of(system, arguments) for system in SYSTEMS}
    failed = []
    longest_first = sorted(arguments.only, key=lambda name: -_passes(plans[name].config))
    pool = ThreadPoolExecutor(arguments.jobs)
    try:
        running = {
            name: pool.submit(_bring_up_to_date, plans[name], folder / name, arguments)
            for name in longest_first
        }
        for name, run in running.items():
            try:
                run.result()
            except Failed as error:
                print(f"{name}: failed with {error}", file=sys.stderr, flush=True)
                failed.append(name)
    finally:  # cut short, what has been run is still shown
        pool.shutdown(cancel_futures=True)
        found = {name: run for name in plans if (run := read_run(folder / name))}
        write_page(page, plans, found, quick=arguments.quick)
        print(f"{page}: {len(found)} of {len(plans)} systems")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


# ------------------------------------------------------------------------------ running a system


class Plan(NamedTuple):
    """What is to be run: the same plan leads to the same numbers."""

    system: System
    config: Config
    effort: dict[str, int]
    """Flags of `fastvae evaluate`."""


def plan_of(system: System, arguments: argparse.Namespace) -> Plan:
    """The preset as it is, or made quick."""
    config, draws = preset(system.preset), system.draws
    if arguments.quick:
        draws = min(draws, QUICK_DRAWS)
        config = _changed(config, QUICK)
        if arguments.data and config.data.data in IMAGES:
            config = _changed(config, {"data.data": arguments.data})
    return Plan(system, config, {"iw_samples": draws} if draws else {})


def _passes(config: Config) -> float:
    """How often each image is decoded in training: a guess at how long that takes."""
    return config.epochs * config.objective.num_samples


def _changed(config: Config, settings: dict[str, Any]) -> Config:
    """With settings as {"epochs": 3.0, "model.latent_dim": 2}."""
    for key, value in settings.items():
        part, _, name = key.rpartition(".")
        if part:
            value = replace(getattr(config, part), **{name: value})
        config = replace(config, **{part or name: value})
    return config


class Failed(Exception):
    """A command that did not succeed, and the last that it said."""


def _bring_up_to_date(plan: Plan, folder: Path, arguments: argparse.Namespace) -> None:
    """Train and evaluate as planned, each unless that has been done."""
    name = plan.system.preset
    places = ["--data-dir", str(arguments.data_dir)] if arguments.data_dir else []
    record = None if arguments.fresh else read_record(folder)
    if record is None or not is_same_run(record["config"], plan.config):
        print(f"{name}: training", flush=True)
        fresh = folder.with_name(f"{name}.new")  # a training that fails leaves the old run alone
        shutil.rmtree(fresh, ignore_errors=True)
        changes = differences(preset(name), plan.config)
        seconds = _timed(
            [
                *_launch(arguments.jobs),
                *("--preset", name, "--output", str(fresh)),
                *flags({key: new for key, (_, new) in changes.items()}),
                *places,
                *(["--download"] if arguments.download else []),
            ],
            fresh / "train.log",
            arguments.jobs,
        )
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
        record = {"config": runs.read_config(folder), "train_seconds": seconds}
        _write_record(record, folder)
    if record.get("effort") != plan.effort:
        print(f"{name}: evaluating", flush=True)
        evaluate = [sys.executable, "-m", "fastvae.cli", "evaluate", str(folder)]
        command = [*evaluate, *flags(plan.effort), *places]
        seconds = _timed(command, folder / "evaluate.log", arguments.jobs)
        record |= {"effort": plan.effort, "evaluate_seconds": seconds}
        _write_record(record, folder)


def is_same_run(a: Config, b: Config) -> bool:
    """Whether two configurations lead to the same numbers."""
    return differences(a, b).keys() <= PLACES


def flags(settings: dict[str, Any]) -> list[str]:
    """As on the command line: {"model.hidden": (9, 8), "pooling": True} → --hidden 9 8 --pooling"""
    given: list[str] = []
    for key, value in settings.items():
        name = key.rpartition(".")[2].replace("_", "-")
        if isinstance(value, bool):
            given.append(f"--{name}" if value else f"--no-{name}")
        else:
            values = value if isinstance(value, list | tuple) else (value,)
            given += [f"--{name}", *(f"{v:g}" if isinstance(v, float) else str(v) for v in values)]
    return given


def _threads(jobs: int) -> str:
    """For each of so many commands at once."""
    cores = len(os.sched_getaffinity(0))
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // jobs))


def _launch(jobs: int) -> list[str]:
    """How the Makefile launches a training run."""
    one_process = "--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *(*one_process.split(), "--num_cpu_threads_per_process", _threads(jobs)),
        str(ROOT / "launch/train.py"),
    ]


def _timed(command: list[str], log: Path, jobs: int) -> float:
    """Seconds that a command takes. Raises Failed with its last lines if it does not succeed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with log.open("w") as said:
        process = subprocess.run(
            command,
            env={**os.environ, "OMP_NUM_THREADS": _threads(jobs)},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if process.returncode:
        last = log.read_text(errors="replace").splitlines()[-15:]
        raise Failed(
            "\n".join([f"status {process.returncode}: {shlex.join(command)}", *last, f"({log})"])
        )
    return round(time.monotonic() - began, 1)


# ----------------------------------------------------------------------------- what has been run


class Run(NamedTuple):
    """A system that has been trained and evaluated, and what was found."""

    folder: Path
    config: Config
    effort: dict[str, int]
    train_seconds: float
    evaluate_seconds: float
    evaluation: dict[str, Any]
    results: dict[str, Any]


def read_run(folder: Path) -> Run | None:
    """The run in a folder, or None if it is not complete."""
    record = read_record(folder)
    if record is None or "effort" not in record:
        return None
    names = (EVALUATION, runs.RESULTS)
    evaluation, results = (json.loads((folder / name).read_text()) for name in names)
    return Run(folder, **record, evaluation=evaluation, results=results)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The settings and times of a run; None where there are none that can be understood."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_text())
        return {**record, "config": from_json(json.dumps(record["config"]), str(path))}
    except (FileNotFoundError, json.JSONDecodeError, UserError):
        return None


def _write_record(record: dict[str, Any], folder: Path) -> None:
    plain = {**record, "config": json.loads(record["config"].to_json())}
    (folder / RECORD).write_text(json.dumps(plain, indent=2) + "\n")


class Difference(NamedTuple):
    """Of two means, with its standard error."""

    mean: float
    error: float
    paired: bool


def difference(a: Run, b: Run) -> Difference:
    """The importance-weighted NLL of `a` less that of `b`, in nats.

    Taken image by image where both runs kept the values: what makes an image hard for both then
    falls out of it. Else as of two independent samples, which is less sharp.
    """
    values, others = _nll_of_each_image(a), _nll_of_each_image(b)
    if values is not None and others is not None and len(values) == len(others) > 1:
        gaps = values - others
        return Difference(gaps.mean(), gaps.std(ddof=1) / math.sqrt(len(gaps)), True)
    x, y = (run.evaluation["importance_weighted"] for run in (a, b))
    error = math.hypot(x["standard_error"], y["standard_error"])
    return Difference(x["nll"] - y["nll"], error, False)


def _nll_of_each_image(run: Run) -> Any:
    """A NumPy array `[N]` in nats; None where it was not kept."""
    from pyarrow import parquet

    path = run.folder / SCORES
    return parquet.read_table(path)["iw_nll"].to_numpy() if path.is_file() else None


# ------------------------------------------------------------------------------------- the page


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


# ------------------------------------------------------------------------------ the command line


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    names = [system.preset for system in SYSTEMS]
    add("--only", nargs="+", choices=names, default=names, metavar="PRESET", help="run only these")
    add("--jobs", type=int, default=1, help="run so many at once, each on its part of the cores")
    add("--fresh", action="store_true", help="run also what has been run")
    add("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    add("--data", help="with --quick: train on these images in place of MNIST and CIFAR-10")
    add("--data-dir", type=Path, help="where MNIST and CIFAR-10 lie (default: data)")
    add("--download", action="store_true", help="fetch them if they are not there")
    arguments = parser.parse_args(argv)
    if arguments.jobs < 1:
        parser.error(f"--jobs is at least 1, got {arguments.jobs}")
    if arguments.data and not arguments.quick:
        parser.error("--data: the page is of MNIST and CIFAR-10; other images need --quick")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
