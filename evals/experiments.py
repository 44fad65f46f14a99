"""Experiments in steps: what is missing is run, what was interrupted goes on, and results say what they came from.

An experiment is a folder beside this file with `config.yaml`, whose forms ("small", "full") hold settings and data, and
`NAME_study.py`, which makes of them the steps, the rows of results.json and the tables of the README.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from types import ModuleType
from typing import Any

import yaml
from filelock import FileLock, Timeout

from lowrank_kit.config import settings_difference
from lowrank_kit.errors import LowRankError, UsageError, did_you_mean
from lowrank_kit.report.environment import environment
from lowrank_kit.report.files import new_folder, write_json, write_png, write_text

SCHEMA = "lowrank-experiment/1"
HERE = Path(__file__).parent
FORMS = {"small": "results.json", "full": "results-full.json"}
# Packages that another version of may give other numbers; commits are recorded by step, and may differ.
_SAME = ("torch", "transformers", "lm-eval")
_MARKED = re.compile(r"<!-- results -->.*?<!-- /results -->", re.DOTALL)


@dataclass(frozen=True)
class Step:
    """One part of an experiment, whose result is kept.

    Args:
        name: of the step, and of its file.
        run: what is done, the result as JSON can hold it.
        needs: steps whose folders it reads.
    """

    name: str
    run: Callable[[Place], dict[str, Any]]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """Where a step runs.

    Args:
        work: folder of the experiment's form; a step may keep folders there, which an interrupted one finds again.
        settings: of the form.
        data: name -> file.
        deadline: when the step should end, by `time.monotonic`; None if there is no hurry.
    """

    work: Path
    settings: Mapping[str, Any]
    data: Mapping[str, Path]
    deadline: float | None = None


@dataclass(frozen=True)
class Experiment:
    """One form of one experiment, with the steps that are done in a folder of work."""

    name: str
    form: str
    settings: dict[str, Any]
    data: dict[str, Path]
    study: ModuleType
    work: Path
    folder: Path
    files: dict[str, list[Path]] = field(default_factory=dict)  # of data that is several, to be put in one folder

    @property
    def steps(self) -> list[Step]:
        """In the order they are to be run."""
        return list(self.study.steps(self.settings))

    def is_done(self, name: str) -> bool:
        """Whether its result is there."""
        return self._file(name).exists()

    def missing(self) -> list[Step]:
        """Steps that are not done."""
        return [step for step in self.steps if not self.is_done(step.name)]

    def _file(self, name: str) -> Path:
        return self.work / "steps" / f"{name}.json"

    def begin(self) -> None:
        """Make the folder of work, or see that it is of these settings, data and packages.

        Raises:
            UsageError: it is not; what differs is told.
        """
        (self.work / "steps").mkdir(parents=True, exist_ok=True)
        with FileLock(self.work / ".data.lock"):
            for name, files in self.files.items():
                if not self.data[name].exists():
                    with new_folder(self.data[name]) as made:
                        for file in files:
                            shutil.copy(file, made)
        versions = {package: environment()[package] for package in _SAME}
        of = {"schema": SCHEMA, "name": self.name, "form": self.form, "settings": self.settings}
        of |= {"data": {name: sha256(path) for name, path in self.data.items()}, "packages": versions}
        file = self.work / "experiment.json"
        with FileLock(self.work / ".lock"):
            if not file.exists():
                write_json(file, of)
                return
        if different := settings_difference(_flat(json.loads(file.read_text())), _flat({"schema_version": 1, **of})):
            raise UsageError(
                f"{self.work} holds steps of another run: {'; '.join(different)}",
                hint="give another --work folder, or remove that one",
            )

    def run(self, deadline: float | None = None) -> bool:
        """Run what is missing and no other process runs; whether all is done.

        Raises:
            LowRankError: what a step raises.
        """
        place = Place(self.work, self.settings, self.data, deadline)
        for step in self.steps:
            if deadline is not None and time.monotonic() > deadline:
                return False
            if self.is_done(step.name) or not all(map(self.is_done, step.needs)):
                continue
            try:
                with FileLock(self.work / "steps" / f".{step.name}.lock", timeout=0):
                    if not self.is_done(step.name):
                        self._run(step, place)
            except Timeout:  # another process is at it
                continue
        return not self.missing()

    def _run(self, step: Step, place: Place) -> None:
        print(f"{self.name} {self.form}: {step.name}", file=sys.stderr, flush=True)
        started = time.perf_counter()
        found = step.run(place)
        seconds = round(time.perf_counter() - started, 2)
        write_json(
            self._file(step.name),
            {"step": step.name, "result": found, "seconds": seconds, "environment": environment()},
        )

    def gather(self) -> dict[str, Any]:
        """Write results, table and pictures into the experiment's folder.

        Raises:
            LowRankError: steps are missing.
        """
        if missing := self.missing():
            raise LowRankError(
                f"{len(missing)} of {len(self.steps)} steps of {self.name} ({self.form}) are missing in {self.work}, "
                f"{missing[0].name} first",
                hint=f"python evals/run.py {self.name} --form {self.form} --work {self.work}",
            )
        done = {step.name: json.loads(self._file(step.name).read_text()) for step in self.steps}
        commits = sorted({str(one["environment"]["commit"]) for one in done.values()})
        document = {
            "schema": SCHEMA,
            "name": self.name,
            "form": self.form,
            "title": self.study.TITLE,
            "environment": {**next(iter(done.values()))["environment"], "commit": ", ".join(commits)},
            "settings": self.settings,
            "seeds": self.settings.get("seeds", [0]),
            "data": json.loads((self.work / "experiment.json").read_text())["data"],
            "wall_seconds": round(sum(one["seconds"] for one in done.values()), 1),
            **self.study.results(self.settings, {name: one["result"] for name, one in done.items()}),
        }
        write_json(self.folder / FORMS[self.form], document)
        self.show(document)
        return document

    def show(self, document: dict[str, Any]) -> None:
        """Draw the pictures of a results file, and put its tables between the marks of the README."""
        for name, figure in self.study.pictures(document).items():
            write_png(self.folder / f"{name}.png", figure)
        readme = self.folder / "README.md"
        if self.form == "small" and readme.exists():
            tables = f"<!-- results -->\n\n{self.study.tables(document)}\n\n<!-- /results -->"
            write_text(readme, _MARKED.sub(lambda _: tables, readme.read_text()))


def names() -> list[str]:
    """Experiments there are."""
    return sorted(path.parent.name for path in HERE.glob("*/config.yaml"))


def load(name: str, form: str, work: Path, folder: Path | None = None) -> Experiment:
    """An experiment by its name.

    Raises:
        UsageError: no such experiment or form, data that is not there, a full form without a GPU.
    """
    if folder is None and name not in names():
        raise UsageError(f'no experiment "{name}"', hint=did_you_mean(name, names()))
    folder = folder or HERE / name
    config = yaml.safe_load((folder / "config.yaml").read_text())
    if form not in config:
        raise UsageError(
            f'{name} has no form "{form}"', hint=did_you_mean(form, [key for key in config if key in FORMS])
        )
    if form == "full":
        _want_gpu(name)
    settings = dict(config[form])
    work = work / name / form
    data, files = {}, {}
    for key, value in settings.pop("data", {}).items():
        if isinstance(value, list):
            data[key], files[key] = work / "data" / key, [_data_file(key, one) for one in value]
        else:
            data[key] = _data_file(key, value)
    return Experiment(name, form, settings, data, study_of(folder), work, folder, files)


def read_results(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        UsageError: none is there, or one of another version.
    """
    if not path.exists():
        raise UsageError(f"no results at {path}", hint=f"python evals/run.py {path.parent.name}")
    document: dict[str, Any] = json.loads(path.read_text())
    if document.get("schema") != SCHEMA:
        raise UsageError(f'{path} is of schema "{document.get("schema")}", not "{SCHEMA}"', hint="run it anew")
    return document


def _want_gpu(name: str) -> None:
    import torch

    if not torch.cuda.is_available():
        raise UsageError(
            f"the full form of {name} is for a GPU, and torch finds none here",
            hint=f"python evals/run.py {name} --form small",
        )


def _data_file(name: str, value: str) -> Path:
    unset = [variable for variable in re.findall(r"\$(\w+)", value) if variable not in os.environ]
    if unset:
        raise UsageError(
            f"data {name!r} is at {value}, and {unset[0]} is not set",
            hint=f"export {unset[0]}=FOLDER; evals/README.md says what belongs there",
        )
    path = Path(os.path.expandvars(value))
    if not path.exists():
        raise UsageError(f"data {name!r}: nothing at {path}", hint="evals/README.md says what belongs there")
    return path


def study_of(folder: Path) -> ModuleType:
    """The code of an experiment: `steps`, `results`, `tables` and `pictures`."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module(f"{folder.name}_study")


def _flat(document: Mapping[str, Any]) -> dict[str, Any]:
    """{"settings": {"steps": 3}} -> {"settings.steps": 3}."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        flat |= {f"{key}.{name}": one for name, one in value.items()} if isinstance(value, Mapping) else {key: value}
    return flat


def sha256(path: Path) -> str:
    """Of a file, or of the files of a folder one after the other by name."""
    digest = hashlib.sha256()
    for file in sorted(found for found in path.rglob("*") if found.is_file()) if path.is_dir() else [path]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


@contextmanager
def terminated_at(deadline: float | None) -> Iterator[None]:
    """Inside, this process gets SIGTERM at the deadline, which `lowrank_kit` ends a training at, with a checkpoint."""
    if deadline is None:
        yield
        return
    timer = threading.Timer(max(1.0, deadline - time.monotonic()), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard deviation over seeds (0 for one)."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0
