"""One step of a group by its rule.

Shape legend: the last two dimensions are a matrix [out, in], leading ones are a batch of matrices.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from lowrank_kit.linalg.polar import newton_schulz
from lowrank_kit.optim.layout import Layout
from lowrank_kit.optim.modes import Batch, health_due, is_truncated, lacks_memory, make_memory, settle_health
from lowrank_kit.optim.spread import Processes, from_whole, least_of_all, local, memory_placements, spread_of
from lowrank_kit.optim.ways import apply_whole, directions

Group = dict[str, Any]
State = dict[str, Any]

# Scale of a matrix rule's step by the shape of the matrix. RMS of an AdamW step: Moonlight (arXiv 2502.16982), 2.2.
ADAMW_RMS = 0.2
SCALES: dict[str, Callable[[int, int], float]] = {
    "match_rms": lambda rows, columns: ADAMW_RMS * math.sqrt(max(rows, columns)),
    "spectral": lambda rows, columns: math.sqrt(rows / columns),
    "none": lambda rows, columns: 1.0,
}
# Matrices of one shape are stepped together, up to 256 MiB of float32 a tensor.
BATCH_ELEMENTS = 2**26


def layout_of(group: Group) -> Layout:
    """How the matrices lie in the parameters of a group."""
    return Layout(group["transposed"], tuple(group["split"]), group["split_groups"])


def _matrix_step(group: Group, states: list[State], processes: Processes) -> None:
    layout = layout_of(group)
    for p, state in zip(group["params"], states, strict=True):
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p, dtype=getattr(torch, group["momentum_dtype"]))
    cold = is_truncated(group) and _make_memory(group, states, layout, processes)
    due, ratios = health_due(group), list[float]()
    for indices in _same_shape(group["params"]):
        batch = Batch(group, [states[i] for i in indices], indices, cold=cold, ratios=ratios)
        _step_together(batch, layout, processes)
    if due:
        # After all batches: the processes have to agree on how many columns there are.
        ratio = least_of_all(min(ratios, default=math.inf), group["params"][0], processes)
        if ratio < math.inf:
            settle_health(group, ratio)


def _make_memory(group: Group, states: list[State], layout: Layout, processes: Processes) -> bool:
    made = False
    for index, (p, state) in enumerate(zip(group["params"], states, strict=True)):
        if not lacks_memory(group, state):
            continue
        before = set(state)
        for part, X in enumerate(layout.parts(torch.empty(p.shape, device="meta"))):
            made |= make_memory(Batch(group, [state], [index], part), X.shape, p.device)
        if isinstance(p, DTensor):
            for key in set(state) - before:
                state[key] = from_whole(state[key], p, memory_placements(p, processes))
    return made


def _same_shape(params: list[Tensor]) -> Iterator[list[int]]:
    """Places of the parameters with a gradient, by shape and where they are, in batches of bounded size."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for index, p in enumerate(params):
        if p.grad is not None and p.numel():
            where = (p.device_mesh, p.placements) if isinstance(p, DTensor) else p.device
            alike[p.shape, where, _arithmetic_dtype(p)].append(index)
    for (shape, *_), indices in alike.items():
        together = max(1, BATCH_ELEMENTS // shape.numel())
        for start in range(0, len(indices), together):
            yield indices[start : start + together]


def _step_together(batch: Batch, layout: Layout, processes: Processes) -> None:
    group, states = batch.group, batch.states
    params = [group["params"][i] for i in batch.indices]
    dtype = _arithmetic_dtype(params[0])
    grads = torch.stack([local(p.grad).to(dtype) for p in params])
    before = torch.stack([local(state["momentum"]).to(dtype) for state in states])
    used = _used(grads, params[0], processes)
    momenta = before.lerp(grads, 1 - group["momentum"])
    if used is not None:
        momenta = torch.where(used, momenta, before)
    nesterov = group["rule"] == "muon" if group["nesterov"] is None else group["nesterov"]
    M = grads.lerp(momenta, group["momentum"]) if nesterov else momenta
    D = directions(M, params, batch, layout, SCALES[group["scale"]], processes)
    shrink = torch.full_like(D[..., :1, :1], 1 - group["lr"] * group["weight_decay"])
    if used is not None:
        D, shrink = D * used, torch.where(used, shrink, 1.0)
    for p, state, momentum, d, keep in zip(params, states, momenta, D, shrink, strict=True):
        local(state["momentum"]).copy_(momentum)
        W = local(p).to(dtype)  # the parameter itself where it is of that dtype; else rounded once, at the end
        local(p).copy_(W.mul_(keep).sub_(d, alpha=group["lr"]))


def _used(grads: Tensor, like: Tensor, processes: Processes) -> Tensor | None:
    """Which experts of fused ones [parameters, experts, out, in] had a token: the others' gradients are zero."""
    if grads.ndim < 4:
        return None
    used = grads.ne(0).flatten(-2).any(dim=-1)[..., None, None]
    spread = spread_of(like, processes)
    if spread is not None and spread.dim > 0:  # an expert may have its gradient in the shards of others
        used = spread.shards().max(used.float()).bool()
    return used


def _adamw_step(group: Group, states: list[State], processes: Processes) -> None:
    for p, state in zip(group["params"], states, strict=True):
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(p, dtype=_arithmetic_dtype(p))
    stepped = [(p, state) for p, state in zip(group["params"], states, strict=True) if p.grad is not None]
    params = [local(p).to(_arithmetic_dtype(p)) for p, _ in stepped]
    beta1, beta2 = group["betas"]
    adamw(
        params,
        [local(p.grad).to(_arithmetic_dtype(p)) for p, _ in stepped],
        [local(state["exp_avg"]) for _, state in stepped],
        [local(state["exp_avg_sq"]) for _, state in stepped],
        [],
        [state["step"] for _, state in stepped],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    for (p, _), new in zip(stepped, params, strict=True):
        local(p).copy_(new)


def _sgd_step(group: Group, states: list[State], processes: Processes) -> None:
    for p, state in zip(group["params"], states, strict=True):
        if not state:
            state["momentum"] = torch.zeros_like(p, dtype=_arithmetic_dtype(p))
        if p.grad is None:
            continue
        grad = local(p.grad).to(_arithmetic_dtype(p))
        momentum = local(state["momentum"]).mul_(group["momentum"]).add_(grad)
        step = grad.add(momentum, alpha=group["momentum"]) if group["nesterov"] else momentum
        W = local(p).to(_arithmetic_dtype(p))
        local(p).copy_(W.mul_(1 - group["lr"] * group["weight_decay"]).sub_(step, alpha=group["lr"]))


def _arithmetic_dtype(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


# A new rule is one line here.
MATRIX_RULES = ("numuon", "muon")
RULES: dict[str, Callable[[Group, list[State], Processes], None]] = {
    **dict.fromkeys(MATRIX_RULES, _matrix_step),
    "adamw": _adamw_step,
    "sgd": _sgd_step,
}


def spectral_decay(group: Group, processes: Processes) -> None:
    """W <- W - lr spectral_decay polar(W) for the matrices of a group that had a gradient, after their step.

    Source: spectral weight decay (arXiv 2610.11730): additive and post-step, by five Newton-Schulz steps.
    """
    layout = layout_of(group)

    def polar(W: Tensor, _states: list[State], _indices: list[int]) -> Tensor:
        return layout.join([newton_schulz(part) for part in layout.parts(W)])

    for indices in _same_shape(group["params"]):
        params = [group["params"][i] for i in indices]
        if params[0].ndim < 2:
            continue
        W = torch.stack([local(p).to(_arithmetic_dtype(p)) for p in params])
        D = apply_whole(W, params, [{} for _ in params], indices, polar, group, processes)
        if params[0].ndim > 2:
            used = _used(torch.stack([local(p.grad) for p in params]), params[0], processes)
            D = D if used is None else D * used
        for p, w, d in zip(params, W, D, strict=True):
            local(p).copy_(w.sub_(d, alpha=group["lr"] * group["spectral_decay"]))
