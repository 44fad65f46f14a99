"""Runs on several processes: the same as on one, whole or sharded, and resumed on any number of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lowrank_kit.errors import UsageError
from lowrank_kit.training.processes import batch_per_process, check_launch, unchanged_environment
from lowrank_kit.training.sharding import check_can_shard
from tests.pages import write_pages
from tests.training.launch import Run, errors_of, launch_all

MODEL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs, which are made by one launch."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.json").write_text(json.dumps(MODEL))
    (folder / "base.json").write_text(json.dumps(MODEL | {"num_hidden_layers": 1, "intermediate_size": 20}))
    write_pages(folder / "pages.jsonl")
    # Answers of one to eleven words: what each process has is no half of the answer tokens of a step.
    talk = [{"prompt": f"{i}?", "completion": " ".join(["mill"] * (1 + i * 7 % 11))} for i in range(80)]
    (folder / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talk))
    write_pages(folder / "pages-0.jsonl")
    write_pages(folder / "pages-1.jsonl", num_words=39)
    # Five validation blocks divide over no two processes; an epoch ends within the run, after 67 blocks.
    base = {"model_config": str(folder / "tiny.json"), "text": str(folder / "pages.jsonl"), "vocab_size": 300}
    base |= {"steps": 6, "batch_size": 8, "accumulate": 2, "block_tokens": 32, "max_bytes": 6000, "eval_blocks": 5}
    base |= {"log_every": 1, "lr": 1e-2, "save_every": 2, "eval_every": 3, "keep_checkpoints": 1}

    def run(name: str, processes: int = 1, *, of: str | None = None, **changes: Any) -> Run:
        plan = {key: changes.pop(key) for key in ("stop", "signal", "after") if key in changes}
        start = None if of is None else str(folder / of)
        output = str(folder / name)
        return Run(output, base | changes, processes, resume=of is not None, copy_of=start, **plan)

    # Rounding is not grown by AdamW, which makes a sign of what is nearly zero.
    talking: dict[str, Any] = {"text": str(folder / "talk.jsonl"), "max_bytes": None, "optimizer": "sgd"}
    talking["adamw_lr"] = 1e-4
    runs = [
        run("one"),
        run("ddp", 2),
        run("half-of-two", 2, stop=3),
        run("two-two", 2, of="half-of-two"),
        run("half-of-one", 1, stop=3),
        run("one-two", 2, of="half-of-one"),
        run("shards", 2, fsdp=True),
        run("half-of-shards", 2, stop=3, fsdp=True),
        run("shards-shards", 2, of="half-of-shards", fsdp=True),
        run("shards-one", 1, of="half-of-shards"),
        run("hsdp", 4, of="half-of-one", fsdp=True, replicas=2),
        run("answers", **talking),
        run("answers-ddp", 2, **talking),
        run("lora", model=str(folder / "one"), model_config=None, lora=2),
        run("lora-ddp", 2, model=str(folder / "one"), model_config=None, lora=2),
        run("scaled", mup_base=str(folder / "base.json")),
        run("scaled-ddp", 2, mup_base=str(folder / "base.json")),
        run("scaled-shards", 2, mup_base=str(folder / "base.json"), fsdp=True),
        run("other-text", 2, text=str(folder / "pages-RANK.jsonl")),
        run("short-text", 2, max_bytes=1200, batch_size=64),
        run("terminated", 2, signal=signal.SIGTERM, after=3),
    ]
    launch_all(runs, folder / "plan.json")
    return folder


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def largest_difference(one: Path, other: Path, key: str) -> float:
    lines = list(zip(log_of(one), log_of(other), strict=True))
    assert [line["step"] for line, _ in lines] == [line["step"] for _, line in lines]
    found = [abs(line[key] - again[key]) for line, again in lines if key in line]
    assert len(found) == (3 if key == "validation_loss" else 6)
    return max(found)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("one", "ddp"),
        ("one", "one-two"),
        ("one", "shards"),
        ("one", "shards-one"),
        ("one", "hsdp"),
        ("answers", "answers-ddp"),
        ("lora", "lora-ddp"),
        ("scaled", "scaled-ddp"),
        ("scaled", "scaled-shards"),
    ],
)
def test_a_run_is_the_same_on_any_processes(one: str, other: str, folder: Path) -> None:
    for key in ("loss", "validation_loss", "grad_norm"):
        assert largest_difference(folder / one, folder / other, key) < 1e-5
    before, after = (load_file(folder / name / "model.safetensors") for name in (one, other))
    # Tied embeddings once, and under the names of a model that was never sharded.
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-4)
    assert (folder / one / "config.json").read_text() == (folder / other / "config.json").read_text()


@pytest.mark.parametrize(("whole", "resumed"), [("ddp", "two-two"), ("shards", "shards-shards")])
def test_resumed_on_as_many_processes_bit_for_bit(whole: str, resumed: str, folder: Path) -> None:
    before, after = (load_file(folder / name / "model.safetensors") for name in (whole, resumed))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert largest_difference(folder / whole, folder / resumed, "loss") == 0


def test_what_is_written_and_by_whom(folder: Path) -> None:
    for name in ("ddp", "shards"):
        checkpoint = folder / name / "checkpoints" / "checkpoint-4"
        assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]
        manifest = json.loads((checkpoint / "checkpoint.json").read_text())
        assert manifest["processes"] == 2
        # Each process writes a part of about the same size, and there is no pickle.
        parts = [size for file, size in manifest["files"].items() if file.endswith(".safetensors")]
        assert len(parts) == 2
        assert max(parts) < 1.5 * min(parts)
        assert {Path(file).suffix for file in manifest["files"]} == {".safetensors", ".json"}
    record = json.loads((folder / "hsdp" / "run.json").read_text())
    assert (record["finished"], record["settings"]["replicas"]) == (True, 2)
    assert json.loads((folder / "shards-one" / "run.json").read_text())["settings"]["fsdp"] is False


def test_sigterm_to_one_process_stops_all_with_a_checkpoint(folder: Path) -> None:
    assert errors_of(folder / "terminated") == ["Terminated: ", "Terminated: "]
    assert log_of(folder / "terminated")[-1]["step"] == 3
    assert [path.name for path in (folder / "terminated" / "checkpoints").iterdir()] == ["checkpoint-3"]
    assert not (folder / "terminated" / "model.safetensors").exists()


def test_processes_that_read_other_text(folder: Path) -> None:
    told = errors_of(folder / "other-text")
    assert len(told) == 2
    for line in told:
        assert re.match(r"LowRankError: process 1 has another text than process 0: \w{12} instead of \w{12}\n", line)


def test_text_shorter_than_a_batch(folder: Path) -> None:
    for line in errors_of(folder / "short-text"):
        assert re.match(r"UsageError: the text has \d+ sequences of 32 tokens, fewer than a batch of 64\n", line)
    assert len(errors_of(folder / "short-text")) == 2
    assert not (folder / "short-text").exists()


def test_the_command_under_torchrun(folder: Path, tmp_path: Path) -> None:
    command = ["train", "--model-config", str(folder / "tiny.json"), "--text", str(folder / "pages.jsonl")]
    command += ["--vocab-size", "300", "--steps", "2", "--batch-size", "4", "--block-tokens", "32", "--log-every", "1"]
    command += ["--eval-blocks", "4", "--optimizer", "adamw", "--device", "cpu", "-o", str(tmp_path / "run"), "--json"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "cli.main", *command],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # One document, though there are two processes; and the table of what steps what is told once.
    assert json.loads(done.stdout)["finished"]
    assert done.stderr.count("what steps what") == 1
    assert [line["step"] for line in log_of(tmp_path / "run")] == [0, 1, 2, 2]


# Launches that are refused


@pytest.mark.parametrize(
    ("environment", "placement", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, r"DeepSpeed cuts .* no matrices.*\nhint: shard with FSDP2 \(--fsdp"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "Megatron-LM cuts"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, r"FSDP1 flattens .*\nhint: FSDP2: .* --fsdp_version 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, {}, "FSDP1 flattens"),
        ({"WORLD_SIZE": "1"}, {"fsdp": True}, r"over processes, and there is one\nhint: torchrun --nproc-per-node 2"),
        ({"WORLD_SIZE": "4"}, {"replicas": 2}, "DDP has a replica in every process\nhint: add --fsdp"),
        ({"WORLD_SIZE": "2"}, {"fsdp": True, "replicas": 2}, "4 or more; there are 2\nhint: leave out --fsdp"),
        ({"WORLD_SIZE": "6"}, {"fsdp": True, "replicas": 4}, "8 or more; there are 6\nhint: --replicas 3"),
    ],
)
def test_refused_launches(
    environment: dict[str, str], placement: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        check_launch(**({"fsdp": False, "replicas": 1} | placement))


@pytest.mark.parametrize(("processes", "fsdp", "replicas"), [(1, False, 1), (2, True, 1), (4, True, 2), (6, True, 3)])
def test_good_launches(processes: int, fsdp: bool, replicas: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_launch(fsdp=fsdp, replicas=replicas)


def test_what_libraries_leave_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_VERSION", "2")
    with unchanged_environment():
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "1")
    assert "ACCELERATE_USE_FSDP" not in os.environ
    assert os.environ["FSDP_VERSION"] == "2"


def test_a_batch_that_does_not_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert batch_per_process(6) == 2
    with pytest.raises(UsageError, match=r"of 8 sequences does not divide over 3 .*\nhint: --batch-size 6 or .* 9"):
        batch_per_process(8)
    with pytest.raises(UsageError, match=r"\nhint: --batch-size 3$"):
        batch_per_process(2)


def test_sharding_on_the_cpu_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU to shard on")
    with pytest.raises(UsageError, match="would use the cpu\nhint: leave out --fsdp"):
        check_can_shard()
