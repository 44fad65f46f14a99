"""Effective rank through training: what is measured, what it costs, and that it is the rank of the weights."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed as dist
from torch import nn
from transformers import LlamaForCausalLM, TrainerControl, TrainerState, TrainingArguments

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.errors import NonFiniteError
from lowrank_kit.linalg.spectrum import effective_rank, stable_rank
from lowrank_kit.matrices import Matrix, find_matrices
from lowrank_kit.spectra.measure import measure
from lowrank_kit.training.effective_rank import COSTS, EffectiveRanks, mean_ranks, plan_ranks, training_flops
from lowrank_kit.training.run import train
from lowrank_kit.training.settings import TrainSettings
from tests.families import FAMILIES, build

Make = Callable[..., TrainSettings]


def matrices_of(model: LlamaForCausalLM, role: str) -> list[Matrix]:
    return [matrix for matrix in find_matrices(model) if matrix.role == role]


def work(matrices: tuple[Matrix, ...], device: str = "cpu") -> float:
    scale, fixed = COSTS[device]
    return sum(scale * min(matrix.shape) ** 3 + fixed for matrix in matrices)


# The plan


def test_as_many_as_one_percent_pays_for(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    matrices = find_matrices(tiny_llama(num_hidden_layers=12))
    one_of_each = work(tuple(matrices[:7]))
    for count in (1, 2, 5, 12):
        plan = plan_ranks(matrices, 100 * one_of_each * count / 10 * 1.001, 10, "cpu")
        assert plan.every == 10
        assert len(plan.matrices) == 7 * count
        assert list(plan.matrices) == [matrix for matrix in matrices if matrix in plan.matrices]
        blocks = [matrix.block for matrix in plan.matrices if matrix.role == "up"]
        assert blocks == {1: [6], 2: [3, 9], 5: [1, 3, 6, 8, 10], 12: list(range(12))}[count]
    # More than there are, or less than one of each.
    assert len(plan_ranks(matrices, 1e20, 10, "cpu").matrices) == 7 * 12
    plan = plan_ranks(matrices, 100 * one_of_each / 35, 10, "cpu")
    assert (plan.every, len(plan.matrices)) == (40, 7)
    assert plan_ranks(matrices, 100 * one_of_each / 10, 10, "cuda").every > 10


def test_work_of_a_step() -> None:
    dense, experts = build("llama"), build("mixtral")
    numbers = sum(matrix.shape[0] * matrix.shape[1] for matrix in find_matrices(dense))
    assert training_flops(dense, find_matrices(dense), 10) == 60 * numbers
    matrices = find_matrices(experts)
    config = experts.config
    shares = [config.num_experts_per_tok / config.num_local_experts if m.expert is not None else 1 for m in matrices]
    met = sum(m.shape[0] * m.shape[1] * share for m, share in zip(matrices, shares, strict=True))
    assert any(share < 1 for share in shares)
    assert training_flops(experts, matrices, 10) == pytest.approx(60 * met)


# The figures


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ranks_are_those_of_the_weights(family: str) -> None:
    model = build(family)
    found = mean_ranks(model, find_matrices(model))
    for figure, rank in (("effective_rank", effective_rank), ("stable_rank", stable_rank)):
        expected: dict[str, list[float]] = {}
        for matrix in find_matrices(model):
            parameter = model.get_parameter(matrix.parameter)
            s_S = torch.linalg.svdvals(parameter if matrix.expert is None else parameter[matrix.expert])
            expected.setdefault(matrix.role, []).append(rank(s_S) / min(matrix.shape))
        assert found[figure] == pytest.approx({role: sum(x) / len(x) for role, x in expected.items()}, rel=1e-5)


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("measured_at_any_cost")
def test_in_the_log(settings_for: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = settings_for(steps=6, log_every=2, spectra_every=3)
    with caplog.at_level(logging.INFO, logger="lowrank_kit"):
        train(settings, tmp_path / "run", device="cpu")
    assert "effective rank: 14 of 14 matrices every 3 steps" in caplog.text
    lines = [line for line in log_of(tmp_path / "run") if "loss" in line]
    asked = [(line["step"], "effective_rank" in line) for line in lines]
    assert asked == [(2, False), (3, True), (4, False), (6, True)]
    # The weights are those after the last step.
    expected = measure(Checkpoint.open(tmp_path / "run"), progress=False).by_role()
    assert lines[-1]["effective_rank"] == pytest.approx({row.role: row.effective_rank_share for row in expected}, 1e-5)
    assert all(0 < line["spectra_share"] < 1 for line in lines if "spectra_share" in line)
    assert lines[1]["effective_rank"] != lines[-1]["effective_rank"]


def test_seldom_where_steps_are_small(settings_for: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(settings_for(steps=2, spectra_every=1), tmp_path / "run", device="cpu")
    assert "every 1 steps it would take more than 1% of the training" in caplog.text
    assert not any("effective_rank" in line for line in log_of(tmp_path / "run"))


@pytest.mark.usefixtures("measured_at_any_cost")
def test_measuring_changes_no_weight(settings_for: Make, tmp_path: Path) -> None:
    for name, every in (("without", 0), ("with", 1)):
        train(settings_for(steps=2, spectra_every=every), tmp_path / name, device="cpu")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("without", "with"))
    assert one == other


def test_the_costs_are_not_below_what_it_takes(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    """At 10 GFLOP/s, less than one core trains at. With much room: other programs run on this machine, too."""
    model = tiny_llama(hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    matrices = find_matrices(model)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        mean_ranks(model, matrices)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 3 * work(tuple(matrices)) / 10e9


def test_a_matrix_that_is_not_finite(tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> None:
    model = tiny_llama()
    callback = EffectiveRanks(1, 10**9)
    state, control = TrainerState(global_step=5), TrainerControl()
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    callback.on_train_begin(args, state, control, model=model)
    callback.on_step_end(args, state, control, model=model)
    assert control.should_log
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    message = r"matrix model\.layers\.1\.mlp\.up_proj is not finite at step 5"
    with pytest.raises(NonFiniteError, match=message):
        callback.on_step_end(args, state, control, model=model)


# Sharded


def _sharded(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    layer = nn.ModuleDict({"q_proj": nn.Linear(12, 9, bias=False), "up_proj": nn.Linear(9, 20, bias=False)})
    model = nn.Sequential(nn.Embedding(5, 4), layer)
    whole = mean_ranks(model, find_matrices(model))
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    assert type(model[1]["q_proj"].weight).__name__ == "DTensor"  # type: ignore[index]
    sharded = mean_ranks(model, find_matrices(model))
    Path(folder, f"{rank}.json").write_text(json.dumps([whole, sharded]))
    dist.destroy_process_group()


def test_of_sharded_parameters(tmp_path: Path) -> None:
    mp.start_processes(_sharded, args=(str(tmp_path),), nprocs=2, start_method="fork")
    for rank in range(2):
        whole, sharded = json.loads((tmp_path / f"{rank}.json").read_text())
        assert whole == sharded
        assert set(whole["effective_rank"]) == {"q", "up"}
