"""Every system of the family trained and evaluated by the real commands, in one page of tables.

    python bench/family.py [--only PRESET …] [--jobs N] [--data-dir DIR] [--fresh] [--quick]

A system whose run was made with the same settings is not run again. The page, docs/family.md, is
written from all the runs there are. Status: 0, or 1 if a system failed.

`--quick` trains for a few steps on a few images, to see that everything runs: into
runs/family-quick, with its page.
"""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from family_page import write_page
from family_runs import ROOT, Failed, bring_up_to_date, passes, plan_of, read_run
from family_systems import SYSTEMS


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    folder = Path("runs/family-quick" if arguments.quick else "runs/family")
    page = folder / "family.md" if arguments.quick else ROOT / "docs/family.md"
    plans = {system.preset: plan_of(system, arguments) for system in SYSTEMS}
    failed = []
    longest_first = sorted(arguments.only, key=lambda name: -passes(plans[name].config))
    pool = ThreadPoolExecutor(arguments.jobs)
    try:
        running = {
            name: pool.submit(bring_up_to_date, plans[name], folder / name, arguments)
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
