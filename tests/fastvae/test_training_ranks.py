"""One process or two: the same samples, the same noise, the same numbers."""

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
from running import (
    LAUNCH,
    TINY,
    TORCHRUN,
    assert_same_tensors,
    metrics,
    results,
    run_process,
    train,
    training_state,
    weights,
)

from fastvae.cli import main
from fastvae.data import EpochOrder
from fastvae.training import loop

# 1797 digits leave 1618 to train on and 179 held out, which is odd.
UNEVEN = ["--holdout", "0.0996", "--max-steps", "50", "--log-every", "1"]
VARIANTS = {
    "gaussian": [],
    "accumulated": shlex.split(
        "--likelihood bernoulli --gradient-accumulation-steps 2 --ema-decay 0.9 --clip-norm 5 "
        "--network conv --widths 4 8 --kl-warmup-epochs 1"
    ),
}

# A script as launch/train.py is, which notes the images that each process takes.
NOTING = """
import json, os, sys
from fastvae.cli import main
from fastvae.training.feed import Feed

taken, batch = [], Feed.batch

def noting(self, position, count):
    rows = batch(self, position, count)
    taken.append(rows.indices.tolist())
    return rows

Feed.batch = noting
main(["train", *sys.argv[1:]])
with open(f"taken-{os.environ['RANK']}.json", "w") as file:
    json.dump(taken, file)
"""


def two_processes(folder: Path, script: Path, *flags: str) -> str:
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", str(script), *flags]
    process = run_process(command, folder, ACCELERATE_USE_CPU="true")
    assert process.returncode == 0, process.stderr
    return process.stderr


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `one` and `two`, and what the two processes took."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "noting.py").write_text(NOTING)
    flags = [*TINY, *UNEVEN, *VARIANTS[request.param]]
    said = two_processes(folder, folder / "noting.py", *flags, "--output", "two")
    assert "Warning" not in said
    assert said.count("2 process(es) on cpu") == 1
    assert said.count("results: two/") == 1
    (folder / "flags.json").write_text(json.dumps(flags))
    return folder


@pytest.fixture(scope="module")
def one(pair: Path) -> Path:
    command = ["-m", "fastvae.cli", "train", *json.loads((pair / "flags.json").read_text())]
    process = run_process([sys.executable, *command, "--output", "one"], pair)
    assert process.returncode == 0, process.stderr
    return pair / "one"


def test_the_loss_of_every_step(pair: Path, one: Path) -> None:
    lines, expected = metrics(pair / "two"), metrics(one)
    assert len(lines) == len(expected) == 50
    for a, b in zip(lines, expected, strict=True):
        assert a.keys() == b.keys()
        for key in ("step", "epoch", "samples", "lr"):
            assert a[key] == b[key]
        for key in ("loss", "elbo", "nll", "kl"):
            assert a[key] == pytest.approx(b[key], rel=1e-5), (a["step"], key)


def test_the_final_weights(pair: Path, one: Path) -> None:
    state, expected = training_state(pair / "two"), training_state(one)
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=1e-5)


def test_every_held_out_image_counts_once(pair: Path, one: Path) -> None:
    found, expected = results(pair / "two")["heldout"], results(one)["heldout"]
    assert found["images"] == expected["images"] == 179
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-6)
    assert results(pair / "two")["hardware"]["processes"] == 2


def test_the_same_images_in_the_same_steps(pair: Path) -> None:
    """Slices of the two processes tile each batch; nothing is met twice or left out."""
    taken = [json.loads((pair / f"taken-{rank}.json").read_text()) for rank in (0, 1)]
    parts = len(taken[0]) // 50
    order = EpochOrder(1618, seed=0)
    for step in range(50):
        met = [
            i for rank in taken for part in rank[step * parts : (step + 1) * parts] for i in part
        ]
        assert met == order.indices(step * 64, 64).tolist()


def test_one_process_evaluates_the_model_of_two_alike(pair: Path) -> None:
    """Only the sums' rounding is left to differ."""
    output = pair / "evaluation.json"
    # One draw, as training looks at.
    main(["evaluate", str(pair / "two"), "--iw-samples", "1", "-o", str(output)])
    found = json.loads(output.read_text())
    for name, value in results(pair / "two")["heldout"].items():
        assert found[name] == pytest.approx(value, rel=1e-6)


def test_two_processes_resume_what_was_stopped_between_two_lines(tmp_path: Path) -> None:
    """What was summed up for the next line is added once, not once for each process."""
    flags = ["--checkpoint-every", "0.3", "--log-every", "20", "--eval-every", "100"]
    straight = train(*flags, output=tmp_path / "straight")
    run = stop_at_a_checkpoint(tmp_path / "stopped", *flags)
    state = json.loads((run / "checkpoint/state.json").read_text())
    assert state["pending_images"] > 0
    assert state["step"] % 20
    two_processes(tmp_path, LAUNCH / "train.py", "--resume", "stopped")
    for a, b in zip(metrics(run), metrics(straight), strict=True):
        assert a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def stop_at_a_checkpoint(run: Path, *flags: str) -> Path:
    """Ends without warning after a checkpoint between two lines."""

    class Killed(BaseException):
        pass

    save = loop.save_checkpoint

    def save_and_die(*args: object, state: dict, **kwargs: object) -> None:
        save(*args, state=state, **kwargs)  # type: ignore[arg-type]
        if state["step"] > 30:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", save_and_die)
        with pytest.raises(Killed):
            train(*flags, output=run)
    return run


# A script that ends without warning after a checkpoint between two lines.
DYING = """
import os, sys
from fastvae.cli import main
from fastvae.training import loop

save = loop.save_checkpoint

def save_and_die(*args, state, **kwargs):
    save(*args, state=state, **kwargs)
    if state["step"] > 30:
        os._exit(9)

loop.save_checkpoint = save_and_die
main(["train", *sys.argv[1:]])
"""


@pytest.mark.slow
def test_two_processes_resumed_are_straight_through_to_the_bit(tmp_path: Path) -> None:
    flags = [*TINY, *["--checkpoint-every", "0.3", "--log-every", "20", "--ema-decay", "0.9"]]
    (tmp_path / "dying.py").write_text(DYING)
    two_processes(tmp_path, LAUNCH / "train.py", *flags, "--output", "straight")
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", "dying.py", *flags]
    process = run_process([*command, "--output", "run"], tmp_path, ACCELERATE_USE_CPU="true")
    assert process.returncode != 0
    assert not (tmp_path / "run/results.json").exists()
    two_processes(tmp_path, LAUNCH / "train.py", "--resume", "run")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")
    for state in (training_state, weights):
        assert_same_tensors(state(tmp_path / "run"), state(tmp_path / "straight"))


def test_a_batch_that_does_not_divide(tmp_path: Path) -> None:
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", str(LAUNCH / "train.py")]
    flags = ["--batch-size", "65", "--max-steps", "3", "--output", "run"]
    process = run_process([*command, *flags], tmp_path, ACCELERATE_USE_CPU="true")
    assert process.returncode != 0
    message = "fastvae train: --batch-size 65 does not divide among 2 processes × 1"
    assert process.stderr.count(message) == 1
    assert "64 or 66 does" in process.stderr
    assert not (tmp_path / "run").exists()
