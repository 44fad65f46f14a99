"""`lowrank compress`: the plan before, the bytes after, and every refusal with its exit code and hint."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from cli.main import run
from tests.families import build
from tests.pages import write_pages


@pytest.fixture
def pages(tmp_path: Path) -> str:
    return str(write_pages(tmp_path / "pages.jsonl", num_pages=30))


@pytest.fixture
def model(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may break."""
    return Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))


def command(model: Path | str, output: Path, *options: str) -> list[str]:
    return ["compress", str(model), "--block-tokens", "32", "--device", "cpu", "-o", str(output), *options]


def test_compress(model: Path, pages: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--keep", "0.5", "--objective", "whiten", "--text", pages]
    assert run(command(model, tmp_path / "out", *options)) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.split()[:1] and line[0] in "qkvogud"}
    # role, matrices, out x in, rank, dense, error
    assert rows["q"][:7] == ["q", "2", "32", "x", "32", "8", "0"]
    assert rows["up"][:7] == ["up", "2", "80", "x", "32", "11-12", "0"]
    assert 0 < float(rows["down"][7]) < 1
    report = json.loads((tmp_path / "out" / "compression.json").read_text())
    before, after = report["totals"]["bytes_before"], report["totals"]["bytes_after"]
    assert re.search(rf"files \(bytes\) +{before:,} +{after:,} +{100 * after / before:.1f}0 ", out)
    assert "14 of 14 matrices factorized" in out
    assert out.endswith(f"wrote {tmp_path / 'out'}\n")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_auto_chooses_says_why_and_tells_what_it_cost(
    model: Path, pages: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = ["--calibration-blocks", "16", "--check-blocks", "4", "--refine-blocks", "8", "--batch-size", "4"]
    options = ["--keep", "0.5", "--text", pages, *blocks, "--time", "1.5h"]
    assert run([*command(model, tmp_path / "out", *options), "-v"]) == 0
    told = capsys.readouterr()
    report = json.loads((tmp_path / "out" / "compression.json").read_text())
    chosen = report["settings"]
    assert "auto" not in (chosen["objective"], chosen["allocation"], chosen["refine"])
    assert (chosen["refine"], chosen["time"]) == ("both", 5400)
    assert report["choice"]["reasons"][0] in told.out
    assert "forecast: +" in told.err
    increase = report["check"]["loss_compressed"] - report["check"]["loss_dense"]
    assert f"compressed (+{increase:.3g})" in told.out or increase < 0
    assert report["forecast"]["from"] == "curvature of the loss"
    before, after = (report["refined"]["end to end"][key] for key in ("before", "after"))
    assert after <= before
    # The command that is told makes the same files.
    again = shlex.split(report["command"].replace("OUTPUT", str(tmp_path / "again")))
    assert run([*again[1:], "--device", "cpu"]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_a_dry_run_tells_time_tokens_and_a_forecast(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = ["--refine-blocks", "8", "--block-tokens", "32", "--e2e-epochs", "3"]
    assert run(["compress", str(model), "--keep", "0.5", "--refine", "e2e", *blocks, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"refine end to end +768 +about \d+ seconds", out)
    assert re.search(r"forecast: loss \+[\d.]+ nats per token, within a factor of [\d.]+, from singular values", out)
    assert "loss decides by the calibration text" in out


def test_pivoted(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--keep", "0.5", "--objective", "plain", "--form", "pivoted"]
    assert run(["compress", str(model), *options, "--dry-run"]) == 0
    assert sum(" pivoted " in line for line in capsys.readouterr().out.splitlines()) == 14
    assert run(command(model, tmp_path / "out", *options)) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2
    assert {entry["form"] for entry in config["matrices"].values()} == {"pivoted"}
    _, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values())


def test_json_is_one_document(model: Path, pages: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command(model, tmp_path / "out", "--keep", "0.5", "--text", pages, "--json", "--seed", "3")) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "out" / "compression.json").read_text())
    assert (document["schema_version"], document["settings"]["seed"]) == (1, 3)


@pytest.mark.parametrize("most", ["20000", "1000000"])
def test_a_dry_run_writes_nothing_and_tells_every_byte(
    model: Path, tmp_path: Path, most: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--keep", "0.4", "--objective", "plain", "--max-shard-bytes", most]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert run(["compress", str(model), *options, "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert run(["compress", str(model), *options, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert run(command(model, tmp_path / "out", *options)) == 0
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert planned["totals"]["bytes_after"] == written
    assert f"{written:,}" in text
    assert "\n14 of 14 matrices factorized\n" in text
    assert text.endswith("\nnothing written (--dry-run)\n")
    assert [row["rank"] for row in planned["matrices"]] == [
        row["rank"] for row in json.loads((tmp_path / "out" / "compression.json").read_text())["matrices"]
    ]


def test_the_plan_says_why_a_matrix_stays_dense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build("gpt_oss").save_pretrained(tmp_path / "model")
    assert run(["compress", str(tmp_path / "model"), "--keep", "0.95", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(bool(re.search(r"dense +1\.000 .* experts stored transposed$", line)) for line in lines) == 4
    assert "8 of 24 matrices factorized" in lines


@pytest.mark.parametrize(
    ("options", "words", "total"),
    [
        (["--size", "0.15MB"], "150,000 bytes of the model's files", "bytes_after"),
        (["--size", "146.6KiB", "--align", "4"], "150,118 bytes of the model's files", "bytes_after"),
        (["--params", "36k", "--allocation", "erank"], "36,000 numbers of the model", "model_numbers_after"),
        (["--params", "9e3", "--scope", "matrices"], "9,000 numbers of the matrices", "matrix_numbers_after"),
    ],
)
def test_budgets(
    options: list[str], words: str, total: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--objective", "plain", *options, "--json"]
    assert run(["compress", str(model), *options, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert run(command(model, tmp_path / "out", *options)) == 0
    totals = json.loads(capsys.readouterr().out)["totals"]
    assert planned["totals"] == totals
    assert totals["bytes_after"] == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    budget = int(words.split()[0].replace(",", ""))
    assert 0.98 * budget < totals[total] <= budget
    assert f"- budget: {words}\n" in (tmp_path / "out" / "README.md").read_text()


def test_targets_and_a_recipe(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text("params: 36000\nobjective: plain\nseed: 5\nkeeps: [{role: up, keep: 0.3}]\n")
    options = ["--recipe", str(tmp_path / "recipe.yaml"), "--keep", "0.5", "--exclude", "*.o_proj", "--json"]
    assert run(command(model, tmp_path / "out", *options)) == 0
    report = json.loads(capsys.readouterr().out)
    asked = report["settings"]
    assert (asked["keep"], asked["params"], asked["seed"], asked["objective"]) == (0.5, None, 5, "plain")
    why = {row["role"]: row["note"] for row in report["matrices"]}
    assert why == {**dict.fromkeys(("q", "k", "v", "gate", "up", "down"), ""), "o": "excluded"}
    assert all(0.25 < row["kept"] <= 0.3 for row in report["matrices"] if row["role"] == "up")
    assert "--exclude '*.o_proj' --recipe recipe.yaml" in report["command"]
    options = ["--keep", "0.9", "--objective", "plain", "--include", "*.up_proj", "--include", "lm_head", "--dry-run"]
    assert run(["compress", str(model), *options]) == 0
    out = capsys.readouterr().out
    assert "3 of 15 matrices factorized" in out
    assert sum(line.endswith("not included") for line in out.splitlines()) == 12


# Refusals


def nothing_made(tmp_path: Path, arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """Run; nothing may be made, nothing said on stdout, and one error with a hint on stderr, which is returned."""
    before = sorted(tmp_path.rglob("*"))
    assert run(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("error: ") == 1
    assert "\nhint: " in captured.err
    assert "this is a bug" not in captured.err
    assert sorted(tmp_path.rglob("*")) == before
    return captured.err


@pytest.mark.parametrize("keep", ["0", "-1", "1.5", "nan", "inf"])
def test_keep_outside_0_to_1(keep: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = nothing_made(tmp_path, command(model, tmp_path / "out", "--keep", keep), 2, capsys)
    assert f"error: keep must be in (0, 1], got {keep}: it is" in told
    assert "hint: --keep 0.6 keeps 60 % and removes 40 %" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "half"], "Invalid value for '--keep': 'half' is not a valid float"),
        ([], "error: no budget: a compression has exactly one budget, keep, params or size\nhint: --keep 0.6 keeps"),
        (["--keep", "0.5", "--params", "1M"], "error: keep and params: a compression has exactly one budget"),
        (["--size", "1.2QB"], "Invalid value for '--size': '1.2QB' is not an amount of bytes, such as 120MB or 1.2GiB"),
        (["--params", "MB"], "Invalid value for '--params': 'MB' is not an amount of numbers, such as 300M or 1.2B"),
        (["--size", "0"], "size must be at least 1, got 0"),
        (["--keep", "0.5", "--scope", "block"], "'block' is not one of 'matrices', 'model'"),
        (["--keep", "0.5", "--align", "0"], "align must be at least 1, got 0"),
        (["--keep", "0.5", "--objective", "whitten"], 'unknown objective "whitten"\nhint: did you mean "whiten"?'),
        (["--keep", "0.5", "--dtype", "fp8"], "'fp8' is not one of 'auto', 'float32', 'bfloat16', 'float16'"),
        (["--keep", "0.5", "--text", "no/such/text"], "no such text source: no/such/text\nhint: a text source is"),
        (["--keep", "0.5", "--block-tokens", "129", "--text", "PAGES"], "blocks of 129 tokens are longer"),
        (["--keep", "0.5", "--exclude", "*.o_prj"], 'the pattern "*.o_prj" matches none of 14 matrices'),
        (["--keep", "0.5", "--include", "model.embed_tokens"], "only the embeddings model.embed_tokens, which stay"),
        (["--keep", "0.5", "--recipe", "no/such.yaml"], "no such settings file: no/such.yaml"),
        (["--keep", "0.5", "--batch-size", "0"], "batch_size must be at least 1, got 0"),
    ],
)
def test_options_that_make_no_sense(
    options: list[str], message: str, model: Path, pages: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [pages if option == "PAGES" else option for option in options]
    assert message in nothing_made(tmp_path, command(model, tmp_path / "out", *options), 2, capsys)


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry-run"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "0.01"], r"the budget is 0.01 of the numbers of the matrices, and the smallest possible is 0.05"),
        (
            ["--params", "2k"],
            r"the budget is 2,000 numbers of the model, and the smallest possible is \d+,\d{3} numbers:",
        ),
        (
            ["--size", "9kB"],
            r"the budget is 9,000 bytes of the model's files, and the smallest possible is [\d,]+ bytes",
        ),
    ],
)
def test_a_budget_below_the_smallest_possible(
    options: list[str], message: str, dry: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = nothing_made(tmp_path, command(model, tmp_path / "out", *options, *dry), 3, capsys)
    assert re.search(message, told)
    hint = re.search(r"\nhint: (--\w+ \S+), or more\n", told)
    assert hint is not None
    assert run(["compress", str(model), *hint[1].split(), "--dry-run"]) == 0


def test_no_output(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = nothing_made(tmp_path, ["compress", str(model), "--keep", "0.5"], 2, capsys)
    assert told == "error: no output folder\nhint: -o DIR, or --dry-run for the plan alone\n"


def test_an_output_that_is_not_empty(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = nothing_made(tmp_path, command(model, model, "--keep", "0.5"), 2, capsys)
    assert re.search(r"output folder .*model is not empty \(5 entries\)", told)


@pytest.mark.parametrize("name", ["no/such/model", "nosuchmodel", "./nosuch"])
def test_no_such_model(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = nothing_made(tmp_path, command(name, tmp_path / "out", "--keep", "0.5"), 2, capsys)
    assert "error: no such model folder" in told
    assert name in told


def test_a_folder_without_safetensors(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    told = nothing_made(tmp_path, command(model, tmp_path / "out", "--keep", "0.5"), 2, capsys)
    assert "no model.safetensors and no model.safetensors.index.json in this folder" in told
    assert "hint: pytorch_model.bin is a pickle; convert it once: python -c" in told


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry-run"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"\xff" * 8 + data[8:]], ids=["short", "header"]
)
def test_a_broken_shard(
    damage: Callable[[bytes], bytes], dry: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = model / "model.safetensors"
    shard.write_bytes(damage(shard.read_bytes()))
    told = nothing_made(tmp_path, command(model, tmp_path / "out", "--keep", "0.5", *dry), 1, capsys)
    assert str(shard) in told


def change(folder: Path, name: str, make: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = make(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_nan_in_a_matrix(model: Path, pages: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    change(model, name, lambda W: W.index_fill(0, W.new_tensor([2]).long(), math.nan))
    told = nothing_made(tmp_path, command(model, tmp_path / "out", "--keep", "0.5", "--text", pages), 1, capsys)
    assert f"NaN or Inf in {name}: 32 of 512 numbers" in told


def test_inf_in_an_activation(model: Path, pages: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for role in ("gate", "up"):
        change(model, f"model.layers.0.mlp.{role}_proj.weight", lambda W: W * 1e30)
    told = nothing_made(tmp_path, command(model, tmp_path / "out", "--keep", "0.5", "--text", pages), 1, capsys)
    assert "NaN or Inf in the output of model.layers.0: " in told
    assert "hint: try --dtype float32" in told


def test_text_shorter_than_a_block(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("The gate was open.\nThe wheel stood still.\n")
    options = ["--keep", "0.5", "--text", str(tmp_path / "short.txt")]
    told = nothing_made(tmp_path, command(model, tmp_path / "out", *options), 2, capsys)
    assert "tokens, fewer than one block of 32" in told


def test_an_architecture_without_matrices(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llama(num_hidden_layers=0).save_pretrained(tmp_path / "model")
    told = nothing_made(tmp_path, command(tmp_path / "model", tmp_path / "out", "--keep", "0.5"), 2, capsys)
    assert "no matrix found in LlamaForCausalLM" in told


def test_compressed_already(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command(model, tmp_path / "once", "--keep", "0.5", "--objective", "plain")) == 0
    capsys.readouterr()
    told = nothing_made(tmp_path, command(tmp_path / "once", tmp_path / "twice", "--keep", "0.5"), 2, capsys)
    assert "is compressed already (quantization_config of method lowrank)\nhint: compress the dense model" in told
