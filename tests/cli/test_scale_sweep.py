"""`lowrank scale sweep`: a real sweep of two sizes, gone on with, refused, and failed."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from cli.main import run
from cli.scale_sweep import RESULTS

BASE = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """Of a sweep that takes seconds, but for the rates."""
    (tmp_path / "base.json").write_text(json.dumps(BASE))
    text = "".join(f"line {i} of a text with {i * i} words and {i % 7} verbs\n" for i in range(400))
    (tmp_path / "text.txt").write_text(text)
    small = ["--steps", "3", "--batch-size", "2", "--block-tokens", "8", "--vocab-size", "260", "--seeds", "1"]
    files = ["--model-config", str(tmp_path / "base.json"), "--text", str(tmp_path / "text.txt")]
    return ["scale", "sweep", *files, *small, "--optimizer", "adamw", "--device", "cpu", "-o", str(tmp_path / "out")]


def test_a_sweep_is_told_and_written_and_goes_on(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*options, "--lrs", "-8:-5", "--widths", "32", "--control-seeds", "0"]
    code = run([*given, "--json"])
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert code == (0 if document["passed"] else 4)
    assert [(row["width"], row["rule"]) for row in document["rows"]] == [(16, "mup"), (32, "mup")]
    out = tmp_path / "out"
    assert (out / "sweep.png").read_bytes().startswith(PNG)
    with (out / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["width"], row["log2_lr"]) for row in rows[3:6]] == [("16", "-5.0"), ("32", "-8.0"), ("32", "-7.0")]
    assert 4 < float(rows[0]["loss"]) < 7
    before = json.loads((out / RESULTS).read_text())["cells"]

    assert run(given) == 2
    assert "not empty" in capsys.readouterr().err
    assert run([*given[:-2], "--depths", "2", "--resume"]) in (0, 4)
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0].split()[:4] == ["axis", "rule", "width", "depth"]
    assert "log2 lr: of the least loss, by a parabola" in captured.out
    after = json.loads((out / RESULTS).read_text())["cells"]
    assert after[:2] == before
    assert [(cell["width"], cell["depth"], cell["rule"]) for cell in after[2:]] == [
        (16, 2, "mup"),
        (16, 2, "k1"),
        (32, 1, "sp"),
        (16, 2, "sp"),
    ]
    assert run([*given, "--resume", "--steps", "4"]) == 2
    assert "steps: 3 -> 4" in capsys.readouterr().err


def test_a_rate_that_is_not_found_fails(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """All rates are far too low, so the highest is best."""
    assert run([*options, "--lrs", "-20:-16:2", "--depths", "2", "--control-seeds", "0"]) == 4
    captured = capsys.readouterr()
    assert "FAIL" in captured.out
    assert "16 x 1 is best at the end of the grid, log2 lr -16: give further rates" in captured.err


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--widths", "16"], "no size but the base"),
        (["--widths", "20"], "of width 20 has the shape"),
        (["--widths", "a,b"], "not a list of whole numbers"),
        (["--widths", "32", "--lrs", "-4"], "no range of log2"),
        (["--widths", "32", "--lrs", "-4:-8"], "at least three learning rates"),
        (["--widths", "32", "--optimizer", "adam"], 'no optimizer "adam"'),
        (["--widths", "32", "--resume"], "nothing to resume"),
    ],
)
def test_bad_input(options: list[str], given: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*options, *given]) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.out == ""
