"""A checkpoint is whole, or as if it were not there: at every place a commit can be cut off."""

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvae import checkpoints
from fastvae.errors import UserError


def fill(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "a.txt").write_text(text)
        (folder / "b.txt").write_text(text * 1000)

    return write


def commit(run: Path, step: int, text: str = "", heldout: float | None = None) -> Path:
    return checkpoints.commit(run, step, fill(text or f"step {step}"), heldout=heldout)


def steps(run: Path) -> list[int]:
    return [checkpoints.read_manifest(folder).step for folder in checkpoints.folders(run)]


def test_what_is_written(tmp_path: Path) -> None:
    folder = commit(tmp_path, 1200, heldout=-7.5)
    assert folder == tmp_path / "checkpoints/step-000001200"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"], manifest["heldout"]) == (1, 1200, -7.5)
    assert set(manifest["files"]) == {"a.txt", "b.txt"}
    for name, described in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert described["size"] == len(content)
        assert described["sha256"] == hashlib.sha256(content).hexdigest()
    found, problems = checkpoints.newest(tmp_path)
    assert (found.folder, found.step, found.heldout, problems) == (folder, 1200, -7.5, [])
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001200"]
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    for step, heldout in enumerate([-9.0, -3.0, -5.0, None, -8.0, -7.0]):
        commit(tmp_path, step, heldout=heldout)
    checkpoints.keep(tmp_path, newest=2)
    assert steps(tmp_path) == [5, 4, 1]
    best = checkpoints.best_of(tmp_path)
    assert best is not None and (best.step, best.heldout) == (1, -3.0)
    checkpoints.keep(tmp_path, newest=1)
    assert steps(tmp_path) == [5, 1]


def test_none_was_measured(tmp_path: Path) -> None:
    for step in range(3):
        commit(tmp_path, step)
    checkpoints.keep(tmp_path, newest=1)
    assert steps(tmp_path) == [2] and checkpoints.best_of(tmp_path) is None


def test_a_failing_write_changes_nothing(tmp_path: Path) -> None:
    commit(tmp_path, 1)

    def fail(folder: Path) -> None:
        (folder / "a.txt").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoints.commit(tmp_path, 2, fail)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000000001"]


def test_the_same_step_again(tmp_path: Path) -> None:
    commit(tmp_path, 3, "old")
    folder = commit(tmp_path, 3, "new")
    assert (folder / "a.txt").read_text() == "new"
    assert checkpoints.newest(tmp_path)[1] == []


# Cut off anywhere


def in_a_child(work: Callable[[], object]) -> int:
    """The exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


WATCHED = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def dies_at(call: int, work: Callable[[], object]) -> Callable[[], object]:
    """`work`, killed just before its file operation number `call`."""

    def watched() -> None:
        left = call
        sync = os.fsync

        def watch(event: str, _: object = None) -> None:
            nonlocal left
            if event in WATCHED:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        def watched_sync(handle: int) -> None:  # of which Python raises no event
            watch("open")
            sync(handle)

        os.fsync = watched_sync
        sys.addaudithook(watch)  # what the interpreter itself says of each operation
        work()

    return watched


@pytest.mark.parametrize("replaced", [False, True])
def test_killed_at_every_file_operation(tmp_path: Path, replaced: bool) -> None:
    """Before each of the operations of a commit and of what it deletes, a process of its own is
    killed; what is there is always whole, and the old or the new."""
    deaths = 0
    for call in range(1000):
        run = tmp_path / str(call)
        run.mkdir()
        commit(run, 1, heldout=-1.0)
        commit(run, 2)
        step = 2 if replaced else 3

        def work(run: Path = run, step: int = step) -> None:
            commit(run, step, "new")
            checkpoints.keep(run, newest=1)

        status = in_a_child(dies_at(call, work))
        found, problems = checkpoints.newest(run)
        assert problems == []
        if not replaced:
            assert found.step in (2, 3)
        text = (found.folder / "a.txt").read_text()
        assert text in (f"step {found.step}", "new")
        if status == 0:
            assert text == "new"
            break
        assert status == -signal.SIGKILL
        deaths += 1
        # What was left half done is in nobody's way.
        work()
        assert steps(run) == [step, 1]
        assert all(p.name.startswith("step-") for p in (run / "checkpoints").iterdir())
    assert deaths > 10


# Damage


@pytest.fixture
def two(tmp_path: Path) -> Path:
    for step in (1, 2):
        commit(tmp_path, step)
    return tmp_path


def manifest_with(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps(change(manifest) or manifest))

    return damage


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "b.txt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "b.txt").write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit": flip_a_bit,
    "cut": lambda folder: os.truncate(folder / "b.txt", 10),
    "longer": lambda folder: (folder / "b.txt").open("a").write("x"),
    "missing": lambda folder: (folder / "a.txt").unlink(),
    "a folder in its place": lambda folder: (
        (folder / "a.txt").unlink(),
        (folder / "a.txt").mkdir(),
    ),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "empty manifest": lambda folder: (folder / "manifest.json").write_text(""),
    "cut manifest": lambda folder: os.truncate(folder / "manifest.json", 40),
    "no JSON": lambda folder: (folder / "manifest.json").write_bytes(b"\x80\x04."),
    "a list": lambda folder: (folder / "manifest.json").write_text("[]"),
    "deep": lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
    "huge": lambda folder: (folder / "manifest.json").write_text(" " * (1 << 21) + "{}"),
    "files is a list": manifest_with(lambda m: m.update(files=[])),
    "outside": manifest_with(lambda m: m["files"].update({"../x": {"size": 0, "sha256": ""}})),
    "size is text": manifest_with(lambda m: m["files"]["a.txt"].update(size="1")),
    "no step": manifest_with(lambda m: m.pop("step") and None),
    "format 0": manifest_with(lambda m: m.update(format=0)),
    "format is true": manifest_with(lambda m: m.update(format=True)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_passed_over(two: Path, kind: str) -> None:
    newest = two / "checkpoints/step-000000002"
    DAMAGE[kind](newest)
    found, problems = checkpoints.newest(two)
    assert found.step == 1
    assert len(problems) == 1 and str(newest) in problems[0]
    with pytest.raises(checkpoints.Damaged):
        checkpoints.verified(newest)


def test_none_is_whole(two: Path) -> None:
    for folder in checkpoints.folders(two):
        flip_a_bit(folder)
    with pytest.raises(UserError) as caught:
        checkpoints.newest(two)
    for step in (1, 2):
        assert f"step-00000000{step}" in str(caught.value)
    assert "no checkpoint that is whole" in str(caught.value)


def test_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no checkpoint$"):
        checkpoints.newest(tmp_path)


def test_a_newer_format_is_not_damaged(two: Path) -> None:
    """Whoever reads on from an older checkpoint would lose what the newer fastvae has trained."""
    manifest_with(lambda m: m.update(format=2))(two / "checkpoints/step-000000002")
    with pytest.raises(UserError, match="format 2, this fastvae reads up to 1"):
        checkpoints.newest(two)


def test_other_names_are_no_checkpoints(two: Path) -> None:
    for name in ("step-3", "step-x", ".step-000000009.new", "notes"):
        shutil.copytree(two / "checkpoints/step-000000001", two / "checkpoints" / name)
    assert checkpoints.newest(two)[0].step == 2
    commit(two, 4)
    assert not (two / "checkpoints/.step-000000009.new").exists()
