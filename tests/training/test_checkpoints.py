"""Checkpoints: whole or absent whatever happens while they are written, and restored bit for bit or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.optim import NuMuon, parameter_groups
from lowrank_kit.training.checkpoints import newest_whole, rotate, save_checkpoint, what_is_wrong
from lowrank_kit.training.state import load_random_state, load_state, model_tensors, save_state
from tests.pages import write_pages
from tests.training.launch import Run, errors_of, launch_all
from tests.training.test_distributed_run import MODEL

Llama = Callable[..., nn.Module]


def write(folder: Path, *steps: int, keep: int = 9) -> list[Path]:
    """Checkpoints of two small tensors."""
    tensors = {"model.a": torch.arange(6.0).view(2, 3), "optimizer.a:step": torch.tensor(3.0)}
    return [save_checkpoint(folder, step, tensors, {"random.json": {"step": step}}, keep=keep) for step in steps]


# One checkpoint


def test_what_a_checkpoint_is(tmp_path: Path) -> None:
    (made,) = write(tmp_path, 7)
    assert made == tmp_path / "checkpoint-7"
    files = {path.name: path.stat().st_size for path in made.iterdir()}
    manifest = json.loads((made / "checkpoint.json").read_text())
    del files["checkpoint.json"]
    digest = hashlib.sha256((made / "random.json").read_bytes()).hexdigest()
    told = {"step": 7, "processes": 1, "files": files, "sha256": {"random.json": digest}}
    assert manifest == {"schema_version": 1, **told}
    assert set(files) == {"random.json", "shard-00001-model-00001-of-00001.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]
    stored = load_file(made / "shard-00001-model-00001-of-00001.safetensors")
    assert torch.equal(stored["model.a"], torch.arange(6.0).view(2, 3))


def test_large_tensors_go_into_files_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_kit.training.checkpoints._FILE_BYTES", 4000)
    tensors = {f"model.{number}": torch.full((500,), float(number)) for number in range(6)}
    made = save_checkpoint(tmp_path, 1, tensors, {}, keep=1)
    sizes = [path.stat().st_size for path in made.glob("*.safetensors")]
    assert len(sizes) == 3
    assert max(sizes) < 5000


def test_the_newest_stay(tmp_path: Path) -> None:
    write(tmp_path, 8, 9, 10, 11, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11"]


def test_a_damaged_one_does_not_count_among_those_that_stay(tmp_path: Path) -> None:
    one, two, three, four = write(tmp_path, 1, 2, 3, 4)
    (three / "random.json").unlink()
    rotate(tmp_path, 2)
    assert sorted(tmp_path.iterdir()) == [two, four]
    assert not one.exists()


def told_by(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("lowrank_kit")]


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda folder: next(folder.glob("*.safetensors")).unlink(), r"shard-\S+\.safetensors is missing"),
        (lambda folder: os.truncate(next(folder.glob("*.safetensors")), 99), r"has 99 bytes instead of \d+"),
        (lambda folder: (folder / "checkpoint.json").unlink(), "checkpoint.json is missing: it was not written to its"),
        (lambda folder: (folder / "checkpoint.json").write_text("{"), "checkpoint.json is no JSON"),
        (lambda folder: (folder / "checkpoint.json").write_text('{"schema_version": 2}'), "version 2, known is 1"),
        (
            lambda folder: ((folder / "checkpoint.json").unlink(), (folder / "optimizer.pt").write_bytes(b"x")),
            "an earlier version of lowrank-kit wrote it",
        ),
    ],
)
def test_the_newest_whole_one(
    damage: Callable[[Path], Any], fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert newest_whole(tmp_path) is None
    nine, ten = write(tmp_path, 9, 10)
    assert newest_whole(tmp_path) == ten
    assert told_by(caplog) == []
    damage(ten)
    with caplog.at_level(logging.WARNING):
        assert newest_whole(tmp_path) == nine
    (line,) = told_by(caplog)
    assert re.fullmatch(rf"checkpoint-10 is damaged: .*{fault}.*; going on from checkpoint-9", line)
    shutil.rmtree(nine)
    with pytest.raises(LowRankError, match=rf"holds no whole checkpoint; checkpoint-10 is damaged: .*{fault}") as told:
        newest_whole(tmp_path)
    assert told.value.hint == "restore the files, or start again in a new folder"


def test_written_again_over_a_damaged_one(tmp_path: Path) -> None:
    (made,) = write(tmp_path, 3)
    (made / "random.json").unlink()
    assert write(tmp_path, 3) == [made]
    assert what_is_wrong(made) is None


@pytest.fixture
def small_files() -> Iterator[Callable[[], None]]:
    """Call it, and no file grows beyond 4 kB any more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("large", ["tensor", "document"])
def test_a_full_disk(large: str, tmp_path: Path, small_files: Callable[[], None]) -> None:
    (before,) = write(tmp_path, 1)
    (tmp_path / ".saving-2").mkdir()  # of a save that was killed
    tensors = {"model.a": torch.zeros(5000 if large == "tensor" else 5)}
    small_files()
    with pytest.raises(LowRankError, match=r"of step 3 could not be written to .*: .*File too large") as told:
        save_checkpoint(tmp_path, 3, tensors, {"random.json": {"x": "y" * 5000}}, keep=1)
    assert told.value.hint is not None
    assert list(tmp_path.iterdir()) == [before]
    assert what_is_wrong(before) is None


# Model and optimizer


def optimizer_of(model: nn.Module, *, seed: int | None = None, **options: Any) -> NuMuon:
    """NuMuon for a model; with a seed, after three steps of random gradients."""
    chosen: dict[str, Any] = {"rule": "numuon", "lr": 1e-2, "rank_schedule": "fixed:0.5", "health_every": 2} | options
    optimizer = NuMuon(parameter_groups(model, **chosen))
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
    return optimizer


def state_of(model: nn.Module, optimizer: NuMuon) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    kept = {f"{names[p]} {key}": value for p, state in optimizer.state.items() for key, value in state.items()}
    return kept | model_tensors(model)


@pytest.mark.parametrize(
    "options", [{}, {"momentum_dtype": "bfloat16", "basis_dtype": "bfloat16"}, {"topk": "filter"}, {"rule": "sgd"}]
)
@pytest.mark.parametrize("tied", [True, False])
def test_restored_bit_for_bit(options: dict[str, Any], tied: bool, tiny_llama: Llama, tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    optimizer = optimizer_of(model, seed=1, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    schedule.last_epoch = 3
    made = save_state(tmp_path, 3, model, optimizer, schedules={"s": schedule}, documents={}, keep=1)
    assert "model.lm_head.weight" not in model_tensors(model) or not tied
    other = tiny_llama(seed=5, tie_word_embeddings=tied)
    fresh = optimizer_of(other, **options)
    again = torch.optim.lr_scheduler.LambdaLR(fresh, lambda step: 1 / (step + 1))
    load_state(made, other, fresh, schedules={"s": again})
    before, after = state_of(model, optimizer), state_of(other, fresh)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (tensor.dtype, tensor.device) == (after[name].dtype, after[name].device)
        assert torch.equal(tensor, after[name])
    for group, restored in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in restored.items() if k != "params"}
    assert again.state_dict() == schedule.state_dict()
    # And it goes on alike.
    for each, stepping in ((model, optimizer), (other, fresh)):
        for number, p in enumerate(each.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
        stepping.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_a_schedule_that_is_a_function(tiny_llama: Llama, tmp_path: Path) -> None:
    model = tiny_llama()
    options: dict[str, Any] = {"rank_schedule": lambda progress: 0.5, "total_steps": 10}
    made = save_state(tmp_path, 3, model, optimizer_of(model, seed=1, **options), schedules={}, documents={}, keep=1)
    fresh = optimizer_of(model, **options)
    load_state(made, model, fresh, schedules={})
    assert fresh.param_groups[0]["rank_schedule"] is options["rank_schedule"]


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (
            {"hidden_size": 64},
            {},
            r"of another model: model.embed_tokens.weight is \(384, 32\) in it, here \(384, 64\)",
        ),
        ({"num_hidden_layers": 3}, {}, r"model.layers.2.* is not there in it, here \("),
        ({"num_hidden_layers": 1}, {}, r"model.layers.1.* is \(.*\) in it, here not there"),
        ({}, {"rule": "muon"}, "group 0 was saved with another rule: numuon instead of muon"),
        ({}, {"overrides": {"*.o_proj.*": "adamw"}}, "has 3 optimizer groups, this run 4"),
        ({}, {"rule": "adamw", "overrides": {"*.o_proj.*": "numuon"}}, "optimizer groups, this run"),
    ],
)
def test_of_something_else(
    config: dict[str, Any], options: dict[str, Any], message: str, tiny_llama: Llama, tmp_path: Path
) -> None:
    model = tiny_llama()
    made = save_state(tmp_path, 3, model, optimizer_of(model, seed=1), schedules={}, documents={}, keep=1)
    other = tiny_llama(seed=1, **config)
    before = {name: tensor.clone() for name, tensor in model_tensors(other).items()}
    fresh = optimizer_of(other, **options)
    with pytest.raises(UsageError, match=message):
        load_state(made, other, fresh, schedules={})
    assert all(torch.equal(before[name], tensor) for name, tensor in model_tensors(other).items())
    assert not fresh.state


def test_a_part_that_is_missing(tmp_path: Path, tiny_llama: Llama) -> None:
    """As when a file was lost, and somebody took it out of the manifest too."""
    model = tiny_llama()
    optimizer = optimizer_of(model, seed=1)
    made = save_state(tmp_path, 3, model, optimizer, schedules={}, documents={}, keep=1)
    next(made.glob("*.safetensors")).unlink()
    with pytest.raises(UsageError, match=r"model\.embed_tokens\.weight is not there in it"):
        load_state(made, model, optimizer_of(model), schedules={})


def test_random_states_are_those_of_the_process(
    tmp_path: Path, tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    model = tiny_llama()
    random.gauss(), np.random.randn()  # each keeps a second number for later
    made = save_state(tmp_path, 3, model, optimizer_of(model), schedules={}, documents={}, keep=1)
    then = draw()
    draw()
    load_random_state(made, seed=0)
    assert draw() == then
    # A second process, which was not there, draws other numbers, and the same ones each time.
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    drawn = []
    for _ in range(2):
        load_random_state(made, seed=0)
        drawn.append(draw())
        draw()
    assert drawn[0] == drawn[1] != then


# Whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs, which are made by one launch."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.json").write_text(json.dumps(MODEL | {"attention_dropout": 0.1}))
    write_pages(folder / "pages.jsonl")
    settings = {"model_config": str(folder / "tiny.json"), "text": str(folder / "pages.jsonl"), "vocab_size": 300}
    settings |= {"steps": 7, "batch_size": 4, "block_tokens": 32, "eval_blocks": 4, "log_every": 1, "save_every": 2}

    def run(name: str, processes: int = 1, **plan: Any) -> Run:
        return Run(str(folder / name), settings, processes, **plan)

    runs = [run("whole")]
    for sync in KILLED:
        runs.append(run(f"killed-{sync}", signal=signal.SIGKILL, after=3, sync=sync))
        runs.append(run(f"resumed-{sync}", copy_of=str(folder / f"killed-{sync}"), resume=True))
    runs += [
        run("whole-two", 2),
        run("killed-two", 2, signal=signal.SIGKILL, after=3, sync=1),
        run("resumed-two", 2, copy_of=str(folder / "killed-two"), resume=True),
        run("terminated", signal=signal.SIGTERM, after=3, sync=1),
        run("went-on", copy_of=str(folder / "terminated"), resume=True),
        run("full", 2, full=3),
    ]
    launch_all(runs, folder / "plan.json")
    return folder


# At which of the files that the save of step 4 brings to the disk the process is killed, and what is then there.
KILLED = {1: "the tensors", 3: "half of the documents", 6: "the manifest", 8: "all of it, and renamed"}


def same_weights(one: Path, other: Path) -> bool:
    before, after = (load_file(folder / "model.safetensors") for folder in (one, other))
    return before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("sync", KILLED, ids=KILLED.values())
def test_killed_while_it_saves(sync: int, folder: Path) -> None:
    killed, resumed = folder / f"killed-{sync}", folder / f"resumed-{sync}"
    found = {path.name for path in (killed / "checkpoints").iterdir()}
    assert found == {"checkpoint-2", "checkpoint-4" if sync == 8 else ".saving-4"}
    newest = newest_whole(killed / "checkpoints")
    assert newest is not None
    assert newest.name == ("checkpoint-4" if sync == 8 else "checkpoint-2")
    assert same_weights(folder / "whole", resumed)
    assert {path.name for path in (resumed / "checkpoints").iterdir()} == {"checkpoint-4", "checkpoint-6"}


def test_one_of_two_processes_killed_while_they_save(folder: Path) -> None:
    assert {path.name for path in (folder / "killed-two" / "checkpoints").iterdir()} == {"checkpoint-2", ".saving-4"}
    assert same_weights(folder / "whole-two", folder / "resumed-two")


def test_terminated_while_it_saves(folder: Path) -> None:
    """That save is brought to its end, and another step made and saved."""
    assert errors_of(folder / "terminated") == ["Terminated: "]
    assert {path.name for path in (folder / "terminated" / "checkpoints").iterdir()} == {"checkpoint-4", "checkpoint-5"}
    assert same_weights(folder / "whole", folder / "went-on")


def test_the_disk_of_one_process_fills_up(folder: Path) -> None:
    """Step 4 is not saved: both processes say why, and that of step 2 is as it was."""
    for told in errors_of(folder / "full"):
        assert told.startswith("LowRankError: the checkpoint of step 4 could not be written to ")
        assert "File too large (process 1)\nhint: the checkpoints before it are as they were" in told
    assert len(errors_of(folder / "full")) == 2
    assert [path.name for path in (folder / "full" / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert what_is_wrong(folder / "full" / "checkpoints" / "checkpoint-2") is None
