"""`lowrank scale`: the table, the check, their documents and files, and every refusal with its exit code and hint."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest

from cli.main import run
from cli.scale import command
from lowrank_kit.scaling.mup import MuP

TABLE = ("scale", "table", "--base", "1m", "--target", "5m")
# A Llama of width 16 in blocks of heads of 8; small enough for a whole check in seconds.
SHAPE = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@pytest.fixture
def check(tmp_path: Path) -> list[str]:
    """`lowrank scale check` of two widths and two depths."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    options = ["--widths", "32,128", "--depths", "2,8", "--steps", "5", "--text", argparse.__file__]
    return ["scale", "check", "--model-config", str(tmp_path / "config.json"), *options]


def rows_of(text: str) -> dict[str, dict[str, str]]:
    """Role -> heading -> cell, of the first row of each role."""
    lines = [re.split(r" {2,}", line.strip()) for line in text.splitlines()]
    names = next(cells for cells in lines if cells[0] == "role")
    found: dict[str, dict[str, str]] = {}
    for cells in lines[lines.index(names) + 2 :]:
        if len(cells) == len(names):
            found.setdefault(cells[0], dict(zip(names, cells, strict=True)))
    return found


def test_the_table_has_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*TABLE, "--optimizer", "muon"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("5m for settings of 1m: width x 2, depth x 1.2\n")
    rows = rows_of(text)
    assert list(rows)[:8] == ["embedding", "q", "k", "v", "o", "gate", "up", "down"]
    q, down, embedding = rows["q"], rows["down"], rows["embedding"]
    assert (q["optimizer"], q["count"], q["fan-in x"], q["fold"]) == ("muon", "6", "2.000", "1.000")
    assert (q["std x"], q["lr x"], q["weight decay x"], q["eps x"]) == ("0.707", "0.707", "1.414", "-")
    assert (down["fold"], down["lr x"]) == ("0.833", "0.589")
    assert (embedding["optimizer"], embedding["lr x"], embedding["eps x"]) == ("adamw", "1.000", "0.500")
    assert rows["gain"]["weight decay x"] == "-"


def test_the_table_has_values_for_what_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--lr", "0.01", "--adamw-lr", "0.002", "--weight-decay", "0.1", "--json"]
    assert run([*TABLE, *given]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema_version"], document["width_ratio"], document["depth_ratio"]) == (1, 2.0, 1.2)
    rows: dict[str, dict[str, Any]] = {row["role"]: row for row in reversed(document["rows"])}
    assert rows["q"]["lr"] == pytest.approx(0.01 / 2**0.5)
    assert rows["q"]["weight decay"] == pytest.approx(0.1 * 2**0.5)
    assert rows["embedding"]["lr"] == pytest.approx(0.002)
    assert rows["embedding"]["eps"] == pytest.approx(0.5)  # not given: the ratio
    assert rows["gain"]["weight decay"] is None
    assert run([*TABLE, "--lr", "0.01", "--json"]) == 0
    rows = {row["role"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["embedding"]["lr"] == pytest.approx(0.01)  # --adamw-lr left out


def test_the_table_of_another_depth_rule_and_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, blocks in (("base", 2), ("target", 8)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": blocks}))
    models = ["--base", str(tmp_path / "base"), "--target", str(tmp_path / "target" / "config.json")]
    folds = {}
    for rule in ("k2", "k1", "none"):
        assert run(["scale", "table", *models, "--depth-rule", rule, "--json"]) == 0
        rows = {row["role"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
        folds[rule] = rows["down"]["fold"]
    assert folds == {"k2": 0.25, "k1": 0.5, "none": 1.0}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target", "15m"], "head dimension: 32 and 64"),
        (["--base", "5m", "--target", "1m"], "more than the target"),
        (["--target", "6m"], 'no model config "6m"'),
        (["--optimizer", "sophia"], '"sophia" is, is not known'),
        (["--depth-rule", "k3"], 'unknown depth rule "k3"'),
    ],
)
def test_what_no_table_can_be_made_of(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*TABLE, *options]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert "hint: " in captured.err
    assert captured.out == ""


def test_a_check_that_passes(check: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*check, "-o", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert "spectral check: PASS" in captured.out
    assert "coordinate check: PASS" in captured.out
    assert captured.out.endswith(f"wrote {tmp_path / 'out'}\n")
    assert "k2, seed 0, width 128, depth 2" in captured.err
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "check.csv",
        "check.json",
        "coordinate.png",
        "spectral.png",
    ]
    document = json.loads((tmp_path / "out" / "check.json").read_text())
    assert document["passed"]
    assert document["checks"]["spectral"]["seen"]
    assert document["settings"]["widths"] == [32, 128]
    assert run([*check, "-o", str(tmp_path / "out")]) == 2  # before any training: the folder is not empty


def test_a_check_that_fails_says_where_and_still_writes(
    check: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MuP, "scaled", lambda self, groups: list(groups))
    assert run([*check, "-q", "--json", "-o", str(tmp_path / "out")]) == 4
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert not document["passed"]
    assert "FAIL" in document["checks"]["spectral"]["verdict"]
    assert "dW" in document["checks"]["spectral"]["verdict"]
    assert captured.err.splitlines()[0].startswith("error: the spectral")
    assert not json.loads((tmp_path / "out" / "check.json").read_text())["passed"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--widths", "32", "--depths", "4"], "has no slope"),
        (["--widths", "32,wide"], "not a list of whole numbers"),
        (["--widths", "36,64"], "no llama of width 36"),
        (["--optimizer", "lion"], 'no optimizer "lion"'),
        (["--depth-rule", "k3"], 'unknown scaling "k3"'),
        (["--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_what_cannot_be_checked(
    options: list[str], words: str, check: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*check, *options]) == 2
    assert words in capsys.readouterr().err


def test_widths_left_out_are_those_of_the_shape(check: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    place = check.index("--widths")
    assert run([*check[:place], *check[place + 2 :], "--depths", "1", "--steps", "1"]) in (0, 4)  # one step: noise
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("k2")]
    assert told == [f"k2, seed 0, width {width}, depth 1" for width in (32, 64, 128)]


def test_debug_is_an_option_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    for name in command.commands:
        assert run(["scale", name, "--help"]) == 0
        assert "--debug" in capsys.readouterr().out
