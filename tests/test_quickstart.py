"""The quickstart, small enough for a test: every model, score and picture is there and belongs together."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from cli.main import run
from lowrank_kit import quickstart as module
from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.errors import UsageError
from lowrank_kit.quickstart import KEEPS, OPTIMIZERS, SIZES, quickstart
from tests.process import same_process


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny size with two steps and a handful of sequences."""
    least = replace(SIZES["tiny"], steps=2, calibration_blocks=8, eval_blocks=8, questions=4, max_bytes=300_000)
    monkeypatch.setitem(module.SIZES, "tiny", least)


@pytest.mark.usefixtures("small_steps")
def test_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "quickstart"
    with same_process():
        assert run(["quickstart", "--size", "tiny", "-o", str(output), "--json", "-q"]) == 0
    printed = json.loads(capsys.readouterr().out)
    document = json.loads((output / "results.json").read_text())
    assert printed == document
    rows = document["models"]
    assert [(row["optimizer"], row["keep"]) for row in rows] == [
        (optimizer, keep) for optimizer in OPTIMIZERS for keep in (None, *KEEPS)
    ]
    for row in rows:
        folder = output / (row["optimizer"] if row["keep"] is None else f"{row['optimizer']}-keep-{row['keep']:g}")
        stored = Checkpoint.open(folder)
        assert row["bytes"] == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        assert any(matrix.compressed for matrix in stored.matrices()) == (row["keep"] is not None)
        assert 1 < row["perplexity"] < 1000
        assert 0 <= row["accuracy"] <= 1
    # All were scored on the same tokens, and fewer numbers are kept each time.
    assert len({(row["sha256"], row["tokens"]) for row in rows}) == 1
    for start in range(0, len(rows), len(KEEPS) + 1):
        sizes = [row["parameters"] for row in rows[start : start + len(KEEPS) + 1]]
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(sizes)) == len(sizes)
    with (output / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    readme = (output / "README.md").read_text()
    for picture in ("perplexity.png", "spectra.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
        assert picture in readme


def test_an_unknown_size(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='unknown size "smal"') as caught:
        quickstart(tmp_path / "out", size="smal")
    assert "small" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with same_process():
        assert run(["quickstart", "-o", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
