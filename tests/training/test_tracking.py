"""Trackers: which there are, and that the run's own figures and settings reach them, in the run's folder.

No tracker need be installed: a stand-in of the package tensorboardX writes what transformers' own callback hands to it.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowrank_kit.errors import UsageError
from lowrank_kit.training.run import train
from lowrank_kit.training.settings import TrainSettings

Make = Callable[..., TrainSettings]
# All that transformers asks of it. `tensorboard` itself goes before it where it is installed.
TENSORBOARD_X = """
import json, pathlib
class SummaryWriter:
    def __init__(self, log_dir):
        self.folder = pathlib.Path(log_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
    def _write(self, *row):
        with (self.folder / "events.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\\n")
    def add_scalar(self, name, value, step):
        self._write(name, step, value)
    def add_text(self, name, text, step=0):
        self._write(name, step, text)
    def flush(self): pass
    def close(self): pass
"""


@pytest.mark.usefixtures("measured_at_any_cost")
def test_what_the_log_says_reaches_the_tracker(
    settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("tensorboard"):
        pytest.skip("tensorboard is installed: see the test of its own files")
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "tensorboardX.py").write_text(TENSORBOARD_X)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    settings = settings_for(steps=3, trackers=("tensorboard",), spectra_every=1)
    train(settings, tmp_path / "run", device="cpu")
    rows = [json.loads(line) for line in (tmp_path / "run" / "tensorboard" / "events.jsonl").read_text().splitlines()]
    tracked = {(name, step): value for name, step, value in rows}
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3]
    for line in lines:
        step = line["step"]
        if "validation_loss" in line:
            assert tracked["eval/loss", step] == line["validation_loss"]
            continue
        for name in ("loss", "grad_norm", "rank_fraction", "lmo_ratio", "tokens_per_s", "spectra_share"):
            assert tracked[f"train/{name}", step] == line[name]
        assert tracked["train/learning_rate", step] == line["lr"]
        for figure in ("effective_rank", "stable_rank"):
            assert len(line[figure]) == 7
            assert {role: tracked[f"train/{figure}/{role}", step] for role in line[figure]} == line[figure]
    assert json.loads(tracked["args", 0])["run_settings"]["spectra_every"] == 1
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_tensorboard(settings_for: Make, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(settings_for(steps=2, trackers=("tensorboard",)), tmp_path / "run", device="cpu")
    events: Any = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/rank_fraction")] == [1, 2]
    assert [event.step for event in events.Scalars("eval/loss")] == [0, 2]


def test_a_variable_of_the_tracker_wins(settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "tensorboardX.py").write_text(TENSORBOARD_X)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    train(settings_for(steps=1, trackers=("tensorboard",)), tmp_path / "run", device="cpu")
    assert list((tmp_path / "elsewhere").iterdir())
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "elsewhere")


def test_a_tracker_that_is_not_there(settings_for: Make, tmp_path: Path) -> None:
    missing = next(name for name in ("swanlab", "clearml", "comet_ml") if importlib.util.find_spec(name) is None)
    package = "comet-ml" if missing == "comet_ml" else missing
    with pytest.raises(UsageError, match=rf'tracker "{missing}" cannot be used: .*\nhint: pip install {package}$'):
        train(settings_for(trackers=(missing,), text="no/such/text"), tmp_path / "run", device="cpu")
    with pytest.raises(UsageError, match=r'unknown tracker "tensorbord"\nhint: did you mean "tensorboard"\?'):
        train(settings_for(trackers=("tensorbord",)), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
