"""`lowrank export`: the tables, the JSON, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.main import run
from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings


@pytest.fixture(scope="module")
def small(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, compressed."""
    output = tmp_path_factory.mktemp("models") / "small"
    compress(tiny_llama_folder, output, CompressSettings(keep=0.5, objective="plain"))
    return output


def test_dense(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", str(small), "--to", "dense", "-o", str(tmp_path / "dense"), "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split() == ["role", "matrices", "out", "x", "in", "rank"]
    assert lines[2].split() == ["q", "2", "32", "x", "32", "8"]
    ratio = Checkpoint.open(tmp_path / "dense").nbytes / Checkpoint.open(small).nbytes
    assert lines[-2].startswith(f"the files grow again, to {ratio:.2f} times the bytes: ")
    assert lines[-1].startswith(f"wrote {tmp_path / 'dense'}, weights of ")
    assert captured.err == ""


def test_adapters_as_json(
    small: Path, tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(small), "--to", "lora", "--base", str(tiny_llama_folder), "--rank", "2", "--device", "cpu"]
    assert run([*words, "-o", str(tmp_path / "json"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "json" / "export.json").read_text())
    assert (document["schema_version"], document["schema"]) == (1, "lowrank-export/1")
    assert document["settings"] == {
        **{"to": "lora", "base": str(tiny_llama_folder), "rank": 2, "dtype": "auto", "max_shard_bytes": 5_000_000_000}
    }
    assert run([*words, "-o", str(tmp_path / "text")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["role", "matrices", "out", "x", "in", "rank", "error"]
    errors = [row["relative_error"] for row in document["matrices"] if row["role"] == "q"]
    assert float(lines[2].split()[-1]) == pytest.approx(sum(errors) / 2, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SMALL"], "Missing option '--to'"),
        (["SMALL", "--to", "dnse"], 'no such kind of export "dnse"\nhint: did you mean "dense"?'),
        (["SMALL", "--to", "gguf"], 'no such kind of export "gguf"\nhint: choose from: '),
        (["./nosuch", "--to", "dense"], "no such model folder: ./nosuch\nhint: "),
        (["BASE", "--to", "dense"], "is dense already: any tool takes it as it is\nhint: to make it smaller: lowrank"),
        (["SMALL", "--to", "lora"], "--to lora needs the model that the adapters are for\nhint: --base"),
        (["SMALL", "--to", "dense", "--rank", "2"], "--rank is not for --to dense\nhint: leave it out, or --to lora"),
        (["SMALL", "--to", "dense", "-o", "BASE"], "is not empty"),
        (["SMALL", "--to", "dense", "--device", "cuda:99"], 'device "cuda:99"'),
        (["SMALL", "--to", "dense", "--max-shard-bytes", "0"], "--max-shard-bytes"),
        (["SMALL", "--to", "onnx", "--dtype", "bfloat16"], "has no products of bfloat16\nhint: --dtype float32"),
    ],
)
def test_wrong_usage(
    arguments: list[str],
    message: str,
    small: Path,
    tiny_llama_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = {"SMALL": str(small), "BASE": str(tiny_llama_folder)}
    # Later options win.
    command = ["export", "-o", str(tmp_path / "out"), *(words.get(word, word) for word in arguments)]
    assert run(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("error: ") == 1
    assert "this is a bug" not in captured.err
    assert not list(tmp_path.iterdir())
