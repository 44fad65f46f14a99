"""`lowrank analyze`: the table, the document, the files, and every refusal with its exit code and hint."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from cli.main import run
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from tests.cli.test_compress_bad_input import files_of_at_most
from tests.families import build

GATE = "model.layers.1.mlp.gate_proj"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def model(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may break."""
    return Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))


@pytest.fixture
def other(tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> Path:
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def singular_values(folder: Path, matrix: str) -> np.ndarray:
    W = load_file(folder / "model.safetensors")[f"{matrix}.weight"]
    return np.linalg.svd(W.double().numpy(), compute_uv=False)


def effective_rank(folder: Path, matrix: str) -> float:
    s = singular_values(folder, matrix)
    p = s / s.sum()
    return math.exp(-(p * np.log(p)).sum())


def test_the_table_has_a_row_for_each_role(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["analyze", str(model)]) == 0
    captured = capsys.readouterr()
    heading, _, *lines = captured.out.splitlines()
    assert heading.split()[:4] == ["role", "matrices", "stable", "effective"]
    rows = {line.split()[0]: line.split() for line in lines[:8]}
    assert list(rows) == ["q", "k", "v", "o", "gate", "up", "down", "all"]
    mean = np.mean([effective_rank(model, f"model.layers.{block}.mlp.gate_proj") / 32 for block in (0, 1)])
    assert rows["gate"][1] == "2"
    assert float(rows["gate"][3]) == pytest.approx(mean, abs=5.1e-4)  # three decimals
    assert rows["all"][1] == "14"
    assert "%" not in captured.err  # no progress bar where nobody watches


def test_all_has_a_row_for_each_matrix(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["analyze", str(model), "--all"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2 + 14
    row = next(line for line in lines if line[0] == GATE)
    assert row[1:4] == ["gate", "80", "32"]
    assert float(row[5]) == pytest.approx(effective_rank(model, GATE), abs=0.0051)
    assert float(row[10]) == pytest.approx(effective_rank(model, GATE) / 32, abs=5.1e-4)


def test_json_is_one_document(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["analyze", str(model), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema_version"] == 1
    (found,) = document["models"]
    assert (found["name"], found["model"]) == ("model", str(model))
    assert [role["role"] for role in found["roles"]] == ["q", "k", "v", "o", "gate", "up", "down"]
    assert found["overall"]["num_matrices"] == len(found["matrices"]) == 14
    gate = next(matrix for matrix in found["matrices"] if matrix["name"] == GATE)
    assert gate["effective_rank"] == pytest.approx(effective_rank(model, GATE), rel=1e-12)
    assert (gate["out"], gate["in"], gate["block"], gate["factor_rank"]) == (80, 32, 1, None)


def test_files(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out"
    assert run(["analyze", str(model), "-o", str(out)]) == 0
    assert capsys.readouterr().out.endswith(f"wrote {out}\n")
    assert sorted(os.listdir(out)) == ["decay.png", "heatmap.png", "spectra.csv", "spectra.json"]
    assert all((out / name).read_bytes().startswith(PNG) for name in ("decay.png", "heatmap.png"))
    document = json.loads((out / "spectra.json").read_text())
    values = document["singular_values"]["model"][GATE]
    np.testing.assert_allclose(values, singular_values(model, GATE), rtol=1e-12)
    with (out / "spectra.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["name"] for row in rows] == [matrix["name"] for matrix in document["models"][0]["matrices"]]
    gate = next(row for row in rows if row["name"] == GATE)
    assert float(gate["effective_rank_share"]) == pytest.approx(effective_rank(model, GATE) / 32, rel=1e-12)


def test_two_models_side_by_side(model: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(["analyze", str(model), "--against", str(other), "-o", str(out)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines[2:6]] == [["q", "model"], ["q", "other"], ["k", "model"], ["k", "other"]]
    pictures = {f"{kind}{suffix}.png" for kind in ("decay", "heatmap") for suffix in ("", "-1", "-2")}
    assert set(os.listdir(out)) == pictures | {"spectra.csv", "spectra.json"}
    assert len({(out / name).read_bytes() for name in pictures}) == 6
    document = json.loads((out / "spectra.json").read_text())
    for folder in (model, other):
        values = document["singular_values"][folder.name][GATE]
        np.testing.assert_allclose(values, singular_values(folder, GATE), rtol=1e-12)


def test_folders_of_the_same_name_are_told_apart(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = shutil.copytree(model, tmp_path / "twin" / "model")
    assert run(["analyze", str(model), "--against", str(twin), "--json"]) == 0
    names = [found["name"] for found in json.loads(capsys.readouterr().out)["models"]]
    assert names == [str(model), str(twin)]


def test_the_folder_one_stands_in_has_a_name(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(model)
    assert run(["analyze", ".", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["name"] == "model"


def test_a_compressed_model_against_its_source(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Truncation keeps the first r singular values as they are; float32 factors, hence the tolerance."""
    compress(model, tmp_path / "small", CompressSettings(keep=0.5, objective="plain"))
    capsys.readouterr()
    assert run(["analyze", str(model), "--against", str(tmp_path / "small"), "--json"]) == 0
    dense, compressed = json.loads(capsys.readouterr().out)["models"]
    for before, after in zip(dense["matrices"], compressed["matrices"], strict=True):
        assert (before["factor_rank"], after["name"]) == (None, before["name"])
        kept = singular_values(model, before["name"])[: after["factor_rank"]]
        assert after["frobenius"] == pytest.approx(np.linalg.norm(kept), rel=1e-5)
        assert after["stable_rank"] == pytest.approx((kept**2).sum() / kept[0] ** 2, rel=1e-5)
        assert after["effective_rank"] < before["effective_rank"]


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, *words: str) -> None:
    assert run(["analyze", *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    error, hint = captured.err[captured.err.index("error: ") :].split("\nhint: ")
    assert all(word in error for word in words), error
    assert hint.strip()


def test_no_such_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, [str(tmp_path / "nothing")], 2, "no such model folder", "nothing")


def test_a_folder_without_safetensors(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "model.safetensors").unlink()
    refused(capsys, [str(model)], 2, "no model.safetensors", str(model))


def test_a_truncated_shard(
    model: Path, tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    whole = shutil.copytree(tiny_llama_folder, tmp_path / "whole")
    for models in ([str(model)], [str(whole), "--against", str(model)]):
        refused(capsys, [*models, "-o", str(tmp_path / "out")], 1, str(path), str(path.stat().st_size))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite(
    model: Path, tmp_path: Path, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[f"{GATE}.weight"][3, 4] = value
    save_file(tensors, model / "model.safetensors")
    before = sorted(os.listdir(tmp_path))
    refused(capsys, [str(model), "-o", str(tmp_path / "out")], 1, GATE, "NaN", "Inf")
    assert sorted(os.listdir(tmp_path)) == before


def test_a_folder_that_is_not_empty_is_left_alone(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    (model / "model.safetensors").unlink()  # refused before the model is looked at
    refused(capsys, [str(model), "-o", str(tmp_path / "out")], 2, "not empty", "1 entries")
    assert os.listdir(tmp_path / "out") == ["mine"]


def test_a_full_disk(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is left of the spectra, nor of a report of them; with room again both are made."""
    spectra, page = tmp_path / "spectra", tmp_path / "page.html"
    for command, output in ((["analyze", str(model)], spectra), (["report", str(spectra)], page)):
        capsys.readouterr()
        with files_of_at_most(2000):
            assert run([*command, "-o", str(output), "-q"]) == 1
        told = capsys.readouterr().err
        assert re.search(r"^error: .*File too large: it takes [\d,]+ bytes, [\d,]+ are free\nhint: ", told), told
        assert not [path for path in tmp_path.iterdir() if output.name in path.name]
        assert run([*command, "-o", str(output), "-q"]) == 0


def test_models_that_cannot_be_compared(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build("llama").save_pretrained(tmp_path / "other")
    refused(capsys, [str(model), "--against", str(tmp_path / "other")], 2, "80 x 32", "48 x 32", "gate_proj")
    (tmp_path / "link").symlink_to(model)
    refused(capsys, [str(model), "--against", str(tmp_path / "link")], 2, "same model")
