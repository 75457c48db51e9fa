"""Checkpoints on disk: whole and verified, or as if they were not there. docs/checkpoint.md

    RUN/checkpoints/step-000001200/
        manifest.json           format, step, and the size and SHA-256 of every other file
        config.json             the model, which `load_pretrained` reads
        model.safetensors
        training.safetensors    the weights in training and the optimizer's state
        state.json              counters

A folder is filled under a hidden name, flushed to the disk, and gets its own by one rename.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvae.errors import UserError
from fastvae.files import flush, sha256

FOLDER = "checkpoints"
MANIFEST_NAME, STATE_NAME, TRAINING_NAME = "manifest.json", "state.json", "training.safetensors"
FORMAT = 1
# A manifest names a handful of files; whatever is longer than this is none.
LONGEST_MANIFEST = 1 << 20

_NAME = re.compile(r"step-(\d{9,})")


class Damaged(UserError):
    """A checkpoint that is not what its manifest says."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose manifest has been read."""

    folder: Path
    step: int
    heldout: float | None
    """The bound on held-out images, in nats per image; None if it was not measured at this step."""
    files: dict[str, dict[str, Any]]


def commit(
    run: Path, step: int, fill: Callable[[Path], None], *, heldout: float | None = None
) -> Path:
    """Make the checkpoint of `step`: `fill` writes its files into the folder it is given.

    Afterwards it is there whole, also if the power fails; if anything goes wrong before (OSError),
    nothing has changed. One that is there for the same step (damaged, or of step 0) is replaced,
    and between two renames there is neither.
    """
    parent, target = run / FOLDER, _folder(run, step)
    parent.mkdir(exist_ok=True)
    _sweep(parent)
    fresh = parent / f".{target.name}.new"
    fresh.mkdir()
    try:
        fill(fresh)
        files = {
            file.name: {"size": file.stat().st_size, "sha256": sha256(file)}
            for file in sorted(fresh.iterdir())
        }
        manifest = {"format": FORMAT, "step": step, "heldout": heldout, "files": files}
        (fresh / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")
        mode = (fresh / MANIFEST_NAME).stat().st_mode
        for file in fresh.iterdir():
            file.chmod(mode)  # safetensors' are for their owner alone, whatever the user's mask
            flush(file)
        flush(fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if target.exists():
        _remove(target)
    fresh.rename(target)
    flush(parent)
    return target


def keep(run: Path, newest: int) -> None:
    """Delete all but so many of the newest checkpoints, and the best by its held-out bound."""
    found = [step for step, _ in _listed(run)]
    kept = set(sorted(found)[-newest:])
    if best := best_of(run):
        kept.add(best.step)
    for step in found:
        if step not in kept:
            _remove(_folder(run, step))


def best_of(run: Path) -> Checkpoint | None:
    """The checkpoint with the highest held-out bound; None where none was measured."""
    measured = []
    for _, folder in _listed(run):
        try:
            checkpoint = read_manifest(folder)
        except Damaged:
            continue
        if checkpoint.heldout is not None:
            measured.append(checkpoint)
    return max(measured, key=lambda c: (c.heldout, c.step), default=None)


def newest(run: Path) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with the newer ones.

    Raises UserError where there is none.
    """
    problems: list[str] = []
    for _, folder in sorted(_listed(run), reverse=True):
        try:
            return verified(folder), problems
        except Damaged as error:
            problems.append(str(error))
    if not problems:
        raise UserError(f"{run} has no checkpoint")
    raise UserError("\n  ".join([f"{run} has no checkpoint that is whole:", *problems]))


def verified(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, each file of which is compared with the manifest.

    Raises Damaged where one is missing or not what it was, and UserError for a newer format.
    """
    checkpoint = read_manifest(folder)
    for name, expected in checkpoint.files.items():
        file = folder / name
        try:
            if file.stat().st_size != expected["size"]:
                raise Damaged(
                    f"{file} has {file.stat().st_size} bytes, {expected['size']} were written"
                )
            found = sha256(file)
        except OSError as error:
            raise Damaged(f"{file} cannot be read: {error.strerror or error}") from error
        if found != expected["sha256"]:
            raise Damaged(f"{file} is damaged: its SHA-256 is not that of the manifest")
    return checkpoint


def read_manifest(folder: Path) -> Checkpoint:
    """What the manifest in `folder` says. Raises as `verified` does."""
    path = folder / MANIFEST_NAME
    try:
        with path.open("rb") as file:
            text = file.read(LONGEST_MANIFEST + 1)
        manifest = json.loads(text) if len(text) <= LONGEST_MANIFEST else None
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{path} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or type(manifest.get("format")) is not int:
        raise Damaged(f"{path} is no manifest of a checkpoint")
    if manifest["format"] > FORMAT:
        raise UserError(
            f"{folder} has format {manifest['format']}, this fastvae reads up to {FORMAT}: "
            "read it with the fastvae that wrote it, or a newer one"
        )
    step, heldout, files = (manifest.get(key) for key in ("step", "heldout", "files"))
    whole = (
        manifest["format"] == FORMAT
        and type(step) is int
        and step >= 0
        and (heldout is None or type(heldout) is float)
        and isinstance(files, dict)
        and all(_is_description(name, described) for name, described in files.items())
    )
    if not whole:
        raise Damaged(f"{path} is not as format {FORMAT} has it")
    assert isinstance(step, int) and isinstance(files, dict)
    return Checkpoint(folder, step, heldout, files)


def folders(path: Path) -> list[Path]:
    """The folders of the checkpoints of a run, the newest first, whole or not."""
    return [folder for _, folder in sorted(_listed(path), reverse=True)]


def _listed(run: Path) -> list[tuple[int, Path]]:
    parent = run / FOLDER
    names = os.listdir(parent) if parent.is_dir() else []
    return [(int(m[1]), parent / name) for name in names if (m := _NAME.fullmatch(name))]


def _folder(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:09d}"


def _is_description(name: object, described: object) -> bool:
    return (
        isinstance(name, str)
        and name not in ("", ".", "..", MANIFEST_NAME)
        and not set(name) & {"/", "\\", "\0"}
        and isinstance(described, dict)
        and type(described.get("size")) is int
        and isinstance(described.get("sha256"), str)
    )


def _remove(folder: Path) -> None:
    """At once for whoever lists the folder, then from the disk."""
    gone = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Clear away what a crash left half written or half deleted."""
    for name in os.listdir(parent):
        if name.startswith(".step-") and name.endswith((".new", ".gone")):
            shutil.rmtree(parent / name, ignore_errors=True)
