"""A training run from its configuration to its results."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import ProjectConfiguration, broadcast_object_list

from fastvae import runs
from fastvae.build import build_model, build_objective
from fastvae.combinations import why_unread
from fastvae.compiler import keep_compiled_code
from fastvae.config import Config, OptimizerConfig, differences
from fastvae.data import ImageSet, load_data
from fastvae.errors import UserError
from fastvae.evaluation import Evaluation, evaluate, quantity_names
from fastvae.models import Model
from fastvae.noise import derived_seed
from fastvae.parts.objectives import Objective
from fastvae.precision import use_matmul_precision
from fastvae.results import write_results
from fastvae.training.checkpoint import load_checkpoint, save_checkpoint
from fastvae.training.clock import Clock
from fastvae.training.compiler import should_compile, training_flops
from fastvae.training.ema import EMA
from fastvae.training.feed import Feed
from fastvae.training.log import RunLog
from fastvae.training.muon import Muon, layer_weights
from fastvae.training.replay import MOST_STEPS_PER_LAUNCH
from fastvae.training.step import METRICS, TrainingStep
from fastvae.training.updates import Updates

Answer = TypeVar("Answer")

# What may change when a run is resumed; the rest would make it another run.
RESUMABLE = {
    "output", "epochs", "max_steps", "mixed_precision", "matmul_precision", "compile",
    "steps_per_launch", "log_every", "eval_every", "checkpoint_every", "tracker",
    "gradient_accumulation_steps", "data.data_dir", "data.download", "data.heldout_limit",
}  # fmt: skip


def train(
    config: Config, *, name: str, resume: Path | None = None, launched: float | None = None
) -> Path:
    """Train a model and write everything about it into a run's folder, which is returned.

    Call it on every process. `name` is what a fresh run without `config.output` is called;
    `resume` is the folder of a run to continue, whose settings `config` must share; `launched` is
    when the program was started (as time.time() has it; now unless given), from which the time to
    the first step counts.
    Raises UserError for whatever the user can mend, before any work where that is possible.
    """
    clock = Clock(launched)
    if resume is None and (reason := why_unread(config)):
        raise UserError(reason)

    # The processes, and what each takes of a batch.
    accelerator = _make_accelerator(config)
    device = accelerator.device
    if device.type == "cuda":  # on the default stream nothing can be captured
        torch.cuda.set_stream(torch.cuda.Stream(device))
    matmul_precision = use_matmul_precision(config.matmul_precision, device)
    _check_batch(config, accelerator.num_processes)
    _on_main(accelerator, lambda: _check_folder(config, resume))

    # The images.
    with accelerator.local_main_process_first():
        train_set, heldout_set = load_data(config.data, config.seed)
    train_set, heldout_set = (runs.prepare(s, config) for s in (train_set, heldout_set))
    feed = Feed(
        train_set, config.seed, device, samples_ahead=MOST_STEPS_PER_LAUNCH * config.batch_size
    )
    plan = _Plan.of(config, len(train_set))

    # The model, what it maximises, and how.
    torch.manual_seed(derived_seed("weights", config.seed))
    model = build_model(config.model, train_set, config.batch_size).to(device)
    # The order of memory that convolutions are fastest in; nothing else has four dimensions.
    model.to(memory_format=torch.channels_last)
    names = quantity_names(model.likelihood.is_density, model.is_bound)
    objective = build_objective(config.objective, len(train_set))
    _check_together(model, objective, heldout_set, accelerator)
    optimizer = make_optimizer(config.optimizer, model)
    ema = EMA(model, config.optimizer.ema_decay) if config.optimizer.ema_decay else None
    final_model = ema.model if ema else model

    # Where to begin.
    state: dict[str, Any] = {"step": 0, "pending": [0.0] * len(METRICS), "pending_images": 0}
    if resume:
        state = load_checkpoint(resume, model=final_model, trained=model, optimizer=optimizer)
        if state["step"] >= plan.steps:
            raise UserError(
                f"{resume} is already at step {state['step']} of {plan.steps}: "
                "give more --epochs or --max-steps to continue it"
            )

    # The steps: compiled, distributed, replayed.
    step_module = TrainingStep(model, objective, config.seed, config.data.flip).to(device)
    compiled, remark = _decide_to_compile(config, step_module, feed, accelerator, plan, state)
    updates = Updates(
        model,
        step_module,
        feed,
        optimizer,
        ema,
        accelerator,
        config,
        total_steps=plan.steps,
        done=state["step"],
        compiled=compiled,
    )
    if accelerator.scaler is not None and "scaler" in state:
        accelerator.scaler.load_state_dict(state["scaler"])

    # The run's folder, into which nothing is written before all of the above has gone well.
    run = _on_main(accelerator, lambda: _open_folder(config, name, resume))
    _start_tracker(config, run, accelerator)
    log = RunLog(
        accelerator, run, bound=names["elbo"], start_step=state["step"], total_steps=plan.steps
    )
    log.say(_introduction(run, train_set, heldout_set, model, accelerator, config))
    if remark:
        log.say(remark)
    if accelerator.is_main_process:  # what a checkpoint holds is the sum over all processes
        updates.sums.copy_(torch.tensor(state["pending"], dtype=torch.float64))
    summed_images: int = state["pending_images"]
    result: Evaluation | None = None

    while updates.done < plan.steps:
        # As many steps as there is nothing to say or to keep between.
        steps = 1 if clock.first_step_seconds is None else plan.undisturbed(updates.done, config)
        updates.advance(steps)
        done = updates.done
        summed_images += steps * config.batch_size
        if clock.first_step_seconds is None:
            clock.first_step(device)
            log.say(f"first step {clock.first_step_seconds:.1f} s after the start")
        else:
            clock.count(steps * config.batch_size)
        is_last = done == plan.steps

        # What to say of it. The host waits for the device here and nowhere else.
        evaluate_now = is_last or plan.crosses(done, config.eval_every)
        if evaluate_now or done % config.log_every == 0:
            means = (
                accelerator.reduce(updates.sums.clone(), reduction="sum") / summed_images
            ).tolist()
            _require_finite(means, done, run)
            line = _line(done, plan, config, dict(zip(METRICS, means, strict=True)), names)
            line |= {"lr": updates.learning_rate(done - 1), "images_per_second": clock.rate()}
            with clock.paused(device):
                if evaluate_now:
                    result = evaluate(
                        final_model, heldout_set, seed=config.seed, accelerator=accelerator
                    )
                    line |= {f"heldout_{k}": v for k, v in result.named().items() if k != "images"}
                log.write(done, line)
            updates.sums.zero_()
            summed_images = 0

        # What to keep of it.
        if is_last or plan.crosses(done, config.checkpoint_every):
            with clock.paused(device):
                pending = accelerator.reduce(updates.sums.clone(), reduction="sum").tolist()
                _require_finite(pending, done, run)
                state = {
                    "step": done,
                    "samples": done * config.batch_size,
                    "pending": pending,
                    "pending_images": summed_images,
                }
                if accelerator.scaler is not None:
                    state["scaler"] = accelerator.scaler.state_dict()
                if accelerator.is_main_process:
                    save_checkpoint(
                        run,
                        model=final_model,
                        trained=model,
                        optimizer=optimizer,
                        state=state,
                    )

    log.close()
    assert result is not None  # the last step always evaluates
    if accelerator.is_main_process:
        circumstances = _circumstances(clock, accelerator, compiled, matmul_precision)
        written = write_results(
            run, final_model, heldout_set, result, circumstances, seed=config.seed
        )
        log.say(_conclusion(run, result, written))
    accelerator.end_training()
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.default_stream(device))
    return run


@dataclass(frozen=True)
class _Plan:
    """How long the run is, in steps and samples."""

    steps: int
    samples_per_epoch: int
    batch_size: int

    @classmethod
    def of(cls, config: Config, samples_per_epoch: int) -> "_Plan":
        steps = max(1, round(config.epochs * samples_per_epoch / config.batch_size))
        return cls(min(steps, config.max_steps or steps), samples_per_epoch, config.batch_size)

    @property
    def steps_per_epoch(self) -> float:
        return self.samples_per_epoch / self.batch_size

    def epoch(self, done: int) -> float:
        return done * self.batch_size / self.samples_per_epoch

    def undisturbed(self, done: int, config: Config) -> int:
        """Steps from `done` to the next after which something is logged, measured or kept."""
        end = done + 1
        while not (
            end == self.steps
            or end % config.log_every == 0
            or self.crosses(end, config.eval_every)
            or self.crosses(end, config.checkpoint_every)
        ):
            end += 1
        return end - done

    def crosses(self, done: int, epochs: float) -> bool:
        """Whether step number `done` completed a multiple of so many epochs."""
        return int(self.epoch(done) / epochs) > int(self.epoch(done - 1) / epochs)


def _make_accelerator(config: Config) -> Accelerator:
    if config.tracker != "none" and find_spec(config.tracker) is None:
        raise UserError(
            f"--tracker {config.tracker} is not installed: pip install 'fastvae[{config.tracker}]'"
        )
    precision = None if config.mixed_precision == "auto" else config.mixed_precision
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=None if config.tracker == "none" else config.tracker,
            # The trackers' folder is the run's, which is made once all else is known to be right.
            project_config=ProjectConfiguration(project_dir=".", logging_dir="."),
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
            ],
        )
    except ValueError as error:
        raise UserError(f"mixed precision: {error}") from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("mixed precision fp16 needs a GPU; on a CPU use bf16 or no")
    return accelerator


def _decide_to_compile(
    config: Config,
    step: TrainingStep,
    feed: Feed,
    accelerator: Accelerator,
    plan: _Plan,
    state: dict[str, Any],
) -> tuple[bool, str]:
    keep_compiled_code()
    flops = 0.0
    if config.compile == "auto" and not config.model.refine_steps:
        share = config.batch_size // accelerator.num_processes
        rows = share // config.gradient_accumulation_steps
        flops = training_flops(step, feed.copied_batch(0, rows)) * share / rows
    return should_compile(config, plan.steps - state["step"], flops, accelerator.device)


def _check_batch(config: Config, processes: int) -> None:
    """Refuse a batch that processes and accumulation cannot cut into equal parts."""
    parts = processes * config.gradient_accumulation_steps
    if config.batch_size % parts:
        below = config.batch_size // parts * parts
        fits = " or ".join(str(n) for n in (below, below + parts) if n > 0)
        raise UserError(
            f"--batch-size {config.batch_size} does not divide among {processes} processes × "
            f"{config.gradient_accumulation_steps} accumulation steps; {fits} does"
        )


def _check_together(
    model: Model, objective: Objective, heldout_set: ImageSet, accelerator: Accelerator
) -> None:
    """Refuse what only the data or the number of processes make impossible."""
    if objective.couples_rows and accelerator.num_processes > 1:
        raise UserError(
            f"--objective {objective.spec['name']} compares the images of a batch, and each "  # type: ignore[attr-defined]
            f"of the {accelerator.num_processes} processes sees its own part: use one process"
        )
    try:
        model.check_labels(heldout_set.labels)
    except UserError as error:
        raise UserError(f"{heldout_set.name}, held out: {error}") from error


def _on_main(accelerator: Accelerator, action: Callable[[], Answer]) -> Answer:
    """Do it on the main process alone; its answer, or its UserError, is that of every process."""
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = action()
        except UserError as error:
            answer[1] = str(error)
    if accelerator.num_processes > 1:
        broadcast_object_list(answer)
    if answer[1]:
        raise UserError(answer[1])
    return answer[0]


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


def _open_folder(config: Config, name: str, resume: Path | None) -> Path:
    run = resume or runs.new_run_folder(config, name)
    (run / runs.CONFIG).write_text(replace(config, output=run).to_json())
    return run


def _start_tracker(config: Config, run: Path, accelerator: Accelerator) -> None:
    if config.tracker != "none":
        accelerator.project_configuration.logging_dir = str(run)
        accelerator.init_trackers("fastvae", config={"run": run.name, "config": config.to_json()})


def _require_finite(values: list[float], done: int, run: Path) -> None:
    """End a run that has diverged, before it replaces its checkpoint."""
    if not all(map(math.isfinite, values)):
        raise UserError(
            f"the loss is no longer finite at step {done}: start again with a lower "
            f"--learning-rate, or with --clip-norm 1. {run} keeps its last checkpoint, if any"
        )


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


def _line(
    done: int, plan: _Plan, config: Config, means: dict[str, float], names: dict[str, str]
) -> dict[str, Any]:
    """The training part of a line of metrics.jsonl: the loss, and beside it the bound itself."""
    return {
        "step": done,
        "epoch": round(plan.epoch(done), 4),
        "samples": done * config.batch_size,
        "loss": means["loss"],
        names["elbo"]: -(means["nll"] + means["kl"]),
        names["nll"]: means["nll"],
        "kl": means["kl"],
    }


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


def _circumstances(
    clock: Clock, accelerator: Accelerator, compiled: bool, matmul_precision: str
) -> dict[str, Any]:
    """The part of results.json that says how it was computed, not what."""
    return {
        "images_per_second": clock.overall(),
        "seconds_to_first_step": round(clock.first_step_seconds or 0.0, 2),
        "mixed_precision": accelerator.mixed_precision,
        "matmul_precision": matmul_precision,
        "compiled": compiled,
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
    lines.append(f"results: {run}/ ({pictures}, {runs.RESULTS}, {runs.METRICS}, checkpoint/)")
    return "\n".join(lines)
