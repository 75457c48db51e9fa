"""The command line: flags to typed values, errors to one readable message."""

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import psutil
import tyro
from tyro.conf import OmitArgPrefixes, arg

from fastvae import commands
from fastvae.allocator import keep_freed_memory
from fastvae.config import Config, from_json
from fastvae.errors import FastvaeWarning, OneProcessError, Stopped, UserError
from fastvae.presets import DEFAULT_LABELS_PRESET, DEFAULT_PRESET, PRESETS, preset
from fastvae.runs import read_config
from fastvae.training import leave_the_others, train


@dataclass(frozen=True)
class TrainArguments:
    """Train a variational autoencoder. Start from a preset (or --config, or --resume) and change
    any setting by its flag."""

    preset: Annotated[str, arg(help=f"One of {', '.join(PRESETS)}.")] = DEFAULT_PRESET
    config: Path | None = None
    """Take the settings from the config.json of another run instead of a preset."""
    resume: Path | None = None
    """Continue the run in this folder from its checkpoint, with its settings."""
    settings: Annotated[Config, OmitArgPrefixes] = field(default_factory=Config)


def train_command(arguments: Sequence[str]) -> None:
    """train: train a model and write a run's folder"""
    base = _base(arguments)
    parsed = tyro.cli(
        OmitArgPrefixes[TrainArguments], args=arguments, default=base, prog="fastvae train"
    )
    if parsed.resume is not None and parsed.settings.output != parsed.resume:
        raise UserError("--output cannot be given with --resume: the run goes on in its folder")
    name = parsed.preset if parsed.config is None else parsed.config.resolve().parent.name
    launched = psutil.Process().create_time()
    train(parsed.settings, name=name, resume=parsed.resume, launched=launched)


def _base(arguments: Sequence[str]) -> TrainArguments:
    """The settings that the other flags start from: a saved run's, a file's, or a preset's."""
    parser = argparse.ArgumentParser(prog="fastvae train", add_help=False, allow_abbrev=False)
    for flag in ("--preset", "--config", "--resume", "--target"):
        parser.add_argument(flag)
    chosen, _ = parser.parse_known_args(arguments)
    bases = {k: v for k, v in vars(chosen).items() if k != "target"}
    given = [f"--{flag}" for flag, value in bases.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} each choose the settings to start from: give one")
    if chosen.resume is not None:
        run = Path(chosen.resume)
        return TrainArguments(resume=run, settings=replace(read_config(run), output=run))
    if chosen.config is not None:
        path = Path(chosen.config)
        if not path.is_file():
            raise UserError(f"--config {path}: there is no such file")
        # Another run's folder is not this one's.
        return TrainArguments(
            config=path, settings=replace(from_json(path.read_text(), str(path)), output=None)
        )
    default = DEFAULT_LABELS_PRESET if chosen.target == "labels" else DEFAULT_PRESET
    name = chosen.preset or default
    return TrainArguments(preset=name, settings=preset(name))


_format = warnings.formatwarning


def _formatted(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
    """Ours in one line: where in the code they came up helps nobody."""
    if issubclass(category, FastvaeWarning):
        return f"warning: {message}\n"
    return _format(message, category, *place, **more)


def _typed(command: Callable[..., None]) -> Callable[[Sequence[str]], None]:
    """A command whose flags are its function's parameters."""

    def run(arguments: Sequence[str]) -> None:
        tyro.cli(command, args=arguments, prog=f"fastvae {command.__name__}")

    run.__doc__ = command.__doc__
    return run


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train_command,
    "sample": _typed(commands.sample),
    "reconstruct": _typed(commands.reconstruct),
    "encode": _typed(commands.encode),
    "evaluate": _typed(commands.evaluate),
    "score": _typed(commands.score),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `fastvae` and of the scripts in launch/. Ends with status 2 on a UserError."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in COMMANDS:
        _usage(arguments)
    keep_freed_memory()
    warnings.formatwarning = _formatted
    try:
        status = _status(arguments[0], arguments[1:])
    except KeyboardInterrupt:
        print(f"fastvae {arguments[0]}: interrupted", file=sys.stderr)
        sys.exit(130)
    if status is not None:
        # Here, where the exception no longer holds on to the run.
        leave_the_others()
        sys.exit(status)


def _status(command: str, arguments: Sequence[str]) -> int | None:
    """Run the command; the exit status if it ended before its end, and what a user is told."""
    try:
        COMMANDS[command](arguments)
    except UserError as error:
        # One message, not one for each process.
        if os.environ.get("RANK", "0") == "0" or isinstance(error, OneProcessError):
            print(f"fastvae {command}: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"fastvae {command}: {stopped}", file=sys.stderr)
        return 0 if stopped.number == signal.SIGTERM else 128 + stopped.number
    return None


def _usage(arguments: Sequence[str]) -> None:
    asked = bool(arguments) and arguments[0] in ("-h", "--help")
    lines = ["usage: fastvae COMMAND ...   (fastvae COMMAND --help lists its flags)", ""]
    lines += [f"  {name:<12} {_summary(command)}" for name, command in COMMANDS.items()]
    if arguments and not asked:
        lines.insert(0, f"fastvae: no command is called {arguments[0]!r}")
    print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
    sys.exit(0 if asked else 2)


def _summary(command: Callable[..., None]) -> str:
    first = (command.__doc__ or "").strip().splitlines()[0]
    return first.split(": ", 1)[-1].rstrip(".")


if __name__ == "__main__":
    main()
