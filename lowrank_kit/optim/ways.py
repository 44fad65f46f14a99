"""Ways to the steps of a batch of parameters: worked out here, by owners, in shards, or by everybody.

Shape legend: a batch of parameters is [parameters, ..., out, in], or what this process holds of that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement

from lowrank_kit.linalg.shards import WHOLE
from lowrank_kit.linalg.subspace import basis_columns, warm_topk_polar
from lowrank_kit.linalg.topk import rank_of_fraction
from lowrank_kit.optim.exchange import Form, Gather, Owners, Replicas
from lowrank_kit.optim.layout import Layout
from lowrank_kit.optim.modes import (
    Batch,
    check_health,
    direction,
    health_place,
    is_truncated,
    memory_shapes,
    warm_bases,
)
from lowrank_kit.optim.spread import Processes, from_shard, is_whole, local, memory_placements, spread_of

DISTRIBUTIONS = ("auto", "owner", "sharded", "gather")
_Compute = Callable[[Tensor, list[dict[str, Tensor]], list[int]], Tensor]


def directions(
    M: Tensor,
    params: Sequence[Tensor],
    batch: Batch,
    layout: Layout,
    scale: Callable[[int, int], float],
    processes: Processes,
) -> Tensor:
    """The scaled steps of a batch of momenta, by the way that suits where the parameters are.

    Args:
        M: [parameters, ...] float32, what this process holds of the momenta.
        params: the parameters, of one shape and spread alike.
        batch: of them; states and ratios are updated.
        layout: of the matrices in a parameter.
        scale: of a step, by rows and columns of the matrix.
        processes: counts what is sent.

    Returns:
        Like M.
    """

    def whole(M: Tensor, states: list[dict[str, Tensor]], indices: list[int]) -> Tensor:
        here = replace(batch, states=states, indices=indices)
        steps = [
            direction(part, replace(here, part=number)) * scale(part.shape[-2], part.shape[-1])
            for number, part in enumerate(layout.parts(M))
        ]
        return layout.join(steps)

    if in_shards(params[0], batch.group, layout, processes):
        return _in_shards(M, params, batch, layout, scale, processes)
    parts = [X.shape for X in layout.parts(torch.empty(params[0].shape, device="meta"))]
    memory = memory_shapes(batch.group, parts) if is_truncated(batch.group) else {}
    return apply_whole(M, params, batch.states, batch.indices, whole, batch.group, processes, memory)


def apply_whole(
    X: Tensor,
    params: Sequence[Tensor],
    states: list[dict[str, Tensor]],
    indices: list[int],
    compute: _Compute,
    group: dict[str, Any],
    processes: Processes,
    memory: dict[str, torch.Size] | None = None,
) -> Tensor:
    """A function of whole parameters, or of tensors like them, where each process holds a part or all.

    Args:
        X: [parameters, ...], what this process holds.
        params: whose tensors these are.
        states: of the parameters.
        indices: their places in the group.
        compute: of whole tensors [parameters, ...], states that hold `memory` and places; it may change these states.
        group: of the parameters.
        processes: counts what is sent.
        memory: keys of the states that `compute` reads and writes, and the whole shapes that it writes.

    Returns:
        Like X.
    """
    like, memory = params[0], memory or {}
    exchange = _exchange(params, indices, group, processes)
    if exchange is None and not isinstance(like, DTensor):
        return compute(X, states, indices)
    form, *memory_forms = _forms(like, list(memory.values()), processes)
    kept = [
        [_placed(state[key], to.placements, processes) for key, to in zip(memory, memory_forms, strict=True)]
        for state in states
    ]
    if exchange is None:
        held = [dict(zip(memory, map(local, own), strict=True)) for own in kept]
        Y = compute(X, held, indices)
        returned = [[_as(like, state[key], to) for key, to in zip(memory, memory_forms, strict=True)] for state in held]
    else:
        whole = exchange.collect([[_as(like, x, form), *own] for x, own in zip(X, kept, strict=True)])
        held = [dict(zip(memory, own[1:], strict=True)) for own in whole]
        mine = [indices[i] for i in exchange.mine]
        done = compute(torch.stack([own[0] for own in whole]), held, mine) if whole else X[:0]
        results = [[y, *(state[key] for key in memory)] for y, state in zip(done, held, strict=True)]
        back = exchange.give_back(results, [form, *memory_forms])
        Y, returned = torch.stack([local(own[0]) for own in back]), [own[1:] for own in back]
    for state, own in zip(states, returned, strict=True):
        for key, x in zip(memory, own, strict=True):
            state[key] = x.to(state[key].dtype, copy=True)
    return Y


def in_shards(p: Tensor, group: dict[str, Any], layout: Layout, processes: Processes) -> bool:
    """Whether the group's step of a parameter is worked out in its shards, which nobody brings together.

    That takes `warm` and a parameter that is one matrix, cut once. It sends 2 (b n + 2 b^2) numbers, n being the side
    that is not cut, and bringing the m x n matrix with its basis to an owner and back 2 (m n + b min(m, n)) / W.
    """
    spread = spread_of(p, processes)
    able = spread is not None and p.ndim == 2 and not layout.split and is_truncated(group) and group["topk"] == "warm"
    if not able or group["distribution"] in ("owner", "gather"):
        return False
    assert spread is not None
    k = rank_of_fraction(group["rank_fraction"], p.shape, multiple=group["rank_multiple"])
    b = basis_columns(k, min(p.shape), group["oversampling"])
    in_shards, by_owner = b * p.shape[1 - spread.dim] + 2 * b * b, (p.numel() + b * min(p.shape)) / spread.world
    return group["distribution"] == "sharded" or in_shards < by_owner


def _in_shards(
    M: Tensor,
    params: Sequence[Tensor],
    batch: Batch,
    layout: Layout,
    scale: Callable[[int, int], float],
    processes: Processes,
) -> Tensor:
    like, group = params[0], batch.group
    spread = spread_of(like, processes)
    assert spread is not None
    assert isinstance(like, DTensor)
    rows, columns = layout.parts(torch.empty(like.shape, device="meta"))[0].shape
    k = rank_of_fraction(group["rank_fraction"], (rows, columns), multiple=group["rank_multiple"])
    by_rows = (spread.dim == 0) != layout.transposed
    # The basis is cut where it has the side that is cut, and every process has all of it otherwise.
    cut = by_rows == (rows < columns)
    placements = memory_placements(like, processes) if cut else [Replicate()] * like.device_mesh.ndim
    kept = [local(_placed(state["basis.0"], placements, processes)) for state in batch.states]
    shards = spread.shards()
    step, basis = warm_topk_polar(
        layout.parts(M)[0],
        k,
        warm_bases(k, min(rows, columns), batch, kept, spread.own if cut else None),
        cold=batch.cold,
        rows=shards if by_rows else WHOLE,
        columns=WHOLE if by_rows else shards,
        shape=(rows, columns),
    )
    form = Form(torch.Size((min(rows, columns), basis.shape[-1])), tuple(placements))
    for state, V in zip(batch.states, basis, strict=True):
        state["basis.0"] = _as(like, V.to(getattr(torch, group["basis_dtype"]), copy=True), form)
    D = layout.join([step])
    place = health_place(batch)
    if place is not None:
        here = Form(like.shape, tuple(like.placements))
        momentum, taken = (layout.parts(_as(like, X[place], here).full_tensor())[0] for X in (M, D))
        check_health(momentum, taken, k, batch)
    return D * scale(rows, columns)


def _exchange(
    params: Sequence[Tensor], places: Sequence[int], group: dict[str, Any], processes: Processes
) -> Gather | Owners | Replicas | None:
    """How whole parameters are brought together; None where this process works on what it holds."""
    p = params[0]
    if not isinstance(p, DTensor):
        alone = processes.replicas is None or dist.get_world_size(processes.replicas) == 1
        return None if alone else Replicas(params, places, processes)
    spread = spread_of(p, processes)
    # Of experts that are cut from one another each is whole somewhere.
    if is_whole(p) or (spread is not None and p.ndim == 3 and spread.dim == 0 and group["distribution"] != "gather"):
        return None
    dtensors = [p for p in params if isinstance(p, DTensor)]
    if spread is None or group["distribution"] == "gather":
        return Gather(dtensors, processes)
    return Owners(dtensors, places, spread)


def _forms(like: Tensor, memory: Sequence[torch.Size], processes: Processes) -> list[Form]:
    """Of the parameter, and of what its mode keeps."""
    if not isinstance(like, DTensor):
        return [Form(like.shape), *map(Form, memory)]
    placements = tuple(memory_placements(like, processes))
    return [Form(like.shape, tuple(like.placements)), *(Form(shape, placements) for shape in memory)]


def _as(like: Tensor, x: Tensor, form: Form) -> Any:
    """The tensor of a form whose shard here is x."""
    return from_shard(x, like, form.placements, form.shape) if isinstance(like, DTensor) else x


def _placed(x: Tensor, placements: Sequence[Placement], processes: Processes) -> Tensor:
    """A tensor spread by `placements`: its matrix may have been stepped another way before."""
    if not isinstance(x, DTensor) or tuple(x.placements) == tuple(placements):
        return x
    placed = x.redistribute(placements=placements)
    processes.sent += max(0, local(placed).nbytes - local(x).nbytes)
    return placed
