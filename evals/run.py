"""Run an experiment: what is missing of it, on as many processes as are asked for.

    python evals/run.py --list
    python evals/run.py NAME                          # the small form, for two CPU cores
    python evals/run.py NAME --form full --minutes 9  # the full form, for one GPU, in pieces of nine minutes
    python evals/run.py NAME --show                   # tables and pictures again, of the results there are

Steps that are done lie in --work, with the models; a run that was interrupted goes on from there with the same command.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # a step is a line

import experiments

from lowrank_kit.errors import LowRankError
from lowrank_kit.training.trainer import Terminated

INTERRUPTED = 130


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("name", nargs="?", help="of the experiment")
    made.add_argument("--form", default="small", help="small (default) or full")
    made.add_argument("--work", type=Path, default=Path("evals-work"), help="folder of steps and models")
    made.add_argument("--minutes", type=float, help="end after so long; the same command goes on")
    made.add_argument("--jobs", type=int, default=1, help="processes beside each other, which share the cores")
    made.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    made.add_argument("--list", action="store_true", help="the experiments there are")
    made.add_argument("--show", action="store_true", help="tables and pictures of the results there are")
    return made


def main() -> int:
    """Parse, run, and tell errors in one line."""
    arguments = parser().parse_args()
    if arguments.list or arguments.name is None:
        print("\n".join(experiments.names()))
        return 0
    try:
        return _run(arguments)
    except LowRankError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, Terminated):
        print("interrupted: the same command goes on", file=sys.stderr)
        return INTERRUPTED


def _run(arguments: argparse.Namespace) -> int:
    experiment = experiments.load(arguments.name, arguments.form, arguments.work)
    if arguments.show:
        experiment.show(experiments.read_results(experiment.folder / experiments.FORMS[arguments.form]))
        return 0
    experiment.begin()
    deadline = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    if arguments.jobs > 1 and not _side_by_side(arguments):
        return 1
    while not experiment.run(deadline) and (deadline is None or time.monotonic() < deadline):
        time.sleep(1)  # for what another process is at
    if arguments.worker:
        return 0
    missing = len(experiment.missing())
    if missing:
        print(f"{missing} of {len(experiment.steps)} steps are left; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    experiment.gather()
    print(f"{experiment.folder / experiments.FORMS[arguments.form]}")
    return 0


def _side_by_side(arguments: argparse.Namespace) -> bool:
    """The same command in several processes, each with its share of the cores."""
    threads = max(1, len(os.sched_getaffinity(0)) // arguments.jobs)
    command = [sys.executable, __file__, arguments.name, "--form", arguments.form, "--worker"]
    command += ["--work", str(arguments.work)]
    if arguments.minutes is not None:
        command += ["--minutes", str(arguments.minutes)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    workers = [subprocess.Popen(command, env=environment) for _ in range(arguments.jobs)]
    try:
        return all(code in (0, INTERRUPTED) for code in [worker.wait() for worker in workers])
    finally:
        for worker in workers:
            worker.terminate()


if __name__ == "__main__":
    sys.exit(main())
