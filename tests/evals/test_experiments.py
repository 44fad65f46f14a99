"""Experiments: what is missing is run, what was interrupted goes on, what does not fit is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowrank_kit.errors import LowRankError, UsageError

EVALS = Path(__file__).parents[2] / "evals"
sys.path.insert(0, str(EVALS))
import experiments  # noqa: E402

CONFIG = """
small:
  data: {text: $FOR_A_TEST/text.txt, both: [$FOR_A_TEST/text.txt, $FOR_A_TEST/other.txt]}
  numbers: [1, 2, 3]
  seeds: [0, 1]
full: {numbers: []}
"""
STUDY = """
from matplotlib.figure import Figure
from experiments import Step

TITLE = "Squares"

def steps(settings):
    first = [Step(f"square-{n}", lambda place, n=n: square(place, n)) for n in settings["numbers"]]
    return [*first, Step("sum", total, tuple(step.name for step in first))]

def square(place, n):
    with (place.work / "ran").open("a") as file:
        file.write(f"{n} ")
    if n == 2 and (place.work / "broken").exists():
        raise KeyboardInterrupt
    return {"square": n * n + len(place.data["text"].read_text())}

def total(place):
    return {"ran": (place.work / "ran").read_text()}

def results(settings, done):
    assert set(done["sum"]["ran"].split()) == {"1", "2", "3"}  # not before the others
    return {"rows": [{"sum": sum(found.get("square", 0) for found in done.values())}]}

def tables(document):
    return f"The sum is {document['rows'][0]['sum']}."

def pictures(document):
    return {"front": Figure()}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An experiment, and its data."""
    made = tmp_path / f"squares{time.monotonic_ns()}"  # a module of its own
    made.mkdir()
    (made / "config.yaml").write_text(CONFIG)
    (made / f"{made.name}_study.py").write_text(STUDY)
    (made / "README.md").write_text("Before\n\n<!-- results -->\nold\n<!-- /results -->\n\nAfter\n")
    (tmp_path / "text.txt").write_text("")
    (tmp_path / "other.txt").write_text("other")
    monkeypatch.setenv("FOR_A_TEST", str(tmp_path))
    return made


def of(folder: Path, form: str = "small") -> experiments.Experiment:
    return experiments.load(folder.name, form, folder.parent / "work", folder)


def test_what_is_missing_is_run_and_gathered(folder: Path) -> None:
    experiment = of(folder)
    experiment.begin()
    (experiment.work / "broken").touch()
    with pytest.raises(KeyboardInterrupt):
        experiment.run()
    assert [step.name for step in experiment.missing()] == ["square-2", "square-3", "sum"]
    with pytest.raises(LowRankError, match=r"3 of 4 steps .* are missing .* square-2 first"):
        experiment.gather()
    (experiment.work / "broken").unlink()
    again = of(folder)
    again.begin()
    assert again.run()
    assert sorted(path.name for path in again.data["both"].iterdir()) == ["other.txt", "text.txt"]
    assert (experiment.work / "ran").read_text() == "1 2 2 3 "
    document = again.gather()
    found = experiments.read_results(folder / "results.json")
    assert found["rows"] == document["rows"] == [{"sum": 14}]
    assert (found["schema"], found["seeds"], found["settings"]["numbers"]) == (experiments.SCHEMA, [0, 1], [1, 2, 3])
    assert found["data"]["text"] == experiments.sha256(folder.parent / "text.txt")
    assert {"torch", "processor", "commit"} <= found["environment"].keys()
    assert (folder / "front.png").stat().st_size > 0
    readme = (folder / "README.md").read_text()
    assert readme == "Before\n\n<!-- results -->\n\nThe sum is 14.\n\n<!-- /results -->\n\nAfter\n"


def test_steps_of_other_settings_or_data_are_not_taken(folder: Path) -> None:
    of(folder).begin()
    (folder.parent / "text.txt").write_text("longer")
    with pytest.raises(UsageError, match=r"data\.text: .* -> "):
        of(folder).begin()
    (folder.parent / "text.txt").write_text("")
    (folder / "config.yaml").write_text(CONFIG.replace("[1, 2, 3]", "[1, 2]"))
    with pytest.raises(UsageError, match=r"settings.numbers: \[1, 2, 3\] -> \[1, 2\]"):
        of(folder).begin()


def test_a_deadline_that_has_passed_begins_nothing(folder: Path) -> None:
    experiment = of(folder)
    experiment.begin()
    assert not experiment.run(time.monotonic() - 1)
    assert len(experiment.missing()) == 4


def test_a_step_in_other_hands_is_left_to_them(folder: Path) -> None:
    experiment = of(folder)
    experiment.begin()
    code = f"""
import sys, filelock, time
with filelock.FileLock({str(experiment.work / "steps" / ".square-2.lock")!r}):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert not experiment.run()
        assert [step.name for step in experiment.missing()] == ["square-2", "sum"]
        other.communicate()
    assert experiment.run()


def test_what_cannot_be_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match='no experiment "compresibility"') as error:
        experiments.load("compresibility", "small", folder)
    assert "compressibility" in str(error.value)
    with pytest.raises(UsageError, match='has no form "large"'):
        of(folder, "large")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match=r"full form of .* is for a GPU"):
        of(folder, "full")
    (folder.parent / "text.txt").unlink()
    with pytest.raises(UsageError, match="data 'text': nothing at"):
        of(folder)
    monkeypatch.delenv("FOR_A_TEST")
    with pytest.raises(UsageError, match="FOR_A_TEST is not set"):
        of(folder)
    with pytest.raises(UsageError, match="no results at"):
        experiments.read_results(folder / "results.json")
    (folder / "results.json").write_text(json.dumps({"schema": "lowrank-experiment/0"}))
    with pytest.raises(UsageError, match='of schema "lowrank-experiment/0"'):
        experiments.read_results(folder / "results.json")


def test_the_committed_results_make_the_tables_of_their_readmes() -> None:
    for name in experiments.names():
        folder = EVALS / name
        if not (folder / "results.json").exists():
            continue
        document = experiments.read_results(folder / "results.json")
        assert document["name"] == name
        study = experiments.study_of(folder)
        assert study.tables(document) in (folder / "README.md").read_text(), f"run.py {name} --show"


def test_one_command_in_two_processes(folder: Path) -> None:
    """The script as a user calls it, on an experiment beside it."""
    evals = folder.parent / "evals"
    evals.mkdir()
    for name in ("run.py", "experiments.py"):
        (evals / name).write_text((EVALS / name).read_text())
    folder.rename(evals / folder.name)
    command = [sys.executable, str(evals / "run.py"), folder.name, "--jobs", "2", "--work", str(folder.parent / "w")]
    environment = {**os.environ, "PYTHONPATH": str(EVALS.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(evals / folder.name / "results.json")
    ran = (folder.parent / "w" / folder.name / "small" / "ran").read_text()
    assert sorted(ran.split()) == ["1", "2", "3"]
    broken = subprocess.run([*command[:2], "nothing"], capture_output=True, text=True, env=environment, check=False)
    assert broken.returncode == 2
    assert broken.stderr.startswith('error: no experiment "nothing"')
