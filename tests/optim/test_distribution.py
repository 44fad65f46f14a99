"""Two processes against one: every way to step what is spread ends at the weights of a single process."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.linalg.orthogonal import orthonormalize
from lowrank_kit.optim import NuMuon, parameter_groups
from lowrank_kit.optim.spread import Processes, Spread, local

STEPS = 6
# Rows that two processes share evenly and not, more of them than columns and fewer; one leaves a process with nothing.
SHAPES: list[tuple[int, ...]] = [(48, 60), (48, 60), (48, 60), (48, 48), (65, 48), (1, 48), (49, 100)]
EXPERTS: list[tuple[int, ...]] = [(3, 48, 30), (3, 48, 30)]
MESHES: dict[str, tuple[tuple[int, ...], list[Any]]] = {
    "rows": ((2,), [Shard(0)]),
    "columns": ((2,), [Shard(1)]),
    "replicas of rows": ((1, 2), [Replicate(), Shard(0)]),
    "replicas": ((2, 1), [Replicate(), Shard(0)]),
}
COSINE, PIECEWISE = "cosine:1:0.25", "piecewise:0.25@0,0.95@0.3,0.5@0.6"
LOW = {"rank_schedule": "fixed:0.1"}
# Name -> mesh (None: plain tensors whose processes share the work), options of the group, shapes.
CASES: dict[str, tuple[str | None, dict[str, Any], list[tuple[int, ...]]]] = {
    **{f"{way}, {topk}": ("rows", {"distribution": way, "topk": topk, "rank_schedule": COSINE}, SHAPES)
       for way, topk in [*(("owner", topk) for topk in ("warm", "krylov", "exact", "filter")), ("gather", "exact")]},
    **{f"{way}, {mesh}": (mesh, {"distribution": way, **LOW}, SHAPES)
       for way in ("owner", "sharded", "gather", "auto") for mesh in MESHES},
    **{f"{way}, rank up and down": ("rows", {"distribution": way, "rank_schedule": PIECEWISE}, SHAPES)
       for way in ("owner", "sharded", "gather", "auto")},
    **{f"{way}, transposed": ("rows", {"distribution": way, "transposed": True, **LOW}, SHAPES)
       for way in ("owner", "sharded")},
    **{f"{way}, parts": ("rows", {"distribution": way, "split": (28, 20), "rank_schedule": "fixed:0.3"}, SHAPES[:4])
       for way in ("owner", "sharded", "gather")},
    **{f"{way}, decay": ("rows", {"distribution": way, "spectral_decay": 0.1, "weight_decay": 0.1, **LOW}, SHAPES)
       for way in ("owner", "sharded", "gather")},
    **{f"experts, {mesh}": (mesh, {"rank_schedule": "fixed:0.3", "spectral_decay": 0.1}, EXPERTS) for mesh in MESHES},
    "experts, gather": ("rows", {"rank_schedule": "fixed:0.3", "distribution": "gather"}, EXPERTS),
    "sharded, bfloat16": (
        "rows", {"distribution": "sharded", "momentum_dtype": "bfloat16", "basis_dtype": "bfloat16", **LOW}, SHAPES),
    "muon": ("rows", {"rule": "muon", "spectral_decay": 0.1}, SHAPES),
    "adamw": ("rows", {"rule": "adamw", "weight_decay": 0.1}, [*SHAPES, (7,)]),
    "sgd": ("rows", {"rule": "sgd", "nesterov": True}, [*SHAPES, (7,)]),
    **{f"plain, {topk}": (None, {"topk": topk, "rank_schedule": COSINE, "spectral_decay": 0.1}, [*SHAPES, *EXPERTS])
       for topk in ("warm", "krylov", "exact", "filter")},
    "plain, muon": (None, {"rule": "muon"}, SHAPES),
}  # fmt: skip


def gradient(step: int, index: int, shape: tuple[int, ...]) -> Tensor:
    """By step and place alone; of experts one in turn has none."""
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(100 * step + index))
    if len(shape) == 3:
        grad[step % shape[0]] = 0
    return grad


Place = Callable[[Tensor], Tensor]


class Run:
    """Parameters and their optimizer, on a mesh or in one process, and steps that hang on their number alone."""

    def __init__(self, options: dict[str, Any], shapes: list[tuple[int, ...]], place: Place, group: Any = None) -> None:
        self.shapes, self.place, self.options = shapes, place, options
        torch.manual_seed(0)
        self.params = [nn.Parameter(place(torch.randn(shape))) for shape in shapes]
        self.group = group
        self.optimizer = self.new_optimizer()

    def new_optimizer(self) -> NuMuon:
        options = {"lr": 0.05, "total_steps": STEPS, "health_every": 2, "rank_multiple": 1, **self.options}
        return NuMuon([{"params": self.params, **options}], process_group=self.group)

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            for index, (p, shape) in enumerate(zip(self.params, self.shapes, strict=True)):
                p.grad = self.place(gradient(step, index, shape))
            self.optimizer.step()

    def weights(self) -> list[Tensor]:
        return [whole(p) for p in self.params]


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def run_case(name: str) -> dict[str, Any]:
    """What a process saw of a case: how far from a single process, resumed in the middle or not, and its state."""
    mesh_name, options, shapes = CASES[name]
    alone = Run(options, shapes, lambda x: x)
    alone.steps(0, STEPS)
    if mesh_name is None:
        spread = Run(options, shapes, lambda x: x.clone(), group=dist.group.WORLD)
    else:
        sizes, placements = MESHES[mesh_name]
        mesh = init_device_mesh("cpu", sizes)
        spread = Run(options, shapes, lambda x: distribute_tensor(x, mesh, placements[: mesh.ndim]))
    spread.steps(0, 3)
    saved = spread.optimizer.state_dict()
    spread.optimizer = spread.new_optimizer()
    spread.optimizer.load_state_dict(saved)
    spread.steps(3, STEPS)
    group, other = spread.optimizer.param_groups[0], alone.optimizer.param_groups[0]
    states = [spread.optimizer.state[p] for p in spread.params]
    return {
        "difference": difference(spread.weights(), alone.weights()),
        "moved": difference(alone.weights(), Run(options, shapes, lambda x: x).weights()),
        "sent": spread.optimizer.bytes_sent,
        "keys": [sorted(state) for state in states],
        "spread": all(isinstance(x, DTensor) for state in states for key, x in state.items() if key != "step"),
        "health": [group["lmo_ratio"], group["oversampling"]],
        "health alone": [other["lmo_ratio"], other["oversampling"]],
    }


def not_finite() -> dict[str, Any]:
    """A gradient that is not finite in the shard of the second process: both have to stop."""
    run = Run(LOW, SHAPES, lambda x: distribute_tensor(x, init_device_mesh("cpu", (2,)), [Shard(0)]))
    run.steps(0, 1)
    before = run.weights()
    for p in run.params:
        p.grad = torch.zeros_like(p)
    if dist.get_rank() == 1:
        grad = run.params[0].grad
        assert grad is not None
        local(grad)[0, 0] = float("nan")
    try:
        run.optimizer.step()
    except LowRankError as error:
        return {"error": str(error), "difference": difference(run.weights(), before)}
    return {"error": None}


def orthonormal() -> dict[str, Any]:
    """Columns that Cholesky cannot part, in runs of 6 rows, fewer than the 8 columns."""
    Y = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    spread = Spread(0, 0, init_device_mesh("cpu", (2,)).get_group(0), 2, dist.get_rank(), Processes())
    orthonormalize(spread.own(Y), spread.shards())
    sent = spread.processes.sent
    Y[:, 5] = Y[:, 2] + 1e-6 * Y[:, 5]
    Q, R = orthonormalize(spread.own(Y), spread.shards())
    Q = spread.shards().stack(Q)
    return {
        "sent": sent,
        "orthonormal": (Q.mT @ Q - torch.eye(8)).abs().max().item(),
        "product": (Q @ R - Y).abs().max().item(),
        "below the diagonal": R.tril(-1).abs().max().item(),
    }


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=61, tie_word_embeddings=True, **shape))


def losses(model: nn.Module, share: slice) -> list[float]:
    """Ten steps on the rows of a batch that this process has."""
    optimizer = NuMuon(parameter_groups(model, rule="numuon", lr=0.01, rank_schedule="fixed:0.3", spectral_decay=0.5))
    found = []
    for _ in range(10):
        tokens = torch.randint(61, (4, 12), generator=torch.Generator().manual_seed(0))[share]
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if share != slice(None):
            dist.all_reduce(mean, dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM)
            mean /= 2
        found.append(mean.item())
    return found


def real_model(sizes: tuple[int, ...]) -> dict[str, Any]:
    """A Llama with tied embeddings under FSDP2 against the same in one process."""
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicas", "shards")[-len(sizes) :])
    alone = losses(llama(), slice(None))
    model = llama()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    rank = dist.get_rank()
    spread = losses(model, slice(2 * rank, 2 * rank + 2))
    return {"alone": alone, "spread": spread}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    jobs: dict[str, Callable[[], dict[str, Any]]] = {
        **{name: partial(run_case, name) for name in CASES},
        "not finite": not_finite,
        "orthonormal": orthonormal,
        "fsdp": partial(real_model, (2,)),
        "hsdp": partial(real_model, (1, 2)),
    }
    results: dict[str, Any] = {}
    for name, job in jobs.items():
        try:
            results[name] = job()
        except Exception:
            # The other process waits for this one now: what comes after would tell nothing.
            results[name] = {"failed": traceback.format_exc()}
            break
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two processes saw."""
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def of_both(results: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    found = [result.get(name) or next(iter(reversed(result.values()))) for result in results]
    for each in found:
        assert "failed" not in each, each["failed"]
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_weights_are_those_of_one_process(results: list[dict[str, Any]], name: str) -> None:
    both = of_both(results, name)
    for seen in both:
        assert seen["moved"] > 0.02
        # Momentum of low precision turns a last bit into one of its own.
        assert seen["difference"] < (2e-2 if "bfloat16" in name else 2e-4) * seen["moved"]
    assert both[0]["keys"] == both[1]["keys"]
    assert both[0]["health"] == both[1]["health"]
    if CASES[name][0] is not None:
        assert both[0]["spread"]


@pytest.mark.parametrize("name", ["owner, warm", "sharded, rows", "plain, warm", "gather, rows"])
def test_health_is_that_of_one_process(results: list[dict[str, Any]], name: str) -> None:
    for seen in of_both(results, name):
        assert seen["health"] == pytest.approx(seen["health alone"], abs=1e-4)


def test_what_is_sent(results: list[dict[str, Any]]) -> None:
    """By both processes for a step, in bytes of float32."""
    sent = {name: sum(seen["sent"] for seen in of_both(results, name)) for name in CASES}
    numbers = sum(rows * columns for rows, columns in SHAPES)
    assert sent["gather, exact"] == 4 * numbers  # together they lack each of them once
    # There and back, of each matrix what its owner lacks: half, but of one row all or nothing.
    assert sent["owner, exact"] == pytest.approx(4 * numbers, rel=0.05)
    assert sent["muon"] == pytest.approx(2 * sent["owner, exact"])  # once more for its spectral decay
    assert sent["auto, rows"] < sent["owner, rows"]
    assert sent["auto, rows"] < sent["sharded, rows"]
    assert sent["owner, replicas"] == sent["auto, replicas"] == sent["experts, rows"] == sent["adamw"] == 0


def test_columns_close_to_dependent_are_made_orthonormal_in_runs_of_rows(results: list[dict[str, Any]]) -> None:
    for seen in of_both(results, "orthonormal"):
        # Of columns that are far from dependent: one Gram, the largest entry, and three products with two probes.
        assert seen.pop("sent") == 4 * (8 * 8 + 1 + 3 * 8 * 2)
        assert all(error < 1e-5 for error in seen.values()), seen


@pytest.mark.parametrize("kind", ["fsdp", "hsdp"])
def test_a_model_under_fsdp2_has_the_losses_of_one_process(results: list[dict[str, Any]], kind: str) -> None:
    for seen in of_both(results, kind):
        assert seen["alone"][-1] < seen["alone"][0] - 0.1
        assert seen["spread"] == pytest.approx(seen["alone"], abs=1e-5)


def test_a_gradient_that_is_not_finite_stops_every_process(results: list[dict[str, Any]]) -> None:
    other, own = of_both(results, "not finite")
    assert "in the shard of another process, is not finite at step 1" in other["error"]
    assert "shape (48, 60)) is not finite at step 1" in own["error"]
    assert other["difference"] == own["difference"] == 0


@pytest.mark.parametrize("mark", ["_is_flat_param", "_fsdp_flattened", "ds_id"])
def test_parameters_in_flat_pieces_are_refused(mark: str) -> None:
    """As FSDP1 and DeepSpeed mark them; neither runs on a CPU alone."""
    parameter = nn.Parameter(torch.randn(4, 4))
    optimizer = NuMuon([parameter], rank_schedule="fixed:0.5")
    setattr(parameter, mark, True)
    parameter.grad = torch.randn(4, 4)
    with pytest.raises(UsageError, match="FSDP2"):
        optimizer.step()


def test_a_wrapper_that_flattens_in_place_is_refused() -> None:
    """DeepSpeed's ZeRO stages 1 and 2 put flat tensors in the place of the parameters of a group."""
    optimizer = NuMuon([nn.Parameter(torch.randn(4, 4))], rank_schedule="fixed:0.5")
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.randn(16))]
    with pytest.raises(UsageError, match="ZeRO"):
        optimizer.step()
