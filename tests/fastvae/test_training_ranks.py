"""One process, two or three: the same samples, the same noise, the same numbers."""

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
from running import (
    TINY,
    assert_same_run,
    kept,
    metrics,
    ranks,
    results,
    resume,
    run_process,
    train,
    training_state,
    weights,
)

from fastvae.cli import main
from fastvae.data import EpochOrder

# 1797 digits leave 1618 to train on and 179 held out, which is odd. 60 divides by 2, by 3, and by
# both times two parts.
STEPS = 30
COMMON = [
    *TINY,
    *shlex.split(f"--holdout 0.0996 --max-steps {STEPS} --log-every 1 --batch-size 60"),
]
VARIANTS = {
    "gaussian": "",
    "convolutions": (
        "--likelihood bernoulli --ema-decay 0.9 --clip-norm 5 --network conv --widths 4 8 "
        "--kl-warmup-epochs 1"
    ),
    "several draws": "--num-samples 3 --beta 2 --free-bits 0.2",
    "importance-weighted": "--objective importance-weighted --num-samples 4 --likelihood bernoulli",
    "doubly reparameterised": (
        "--objective importance-weighted --num-samples 4 --groups 2 "
        "--gradient doubly-reparameterized"
    ),
    "capacity": "--capacity 5 --beta 3",
    "total correlation": "--objective total-correlation",
    "mmd": "--objective mmd --posterior deterministic --beta 0",
    "optimal variance": "--variance optimal",
    "conditional": "--conditional --prior class-normal",
    "table": "--inference table",
    "labels": "--target labels",
    "muon": "--optimizer muon",
    "uneven": "--batch-size 61",
}
ACCUMULATED = ("gaussian", "importance-weighted", "labels", "uneven")
CASES = {
    **VARIANTS,
    **{
        f"{name}, accumulated": f"{VARIANTS[name]} --gradient-accumulation-steps 2"
        for name in ACCUMULATED
    },
}
CASES["uneven, accumulated"] = "--batch-size 67 --gradient-accumulation-steps 2"
FEW = (  # the rest is slow
    "gaussian",
    "mmd",
    "gaussian, accumulated",
    "uneven, accumulated",
)


def flags_of(case: str) -> list[str]:
    """A network that predicts labels has no latents."""
    flags = [*COMMON, *CASES[case].split()]
    if "labels" in flags:
        at = flags.index("--latent-dim")
        del flags[at : at + 2]
    return flags


# A script as launch/train.py is, which trains every case and notes the images that each process
# takes. The processes stay together until the last.
TRAINING_ALL = """
import json, os, sys
from pathlib import Path
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from fastvae.cli import main
from fastvae.training import leave_the_others
from fastvae.training.feed import Feed

batch, taken = Feed.batch, []

def noting(self, position, count):
    rows = batch(self, position, count)
    taken.append(rows.indices.tolist())
    return rows

Feed.batch = noting
Accelerator.end_training = lambda self: None
for name, flags in json.loads(Path("cases.json").read_text()).items():
    taken.clear()
    main(["train", *flags, "--output", str(Path(sys.argv[1], name))])
    AcceleratorState._reset_state()
    GradientState._reset_state()
    rank = os.environ.get("RANK", "0")
    Path(sys.argv[1], name, f"taken-{rank}.json").write_text(json.dumps(taken))
leave_the_others()
"""


class Runs:
    """The runs of the cases on 1, 2 or 3 processes, made when one of them is asked for: the few or
    the rest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, count: int, case: str) -> Path:
        group = self.folder / ("few" if case in FEW else "rest") / str(count)
        if not group.exists():
            group.mkdir(parents=True)
            self._train(count, [name for name in CASES if (name in FEW) == (case in FEW)], group)
        return group / case

    def _train(self, count: int, cases: list[str], folder: Path) -> None:
        (folder / "all.py").write_text(TRAINING_ALL)
        (folder / "cases.json").write_text(json.dumps({name: flags_of(name) for name in cases}))
        start = ranks(count, folder / "all.py") if count > 1 else [sys.executable, "all.py"]
        command = [*start, str(folder)]
        process = run_process(command, folder, timeout=400, ACCELERATE_USE_CPU="true")
        assert process.returncode == 0, process.stderr[-4000:]
        assert "Warning" not in process.stderr
        assert process.stderr.count(f"{count} process(es) on cpu") == len(cases)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("ranks"))


THREE = pytest.param(3, marks=pytest.mark.slow)
several = pytest.mark.parametrize("count", [2, THREE])
every_case = pytest.mark.parametrize(
    "case", [x if x in FEW else pytest.param(x, marks=pytest.mark.slow) for x in CASES]
)


@several
@every_case
def test_the_loss_of_every_step(runs: Runs, case: str, count: int) -> None:
    lines, expected = metrics(runs(count, case)), metrics(runs(1, case))
    assert len(lines) == len(expected) == STEPS
    for a, b in zip(lines, expected, strict=True):
        assert a.keys() == b.keys()
        for key in ("step", "epoch", "samples", "lr"):
            assert a[key] == b[key]
        for key in set(a) - {"step", "epoch", "samples", "lr"}:
            assert a[key] == pytest.approx(b[key], rel=2e-5, abs=1e-6), (a["step"], key)


@several
@every_case
def test_the_final_weights(runs: Runs, case: str, count: int) -> None:
    state, expected = (training_state(runs(n, case)) for n in (count, 1))
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


@several
@every_case
def test_every_held_out_image_counts_once(runs: Runs, case: str, count: int) -> None:
    found, expected = (results(runs(n, case))["heldout"] for n in (count, 1))
    assert found["images"] == expected["images"] == 179
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-5, abs=1e-5), name
    assert results(runs(count, case))["hardware"]["processes"] == count


@pytest.mark.parametrize("count", [1, 2, THREE])
@pytest.mark.parametrize("case", ["gaussian", "gaussian, accumulated", "uneven, accumulated"])
def test_the_same_images_in_the_same_steps(runs: Runs, case: str, count: int) -> None:
    """The processes' rows of the parts tile each batch; nothing is met twice or left out."""
    folder = runs(count, case)
    taken = [json.loads((folder / f"taken-{rank}.json").read_text()) for rank in range(count)]
    parts = 2 if "accumulated" in case else 1
    batch = 67 if "uneven" in case else 60
    order = EpochOrder(1618, seed=0)
    for step in range(STEPS):
        met = [
            index for part in range(parts) for rank in taken for index in rank[step * parts + part]
        ]
        assert met == order.indices(step * batch, batch).tolist()


def test_one_process_evaluates_the_model_of_two_alike(runs: Runs, tmp_path: Path) -> None:
    """Only the sums' rounding is left to differ."""
    run, output = runs(2, "gaussian"), tmp_path / "evaluation.json"
    # One draw, as training looks at.
    main(["evaluate", str(run), "--iw-samples", "1", "-o", str(output)])
    found = json.loads(output.read_text())
    for name, value in results(run)["heldout"].items():
        assert found[name] == pytest.approx(value, rel=1e-6)


# Stopped on some processes, resumed on others


def stopped(folder: Path, count: int, *flags: str) -> Path:
    """A run on so many processes that ends without warning after a checkpoint between two lines."""
    (folder / "dying.py").write_text(DYING)
    command = [*ranks(count, "dying.py"), *TINY, *flags, "--output", "run"]
    process = run_process(command, folder, ACCELERATE_USE_CPU="true")
    assert process.returncode != 0
    assert not (folder / "run/results.json").exists()
    state = json.loads((kept(folder / "run") / "state.json").read_text())
    assert 30 < state["step"] < 60
    assert state["step"] % 20 and state["pending_images"] > 0
    return folder / "run"


DYING = """
import os, sys
from fastvae.cli import main
from fastvae.training.saver import Saver

write = Saver._write

def write_and_die(self, snapshot):
    write(self, snapshot)
    if snapshot.step > 30:
        os._exit(9)

Saver._write = write_and_die
main(["train", *sys.argv[1:]])
"""
ELASTIC = shlex.split(
    "--batch-size 66 --checkpoint-every 0.3 --log-every 20 --eval-every 100 --ema-decay 0.9 "
    "--seed 3"
)


@pytest.mark.parametrize("count", [1, THREE])
def test_stopped_on_two_processes_and_resumed_on_one_or_three(count: int, tmp_path: Path) -> None:
    """The same samples and noise, nothing repeated or skipped: the losses are those of a run that
    was never stopped, on any number of processes."""
    straight = train(*ELASTIC, output=tmp_path / "straight")
    run = stopped(tmp_path, 2, *ELASTIC)
    if count == 1:
        resume(run)
    else:
        command = [*ranks(count), "--resume", "run"]
        process = run_process(command, tmp_path, ACCELERATE_USE_CPU="true")
        assert process.returncode == 0, process.stderr
    lines, expected = metrics(run), metrics(straight)
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for a, b in zip(lines, expected, strict=True):
        for key in ("loss", "nll", "kl"):
            assert a[key] == pytest.approx(b[key], rel=2e-5), (a["step"], key)
    for name, tensor in weights(straight).items():
        torch.testing.assert_close(weights(run)[name], tensor, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_two_processes_resumed_are_straight_through_to_the_bit(tmp_path: Path) -> None:
    process = run_process(
        [*ranks(2), *TINY, *ELASTIC, "--output", "straight"], tmp_path, ACCELERATE_USE_CPU="true"
    )
    assert process.returncode == 0, process.stderr
    run = stopped(tmp_path, 2, *ELASTIC)
    process = run_process([*ranks(2), "--resume", "run"], tmp_path, ACCELERATE_USE_CPU="true")
    assert process.returncode == 0, process.stderr
    assert_same_run(run, tmp_path / "straight")


# However it ends, PyTorch's threads end before Python does, which they could otherwise abort

ENDING = """
import sys, time
from pathlib import Path
from fastvae.cli import main
try:
    main(["train", *sys.argv[1:]])
finally:
    time.sleep(1)  # one that was waited for may be listed for a moment longer
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    left = " ".join(name for name in threads if "gloo" in name)
    sys.stdout.write(f"left:{left}\\n")  # at once: both processes write to one pipe
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="threads' names are in Linux's /proc"
)
@pytest.mark.parametrize(
    ("flags", "status"),
    [
        ("--max-steps 8", 0),
        ("--learning-rate 1e30 --max-bad-steps 2", 2),
    ],
)
def test_no_thread_of_the_group_is_left(flags: str, status: int, tmp_path: Path) -> None:
    (tmp_path / "ending.py").write_text(ENDING)
    command = [*ranks(2, "ending.py"), *TINY, *shlex.split(flags), "--output", "run"]
    process = run_process(command, tmp_path, ACCELERATE_USE_CPU="true")
    assert (process.returncode == 0) == (status == 0), process.stderr
    # Once one has failed torchrun ends the other, wherever that is.
    assert "exitcode  : 2" in process.stderr or not status
    assert set(process.stdout.splitlines()) == {"left:"}


# What is refused, by all processes and with one message


def refusal(folder: Path, command: list[str], **changes: str) -> str:
    process = run_process(command, folder, timeout=120, ACCELERATE_USE_CPU="true", **changes)
    assert process.returncode != 0
    assert process.stderr.count("fastvae train: ") == 1, process.stderr
    assert not (folder / "run").exists()
    return process.stderr


@pytest.mark.slow
def test_a_batch_too_small(tmp_path: Path) -> None:
    flags = ["--batch-size", "3", "--gradient-accumulation-steps", "2", "--output", "run"]
    message = refusal(tmp_path, [*ranks(2), *TINY, *flags])
    assert (
        "--batch-size 3 is too small for 2 processes × 2 accumulation steps: 4 or more" in message
    )


@pytest.mark.slow
def test_a_batch_that_does_not_divide_where_it_must(tmp_path: Path) -> None:
    flags = ["--batch-size", "65", "--objective", "mmd", "--output", "run"]
    message = refusal(tmp_path, [*ranks(2), *TINY, *flags])
    assert "--batch-size 65 does not divide among 2 processes × 1" in message
    assert "64 or 66 does" in message


DIFFERING = """
import os, sys
from fastvae.cli import main
CHANGE
main(["train", *sys.argv[1:]])
"""
CHANGES = {
    "settings": (
        "sys.argv += ['--beta', '2'] if os.environ['RANK'] == '1' else []",
        ["objective.beta: 1.0 on process 0, 2.0 on process 1"],
    ),
    "code": (
        "from fastvae import source\n"
        "if os.environ['RANK'] == '1': source.fingerprint = lambda: '0123'",
        ["code: ", "'0123' on process 1"],
    ),
    "versions": (
        "from fastvae import runs\nversions = runs.versions\n"
        "if os.environ['RANK'] == '1': runs.versions = lambda: {**versions(), 'torch': '9.9'}",
        ["torch: ", "'9.9' on process 1"],
    ),
    "data": (
        "from fastvae.data import ImageSet\nfrom fastvae.training import loop\n"
        "load = loop.load_data\n"
        "def other(*arguments):\n"
        "    train, heldout = load(*arguments)\n"
        "    if os.environ['RANK'] == '1':\n"
        "        train.images[5, 0, 0, 0] += 1\n"
        "    return train, heldout\n"
        "loop.load_data = other",
        ["train_data: ", "on process 1"],
    ),
    "data that one cannot read": (
        "from fastvae.errors import UserError\nfrom fastvae.training import loop\n"
        "load = loop.load_data\n"
        "def none(*arguments):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise UserError('there is no such folder')\n"
        "    return load(*arguments)\n"
        "loop.load_data = none",
        ["there is no such folder"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_processes_that_differ(name: str, tmp_path: Path) -> None:
    change, expected = CHANGES[name]
    (tmp_path / "differing.py").write_text(DIFFERING.replace("CHANGE", change))
    message = refusal(tmp_path, [*ranks(2, "differing.py"), *TINY, "--output", "run"])
    for part in expected:
        assert part in message


@pytest.mark.slow
def test_objectives_that_need_the_whole_batch_say_so(tmp_path: Path) -> None:
    flags = ["--objective", "mmd", "--compile", "on", "--max-steps", "2", "--output", "run"]
    process = run_process([*ranks(2), *TINY, *flags], tmp_path, ACCELERATE_USE_CPU="true")
    assert process.returncode == 0, process.stderr
    assert "the objective gathers the batch from all processes" in process.stderr
