"""A training run from its configuration to its results."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from fastvae import checkpoints, runs, source
from fastvae.build import build_model, build_objective
from fastvae.combinations import why_unread
from fastvae.compiler import keep_compiled_code, require_compiler
from fastvae.config import Config, OptimizerConfig, differences, flat
from fastvae.data import ImageSet, load_data
from fastvae.errors import OneProcessError, UserError
from fastvae.evaluation import Evaluation, Evaluator, quantity_names
from fastvae.files import write_whole
from fastvae.hardware import image_format
from fastvae.models import Model
from fastvae.noise import derived_seed
from fastvae.parts.objectives import Objective
from fastvae.precision import float32_precision, use_matmul_precision
from fastvae.results import write_results
from fastvae.training.checkpoint import load_checkpoint
from fastvae.training.clock import Clock
from fastvae.training.compiler import should_compile, training_flops
from fastvae.training.course import Counters, Course
from fastvae.training.ema import EMA
from fastvae.training.feed import Feed
from fastvae.training.interrupt import Interrupt
from fastvae.training.launcher import make_accelerator, obeyed
from fastvae.training.log import RunLog
from fastvae.training.muon import Muon, layer_weights
from fastvae.training.plan import Plan
from fastvae.training.replay import MOST_STEPS_PER_LAUNCH
from fastvae.training.step import TrainingStep
from fastvae.training.threads import take_one_thread_for_short_steps, threads_as_before
from fastvae.training.together import Together, is_loss_of_another
from fastvae.training.updates import Updates

# How long processes wait for one that does not answer: longer than reading data or compiling take.
PATIENCE = timedelta(minutes=10)

# Compiling an evaluation takes some ten seconds and saves some ten microseconds an image.
IMAGES_WORTH_COMPILING = 1_000_000

# What may change when a run is resumed; the rest would make it another run.
RESUMABLE = {
    "output", "epochs", "max_steps", "mixed_precision", "matmul_precision", "compile",
    "steps_per_launch", "log_every", "eval_every", "checkpoint_every", "checkpoint_minutes",
    "tracker", "gradient_accumulation_steps", "keep", "max_bad_steps", "data.data_dir",
    "data.download", "data.heldout_limit", "data.data_budget", "data.data_workers",
    "data.on_bad_sample",
}  # fmt: skip


def train(
    config: Config, *, name: str, resume: Path | None = None, launched: float | None = None
) -> Path:
    """Train a model and write everything about it into a run's folder, which is returned.

    Call it on every process. `name` is what a fresh run without `config.output` is called;
    `resume` is the folder of a run to continue, whose settings `config` must share; `launched` is
    when the program was started (as time.time() has it; now unless given), from which the time to
    the first step counts.
    Raises UserError for whatever the user can mend, before any work where that is possible, and
    Stopped where SIGTERM or SIGINT ended the run early, with a checkpoint.
    """
    with _mendable(config, "nothing was written: start it again"), threads_as_before():
        return _train(config, name, resume, Clock(launched))


def _train(config: Config, name: str, resume: Path | None, clock: Clock) -> Path:
    if resume is None and (reason := why_unread(config)):
        raise UserError(reason)

    keep_compiled_code()  # Accelerate loads what settles on a folder

    # The processes, and what each takes of a batch.
    asked, config = config, obeyed(config)
    accelerator = make_accelerator(config, PATIENCE)
    device = accelerator.device
    if device.type == "cuda":  # on the default stream nothing can be captured
        torch.cuda.set_stream(torch.cuda.Stream(device))
    use_matmul_precision(config.matmul_precision, device)
    if config.compile == "on":
        require_compiler(device)
    together = Together(accelerator, PATIENCE)
    together.require_equal({**_settings(config), **runs.versions(), "code": source.fingerprint()})
    _check_batch(config, accelerator.num_processes)
    together.on_main(lambda: _check_folder(config, resume))

    # The images.
    train_set, heldout_set = together.everywhere(lambda: load_data(config.data, config.seed))
    facts = {"train_data": train_set.fingerprint, "heldout_data": heldout_set.fingerprint}
    together.require_equal(facts)
    train_set, heldout_set = (runs.prepare(s, config) for s in (train_set, heldout_set))
    plan = Plan.of(config, len(train_set))

    # The model, what it maximises, and how.
    torch.manual_seed(derived_seed("weights", config.seed))
    model = build_model(config.model, train_set, config.batch_size).to(device)
    # The order of memory that convolutions are fastest in; nothing else has four dimensions.
    model.to(memory_format=torch.channels_last)
    feed = Feed(
        train_set,
        config.seed,
        device,
        samples_ahead=MOST_STEPS_PER_LAUNCH * config.batch_size,
        workers=config.data.data_workers,
        memory_format=image_format(model),
    )
    objective = build_objective(config.objective, len(train_set))
    _check_together(model, objective, heldout_set, config, accelerator.num_processes)
    optimizer = make_optimizer(config.optimizer, model)
    ema = EMA(model, config.optimizer.ema_decay) if config.optimizer.ema_decay else None
    final_model = ema.model if ema else model

    # Where to begin.
    counters, kept = Counters.at_the_start(), {}
    if resume and (found := together.on_main(lambda: _checkpoint_of(resume))):
        folder = Path(found)
        kept = load_checkpoint(folder, model=final_model, trained=model, optimizer=optimizer)
        step = checkpoints.read_manifest(folder).step
        counters = Counters.read(kept, folder / checkpoints.STATE_NAME, step)
        if kept.get("train_data") != facts["train_data"]:
            raise UserError(
                f"{resume} was trained on other images: {kept.get('train_data')} in the run, "
                f"{facts['train_data']} now. Start a new run"
            )
        if counters.step >= plan.steps and (resume / runs.RESULTS).exists():
            raise UserError(
                f"{resume} is already at step {counters.step} of {plan.steps}: "
                "give more --epochs or --max-steps to continue it"
            )

    # The steps: compiled, distributed, replayed.
    step_module = TrainingStep(model, objective, config.seed, config.data.flip).to(device)
    flops = 0.0  # nobody asks
    if config.compile != "on":
        flops = _flops_of_step(config, step_module, feed, accelerator.num_processes)
    compiled, remark = _decide_to_compile(
        config, objective, accelerator, plan.steps, flops, kept.get("compiled")
    )
    if device.type == "cpu" and not compiled:
        take_one_thread_for_short_steps(flops)
    updates = Updates(
        model,
        step_module,
        feed,
        optimizer,
        ema,
        accelerator,
        config,
        total_steps=plan.steps,
        done=counters.step,
        compiled=compiled,
    )
    evaluated = plan.evaluations(config) * len(heldout_set)
    evaluator = Evaluator(
        final_model,
        heldout_set,
        seed=config.seed,
        accelerator=accelerator,
        compiled=compiled and evaluated >= IMAGES_WORTH_COMPILING,
    )
    if accelerator.scaler is not None and "scaler" in kept:
        accelerator.scaler.load_state_dict(kept["scaler"])

    # The run's folder, into which nothing is written before all of the above has gone well.
    with Interrupt() as interrupt:
        run = Path(together.on_main(lambda: str(_open_folder(asked, name, resume))))
        interrupt.stop_at_once(f"stopped before the first step: continue with --resume {run}")
        _start_tracker(config, run, accelerator)
        bound = quantity_names(model.likelihood.is_density, model.is_bound)["elbo"]
        log = RunLog(
            accelerator,
            run,
            bound=bound,
            start_step=counters.step,
            last_line=counters.step if counters.said else counters.step - 1,
            total_steps=plan.steps,
        )
        log.say(_introduction(run, train_set, heldout_set, model, accelerator, config))
        if remark:
            log.say(remark)

        course = Course(
            run,
            config,
            plan,
            updates,
            final_model,
            evaluator,
            accelerator,
            together,
            log,
            clock,
            counters,
            facts,
        )
        with _mendable(config, f"continue with --resume {run}"):
            result = course.go(interrupt)
    log.close()
    if result is None:  # an earlier process ended between the last checkpoint and the results
        result = evaluator()
    if accelerator.is_main_process:
        circumstances = _circumstances(clock, accelerator, updates)
        written = write_results(
            run, final_model, heldout_set, result, circumstances, seed=config.seed
        )
        log.say(_conclusion(run, result, written))
    accelerator.end_training()
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.default_stream(device))
    return run


@contextmanager
def _mendable(config: Config, go_on: str) -> Iterator[None]:
    """What goes wrong here and is no mistake of ours, as UserError; `go_on`: what to do then."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OneProcessError(_out_of_memory(config, str(error), go_on)) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error):
            raise OneProcessError(_out_of_memory(config, str(error), go_on)) from error
        if "DataLoader worker" in str(error):
            raise OneProcessError(
                "a process that decodes images has died (killed, or out of memory: then take fewer "
                f"--data-workers); {go_on} ({str(error).splitlines()[0]})"
            ) from error
        if is_loss_of_another(error):
            raise OneProcessError(
                f"another process of this run has ended or does not answer; {go_on} "
                f"({str(error).splitlines()[0]})"
            ) from error
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise OneProcessError(f"{where}{error.strerror or error}; {go_on}") from error


def _out_of_memory(config: Config, said: str, go_on: str) -> str:
    return (
        f"out of memory with --batch-size {config.batch_size} in "
        f"{config.gradient_accumulation_steps} part(s): split it by "
        f"--gradient-accumulation-steps {2 * config.gradient_accumulation_steps}, which changes no "
        "result, or take --mixed-precision bf16, a smaller --batch-size or a smaller model; "
        f"{go_on} ({(said or 'no memory').splitlines()[0]})"
    )


def _flops_of_step(config: Config, step: TrainingStep, feed: Feed, processes: int) -> float:
    """Floating-point operations of one step in this process."""
    share = config.batch_size / processes
    rows = max(1, int(share / config.gradient_accumulation_steps))
    return training_flops(step, feed.copied_batch(0, rows)) * share / rows


def _decide_to_compile(
    config: Config,
    objective: Objective,
    accelerator: Accelerator,
    steps: int,
    flops: float,
    was_compiled: bool | None,
) -> tuple[bool, str]:
    """As the run did before, if it is resumed: code that is compiled rounds otherwise."""
    if objective.couples_rows and accelerator.num_processes > 1:
        return False, "not compiled: the objective gathers the batch from all processes"
    if config.compile == "auto" and was_compiled is not None:
        config = replace(config, compile="on" if was_compiled else "off")
    return should_compile(config, steps, flops, accelerator.device)


def _settings(config: Config) -> dict[str, Any]:
    """All of them by their names, but for where a host has its files."""
    paths: dict[str, Any] = {"data.data_dir": None, "output": None}
    return {**flat(json.loads(config.to_json())), **paths}


def _check_batch(config: Config, processes: int) -> None:
    """Refuse a batch of which a process would have no row."""
    parts = processes * config.gradient_accumulation_steps
    if config.batch_size < parts:
        raise UserError(
            f"--batch-size {config.batch_size} is too small for {processes} processes × "
            f"{config.gradient_accumulation_steps} accumulation steps: {parts} or more"
        )


def _check_together(
    model: Model, objective: Objective, heldout_set: ImageSet, config: Config, processes: int
) -> None:
    """Refuse what only the data or the number of processes make impossible."""
    shares = processes * config.gradient_accumulation_steps
    couples_rows = objective.couples_rows or model.likelihood.couples_rows
    if processes > 1 and couples_rows and config.batch_size % shares:
        below = config.batch_size // shares * shares
        fits = " or ".join(str(n) for n in (below, below + shares) if n > 0)
        raise UserError(
            "the loss compares the images of a batch, of which each process then needs as many: "
            f"--batch-size {config.batch_size} does not divide among {processes} processes × "
            f"{config.gradient_accumulation_steps} accumulation steps, {fits} does"
        )
    try:
        model.check_labels(heldout_set.labels)
    except UserError as error:
        raise UserError(f"{heldout_set.name}, held out: {error}") from error


def _check_folder(config: Config, resume: Path | None) -> None:
    """Refuse a fresh run in the folder of another, and a resumed one with other settings."""
    if resume is None:
        runs.refuse_other_run(config.output)
        return
    changed = {
        key: values
        for key, values in differences(runs.read_config(resume), config).items()
        if key not in RESUMABLE
    }
    if changed:
        listed = "\n".join(
            f"  {k}: {old} in the run, {new} now" for k, (old, new) in changed.items()
        )
        raise UserError(f"{resume} was started with other settings:\n{listed}\nStart a new run.")


def _checkpoint_of(run: Path) -> str:
    """The folder of the newest checkpoint that is whole; "" where none was ever begun. Says which
    newer ones are not."""
    lines = run / runs.METRICS
    if not checkpoints.folders(run) and not (lines.exists() and lines.stat().st_size):
        return ""
    found, problems = checkpoints.newest(run)
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    if problems:
        print(f"warning: continuing from {found.folder} instead", file=sys.stderr)
    return str(found.folder)


def _open_folder(config: Config, name: str, resume: Path | None) -> Path:
    run = resume or runs.new_run_folder(config, name)
    write_whole(run / runs.CONFIG, replace(config, output=run).to_json())
    return run


def _start_tracker(config: Config, run: Path, accelerator: Accelerator) -> None:
    if config.tracker != "none":
        accelerator.project_configuration.logging_dir = str(run)
        accelerator.init_trackers("fastvae", config={"run": run.name, "config": config.to_json()})


def make_optimizer(config: OptimizerConfig, model: Model) -> torch.optim.Optimizer:
    """Over all parameters of `model`; its learning rate is set anew at each step."""
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "muon":
        matrices = layer_weights(model)
        return Muon(model.parameters(), matrices, momentum=config.momentum, **settings)
    cls = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    on_gpu = next(model.parameters()).is_cuda
    return cls(model.parameters(), fused=True, capturable=on_gpu, **settings)


def _introduction(
    run: Path,
    train_set: ImageSet,
    heldout_set: ImageSet,
    model: Model,
    accelerator: Accelerator,
    config: Config,
) -> str:
    shape = "×".join(map(str, model.image_shape))
    weights = sum(p.numel() for p in model.parameters())
    return (
        f"{run}: {len(train_set)} images {shape} to train on ({train_set.name}), "
        f"{len(heldout_set)} held out; {weights:,} weights; "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}, "
        f"precision {accelerator.mixed_precision}, batch {config.batch_size}"
    )


def _circumstances(clock: Clock, accelerator: Accelerator, updates: Updates) -> dict[str, Any]:
    """The part of results.json that says how it was computed, not what."""
    return {
        "images_per_second": clock.overall(),
        "seconds_to_first_step": round(clock.first_step_seconds or 0.0, 2),
        "mixed_precision": accelerator.mixed_precision,
        **float32_precision(accelerator.device),
        "compiled": updates.compiled,
        **({"replay": updates.replay.facts()} if updates.replay else {}),
        **runs.environment(accelerator.device, accelerator.num_processes),
    }


def _conclusion(run: Path, result: Evaluation, written: dict[str, Any]) -> str:
    lines = [
        f"held out ({result.images} images, nats): "
        + ", ".join(f"{k} {v:.2f}" for k, v in result.named().items() if k != "images")
    ]
    if found := written.get("predictions"):
        lines.append(
            f"predictions ({found['weight_draws']} draws of the weights): "
            + ", ".join(f"{k} {v:.4g}" for k, v in found.items() if k != "weight_draws")
        )
    pictures = ", ".join(name for name in runs.PICTURES if (run / name).exists())
    lines.append(f"results: {run}/ ({pictures}, {runs.RESULTS}, {runs.METRICS}, checkpoints/)")
    return "\n".join(lines)
