"""The command that measures on a GPU: whatever becomes of one section, the others' results stay."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu
import parity
import pytest
import runner
import sections
import torch
from sections import SECTIONS, Section
from settings import ROOT, Settings, each

# Sections for these tests; their names say what becomes of them. Without torch: they start fast.
FAKES = """
import os, pathlib, time

def machine(settings):
    found = {"device": "D", "cpu": "C", "system": "S", "versions": {"x": "1"}}
    yield "facts", {"machine": found}

def counts(settings):
    for n in range(3):
        if str(n) not in settings.skipped:
            yield "begun", str(n)
            yield "row", {"n": n}

def crashes(settings):
    for found in counts(settings):
        yield found
        if found == ("begun", "1"):
            os.abort()

def hangs(settings):
    yield from counts(settings)
    yield "begun", "forever"
    child = os.fork()
    pathlib.Path(os.environ["PIDS"]).write_text(f"{os.getpid()} {child or os.getpid()}")
    while True:
        time.sleep(1)

def raises(settings):
    yield "row", {"n": 0}
    raise ValueError("what went wrong")

def left(settings):
    yield "facts", {"left": settings.seconds_left}
"""
CUT = """
import gpu, report, sections
from sections import Section
fakes = (
    Section("copy", "Copy", 1, "fakes:machine"),
    Section("ops", "Counts", 1, "fakes:counts"),
    Section("steps", "Hangs", 100, "fakes:hangs"),
)
def rows(section):
    yield f"{len(section['rows'])} rows"
gpu.SECTIONS = report.SECTIONS = fakes
report.RENDER = dict.fromkeys(("copy", "ops", "steps"), rows)
raise SystemExit(gpu.main(["--device", "cpu", "--output", "."]))
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the module `fakes`, which the processes started here find."""
    (tmp_path / "fakes.py").write_text(FAKES)
    paths = (tmp_path, ROOT / "bench", ROOT, ROOT / "kernels")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    return tmp_path


def ran(name: str, seconds: float = 60.0) -> dict[str, Any]:
    found: dict[str, Any] = {}
    settings = Settings(deadline=time.monotonic() + seconds)
    runner.run_section(Section(name, name, 1, f"fakes:{name}"), settings, found, lambda: None)
    return found


def is_gone(pid: int) -> bool:
    """Ended, though perhaps not yet fetched by its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(happened: Any, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.05)


# ----------------------------------------------------------------------- what becomes of sections


def test_a_section_that_crashes_costs_one_case(fakes: Path) -> None:
    found = ran("crashes")
    assert [row["n"] for row in found["rows"]] == [0, 0, 2]  # begun anew behind what crashed
    assert found["status"] == "failed"
    (failure,) = found["failures"]
    assert f"status {-signal.SIGABRT}, in 1" in failure


def test_a_section_that_raises(fakes: Path) -> None:
    found = ran("raises")
    assert found["rows"] == [{"n": 0}] and found["status"] == "failed"
    assert "what went wrong" in found["failures"][0]


def test_a_section_that_hangs(fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ended, and what it started."""
    monkeypatch.setattr(runner, "GRACE", 0.5)
    found = ran("hangs", seconds=6.0)
    assert [row["n"] for row in found["rows"]] == [0, 1, 2]
    assert found["failures"][0].startswith("the process did not end in time, in forever")
    for pid in map(int, (fakes / "pids").read_text().split()):
        wait_until(lambda pid=pid: is_gone(pid))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_cut(fakes: Path, number: signal.Signals) -> None:
    """Both files hold every case until then, and nothing goes on."""
    process = subprocess.Popen([sys.executable, "-c", CUT], cwd=fakes)
    pids = fakes / "pids"

    def hangs() -> bool:
        pages = list(fakes.glob("cpu-D-*.md"))  # written after the other file
        return pids.exists() and bool(pages) and pages[0].read_text().count("3 rows") == 2

    wait_until(hangs)
    process.send_signal(number)
    assert process.wait(30) == (-number if number == signal.SIGKILL else 128 + number)
    (file,) = fakes.glob("cpu-D-*.json")
    results = json.loads(file.read_text())
    assert results["cut"] and results["sections"]["ops"]["status"] == "ok"
    assert [row["n"] for row in results["sections"]["steps"]["rows"]] == [0, 1, 2]
    page = file.with_suffix(".md").read_text()
    assert page.count("3 rows") == 2 and "Not at its end: it goes on, or was cut" in page
    for pid in map(int, pids.read_text().split()):
        wait_until(lambda pid=pid: is_gone(pid))


def test_half_a_line_waits_for_its_end(fakes: Path) -> None:
    process = runner._Process("fakes:counts", Settings())
    try:
        process.process.wait(60)
        assert len(list(process.written())) == 6
        with process.path.open("a") as file:
            file.write('["row", {"n"')
            file.flush()
            assert list(process.written()) == []
            file.write(": 7}]\n")
        assert list(process.written()) == [("row", {"n": 7})]
    finally:
        process.end()


def test_warmers_are_ended(fakes: Path) -> None:
    """Those that do not end in time; what the others compiled is counted."""
    of = [
        Section(name, name, 1, "", warm=f"fakes:{name}", warmers=1) for name in ("counts", "hangs")
    ]
    warmers = runner.Warmers(of, Settings())
    wait_until(lambda: (fakes / "pids").exists())
    wait_until(lambda: not warmers.processes[0].running)
    found = warmers.wait(0.2)
    assert (found["processes"], found["ended"], found["cases"]) == (2, 1, 6)
    for pid in map(int, (fakes / "pids").read_text().split()):
        wait_until(lambda pid=pid: is_gone(pid))


# -------------------------------------------------------------------------------- one case of many


def test_each_case() -> None:
    """What goes wrong, what is left out for want of time, what was chosen or skipped."""

    def measure(case: str) -> list[dict[str, Any]]:
        if case == "wrong":
            raise ValueError("so")
        return [{"case": case}]

    settings = Settings(skipped=("c",))
    said = list(each(["a", "wrong", "c", "d"], measure, settings))
    assert ("failure", "wrong: ValueError: so") in said
    assert [value["case"] for kind, value in said if kind == "row"] == ["a", "d"]
    said = list(each(["ab", "bc", "d"], measure, replace(settings, cases=("b",))))
    assert [value for kind, value in said if kind == "begun"] == ["ab", "bc"]
    late = replace(settings, deadline=time.monotonic() + 1)
    assert list(each(["a", "b"], measure, late)) == [("left_out", "no time left for 2: a, b")]


def test_settings_survive_json() -> None:
    settings = Settings(cases=("a",), part=(1, 3), deadline=5.0, mnist_dir="x")
    assert Settings.from_json(settings.to_json()) == settings
    assert Settings.from_json(Settings().to_json()).seconds_left == float("inf")


# ---------------------------------------------------------------------------------------- the plan


def plan_of(*arguments: str) -> tuple[list[Section], str]:
    given = gpu._arguments(["--plan", *arguments])
    chosen = [section for section in SECTIONS if section.name in given.only]
    return chosen, gpu.plan(chosen, given)


def test_the_plan_adds_up(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(bytes(3 * 2**20))
    chosen, text = plan_of("--mnist-dir", str(tmp_path))
    rows = [line.split() for line in text.splitlines()[1 : len(chosen) + 1]]
    assert [row[0] for row in rows] == [section.name for section in SECTIONS]
    total = 0.0
    for row, section in zip(rows, chosen, strict=True):
        total += section.seconds
        assert (row[1], row[2]) == (f"{section.seconds:.0f}", f"{total:.0f}")
    assert f"{total:.0f} s expected in all, 480 s allowed" in text
    assert "3.0 MiB of MNIST" in text and "MiB of source" in text


def test_what_is_planned_fits_in_eight_minutes() -> None:
    """All but what is measured as time is left."""
    names = [section.name for section in SECTIONS]
    planned = SECTIONS[: names.index("parity") + 1]
    assert 400 < sum(section.seconds for section in planned) <= 480
    _, text = plan_of()
    left = [line.split()[0] for line in text.splitlines() if "as time is left" in line]
    assert left == ["growth", "limits", "more-ops", "more-steps"]


def test_the_command_prints_the_plan() -> None:
    """In a moment, without PyTorch."""
    code = "import sys, gpu; gpu.main(['--plan']); assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "bench", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "s expected in all" in done.stdout


def test_who_gets_how_much_time() -> None:
    chosen = [section for section in SECTIONS if section.name in ("copy", "smoke", "ops")]
    assert [each.name for each in chosen] == gpu._arguments(["--only", "ops"]).only
    copy, smoke, ops = chosen
    assert gpu.time_for(ops, [], 400.0) == 400.0  # the last one all
    assert gpu.time_for(copy, [smoke, ops], 100.0) == pytest.approx(1.33 * copy.seconds)
    assert gpu.time_for(smoke, list(SECTIONS[2:]), 480.0) == pytest.approx(480 / 3)
    assert gpu.time_for(smoke, [ops], 50.0) == 50.0  # never more than there is
    ample = gpu.time_for(copy, [smoke, ops], 10_000.0)
    total = copy.seconds + smoke.seconds + ops.seconds
    assert ample == pytest.approx(10_000 * copy.seconds / total)


# -------------------------------------------------------------------------------------- the parity


def suite_row(suite: str, *, green: bool, problem: str = "") -> dict[str, Any]:
    return {"suite": suite, "green": green, "problem": problem}


def test_red_tests_stop_what_rests_on_them() -> None:
    rows = [suite_row("kernels", green=True), suite_row("replay", green=False, problem="wrong")]
    done = {"smoke": {"rows": rows}}
    needs = ("kernels", "replay", "compiled")
    assert gpu.not_green(done, needs) == ["replay", "compiled"]
    ops, steps = (section for section in SECTIONS if section.name in ("ops", "steps"))
    assert gpu._why_not(ops, done, 100.0) == ""
    assert "replay, compiled" in gpu._why_not(steps, done, 100.0)
    assert gpu._why_not(ops, {}, 100.0).startswith("parity tests not green (kernels)")
    assert gpu._why_not(ops, done, 3.0) == "no time left"


def test_a_suite_that_did_not_end_takes_nothing_from_one_that_was_green() -> None:
    done = {
        "smoke": {"rows": [suite_row("kernels", green=True)]},
        "parity": {"rows": [suite_row("kernels", green=False), suite_row("faults", green=False)]},
    }
    assert gpu.not_green(done, ("kernels",)) == []
    done["parity"]["rows"].append(suite_row("kernels", green=False, problem="red after all"))
    assert gpu.not_green(done, ("kernels",)) == ["kernels"]


def suites(tmp_path: Path, **bodies: str) -> tuple[parity.Suite, ...]:
    for name, body in bodies.items():
        (tmp_path / f"test_{name}.py").write_text(f"def test_it():\n    {body}\n")
    return tuple(
        parity.Suite(name, (str(tmp_path / f"test_{name}.py"),), of_steps=True) for name in bodies
    )


def rows_of(found: list[tuple[str, Any]]) -> dict[str, dict[str, Any]]:
    return {value["suite"]: value for kind, value in found if kind == "row"}


def test_parity_is_remembered_if_green(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "cache_folder", lambda: tmp_path / "cache")
    chosen = suites(tmp_path, good="pass", bad="assert False, 'so it is'")
    settings = Settings(quick=True)
    first = rows_of(list(parity.run(chosen, settings)))
    assert first["good"]["green"] and first["good"]["passed"] == 1
    assert not first["good"]["seen_before"]
    assert not first["bad"]["green"] and "so it is" in first["bad"]["problem"]
    (tmp_path / "test_good.py").unlink()  # nobody looks for it again
    again = rows_of(list(parity.run(chosen[:1], settings)))
    assert again["good"] == {**first["good"], "seen_before": True}
    kept = [path.name for path in (tmp_path / "cache" / "parity").iterdir()]
    assert len(kept) == 1  # the red one is not


def test_other_code_or_another_machine_is_shown_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("fastvae", "kernels", "tests", "bench"):
        (tmp_path / name).mkdir()
    source = tmp_path / "kernels" / "a.py"
    source.write_text("1")
    monkeypatch.setattr(parity, "ROOT", tmp_path)
    command, machine = ["tests"], {"device": "D"}
    kept = parity._kept(command, machine)
    assert parity._kept(command, dict(machine)) == kept
    assert parity._kept(["others"], machine) != kept
    assert parity._kept(command, {"device": "E"}) != kept
    source.write_text("2")
    assert parity._kept(command, machine) != kept


def test_a_suite_that_hangs_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "cache_folder", lambda: tmp_path / "cache")
    chosen = suites(tmp_path, good="pass", slow="import time; time.sleep(600)")
    found = []
    deadline = time.monotonic() + 60
    settings = Settings(quick=True, deadline=deadline)
    for kind, value in parity.run(chosen, settings):
        found.append((kind, value))
        # The good one has ended: the time of the other is up.
        monkeypatch.setattr(Settings, "seconds_left", property(lambda self: -1.0))
    rows = rows_of(found)
    assert rows["good"]["green"]
    assert not rows["slow"]["green"] and not rows["slow"]["problem"]
    assert any(kind == "failure" and "no time left" in value for kind, value in found)


def test_every_kernel_is_among_the_first_tests() -> None:
    folder = ROOT / "kernels/fastvae_kernels/triton_kernels"
    kernels = {p.stem for p in folder.glob("*.py") if "_kernel(" in p.read_text()}
    tested = {Path(path).stem.removeprefix("test_") for path in parity.SMOKE[0].tests}
    assert kernels and kernels <= tested
    for suite in (*parity.SMOKE, *parity.FULL):
        assert all((ROOT / path).exists() for path in suite.tests)


def test_every_section_is_there() -> None:
    """Their functions, and how they are shown."""
    import importlib

    import report

    for section in SECTIONS:
        for path in filter(None, (section.run, section.warm)):
            module, _, function = path.partition(":")
            assert callable(getattr(importlib.import_module(module), function))
        assert section.name in report.RENDER
    suites = {suite.name for suite in parity.SMOKE}
    assert {need for section in SECTIONS for need in section.needs} <= suites
    assert sections.START < 20 and torch.device("cpu") == Settings().device


# --------------------------------------------------------------------------------------- the whole


@pytest.mark.slow
def test_everything_runs_at_tiny_sizes(tmp_path: Path) -> None:
    command = ["bench/gpu.py", "--device", "cpu", "--quick", "--rounds", "5", "--minutes", "300"]
    command += ["--output", str(tmp_path)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (page,) = tmp_path.glob("quick-cpu-*.md")
    for section in SECTIONS:
        assert f"{section.name}: ok" in done.stdout, done.stdout
    assert "no time left" not in page.read_text() and "was cut" not in page.read_text()
