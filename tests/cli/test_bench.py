"""`lowrank bench`: the table, the JSON, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

from cli.bench import bench_text
from cli.main import run
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings

FEW = ["--prompt", "8", "--new-tokens", "4", "--batch", "1,3", "--rounds", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def compressed(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("models") / "half-of-it-pivoted-with-a-long-name"
    compress(tiny_llama_folder, output, CompressSettings(keep=0.5, objective="plain", form="pivoted"))
    return output


def test_table_json_and_file(
    tiny_llama_folder: Path, compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "bench.json"
    command = ["bench", str(tiny_llama_folder), str(compressed), *FEW, "-o", str(file)]
    assert run([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(file.read_text())
    assert (document["schema_version"], document["schema"]) == (1, "lowrank-bench/1")
    assert document["settings"] == {
        **{"prompt": 8, "new_tokens": 4, "batches": [1, 3], "compile": False, "fuse": True, "rounds": 2, "warmup": 1},
        **{"threads": None, "seed": 0, "device": "cpu", "dtype": "auto"},
    }
    assert document["environment"]["torch"]
    assert document["environment"]["torch threads"] == str(torch.get_num_threads())
    assert [len(row["decode"]["seconds"]) for row in document["rows"]] == [2] * 4

    lines = bench_text(document).splitlines()
    assert max(map(len, lines[:6])) <= 120
    assert lines[0].split() == [
        *("model", "batch", "mode", "prefill/s", "speed", "decode/s", "speed", "FLOPs", "bytes", "memory")
    ]
    assert [line.split()[:3] for line in lines[2:6]] == [
        *(["tiny-llama", "1", "eager"], ["…ith-a-long-name", "1", "eager"]),
        *(["tiny-llama", "3", "eager"], ["…ith-a-long-name", "3", "eager"]),
    ]
    assert "1.00 (1.00-1.00)" in lines[2]
    ratio = document["rows"][1]["decode"]["ratio"]
    assert f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})" in lines[3]
    assert run([*command[:-2], "--batch", "1"]) == 0
    assert "prompts of 8 tokens, 4 new ones; 2 rounds on cpu" in capsys.readouterr().out


def test_what_was_not_measured_is_told(
    tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowrank_kit.evaluation.bench.pass_bytes", lambda model, batch, *_: 10**15 * (batch > 1))
    assert run(["bench", str(tiny_llama_folder), *FEW]) == 0
    told = capsys.readouterr().out
    assert "\ntiny-llama, batch 3, eager: does not fit: about 1.00 PB beside the weights, " in told
    assert told.splitlines()[3].split()[3:7] == ["-", "-", "-", "-"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'MODEL...'"),
        (["MODEL", "./nosuch"], "no such model folder: ./nosuch\nhint: "),
        (["MODEL", "--prompt", "126"], "126 tokens and 4 new ones are more than the 128 positions of"),
        (["MODEL", "--batch", "1,x"], "'1,x' is not a list of whole numbers"),
        (["MODEL", "--batch", "4,0"], '"4,0" is no list of different batch sizes of 1 and more\nhint: --batch'),
        (["MODEL", "--batch", "4,4"], '"4,4" is no list of different batch sizes'),
        (["MODEL", "--new-tokens", "1"], "Invalid value for '--new-tokens'"),
        (["MODEL", "--device", "cuda:99"], 'device "cuda:99"'),
        (["MODEL", "-o", "FOLDER"], "is a folder, a file is wanted\nhint: -o"),
    ],
)
def test_wrong_usage(
    arguments: list[str], message: str, tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"MODEL": str(tiny_llama_folder), "FOLDER": str(tmp_path)}
    assert message in refusal(capsys, *(words.get(word, word) for word in arguments))


def test_models_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=8, d_ff=8, num_layers=1, num_heads=1)).save_pretrained(
        tmp_path / "t5"
    )
    assert "no causal language model can be built from it" in refusal(capsys, str(tmp_path / "t5"))
    MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1)).save_pretrained(
        tmp_path / "mamba"
    )
    assert "MambaForCausalLM has no cache of keys and values" in refusal(capsys, str(tmp_path / "mamba"))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    # Later options win.
    assert run(["bench", *FEW, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("error: ") == 1
    assert "this is a bug" not in captured.err
    return captured.err
