"""The rank-k step of a batch of momenta, by the mode of its group, and what each mode keeps between steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowrank_kit.linalg.polar import newton_schulz, polar_express
from lowrank_kit.linalg.spectral_filter import filter_topk_polar, first_threshold
from lowrank_kit.linalg.subspace import basis_columns, krylov_topk_polar, random_basis, warm_topk_polar
from lowrank_kit.linalg.topk import lmo_ratio, rank_of_fraction, topk_polar

# From here on a full-rank step is cheaper than one of a subspace, and nearly the same.
FULL_RANK_FRACTION = 0.9
POLARS: dict[str, Callable[[Tensor], Tensor]] = {"newton_schulz": newton_schulz, "polar_express": polar_express}
# Below this ratio to the exact step, warm takes half as many further columns again, up to half of k.
LEAST_LMO_RATIO = 0.99
_MOST_OVERSAMPLING = 0.5
# What a mode keeps between steps, by part of a parameter: the key of the state is "basis.0" and so on.
_MEMORY = {"warm": "basis", "filter": "threshold"}


@dataclass(frozen=True)
class Batch:
    """Part number `part` of some parameters of one shape and one group.

    Args:
        group: their group.
        states: their optimizer states.
        indices: their places in the group, which seed what is random.
        part: number of the part, 0 where a parameter is one matrix.
        cold: what the mode keeps between steps has just been made.
        ratios: takes the LMO ratio of the matrix that is compared with the exact step, if one is.
    """

    group: dict[str, Any]
    states: list[dict[str, Any]]
    indices: list[int]
    part: int = 0
    cold: bool = False
    ratios: list[float] = field(default_factory=list)

    def read(self, key: str) -> list[Tensor]:
        """What an earlier step kept, parameter by parameter."""
        return [state[f"{key}.{self.part}"] for state in self.states]

    def write(self, key: str, values: Tensor, dtype: torch.dtype) -> None:
        """Keep [parameters, ...] for the next step."""
        for state, value in zip(self.states, values, strict=True):
            state[f"{key}.{self.part}"] = value.to(dtype, copy=True)

    def seed(self, index: int) -> int:
        """Of a parameter's random columns: by its place and the step, never by the process that holds it."""
        return (self.group["step"] * 10_000 + index) * 100 + self.part


def _warm(M: Tensor, k: int, batch: Batch) -> Tensor:
    bases = warm_bases(k, min(M.shape[-2:]), batch, batch.read("basis"))
    step, basis = warm_topk_polar(M, k, bases, cold=batch.cold)
    batch.write("basis", basis, getattr(torch, batch.group["basis_dtype"]))
    return step


def warm_bases(
    k: int, side: int, batch: Batch, kept: list[Tensor], own: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The bases that a step of rank k starts from: those kept, with further random columns or without the last.

    Args:
        k: rank of the step.
        side: min(out, in).
        batch: of the parameters.
        kept: their bases, [..., side, b] each.
        own: of `side` rows, those that are kept here; None: all.

    Returns:
        [parameters, ..., side, b] float32.
    """
    columns = basis_columns(k, side, batch.group["oversampling"])
    bases = []
    for V, index in zip(kept, batch.indices, strict=True):
        if V.shape[-1] < columns:
            fresh = random_basis(side, columns - V.shape[-1], batch.seed(index)).to(V.device)
            fresh = fresh if own is None else own(fresh)
            V = torch.cat([V.float(), fresh.expand(*V.shape[:-2], -1, -1)], dim=-1)
        bases.append(V[..., :columns].float())
    return torch.stack(bases)


def _krylov(M: Tensor, k: int, batch: Batch) -> Tensor:
    # One block for the whole group: the step is the same however its parameters are batched.
    return krylov_topk_polar(M, k, seed=batch.seed(0))


def _exact(M: Tensor, k: int, batch: Batch) -> Tensor:
    return topk_polar(M, k)


def _filter(M: Tensor, k: int, batch: Batch) -> Tensor:
    step, threshold = filter_topk_polar(M, k, torch.stack(batch.read("threshold")))
    batch.write("threshold", threshold, torch.float32)
    return step


# A new mode is one line here and one row in the contract test.
TOPK: dict[str, Callable[[Tensor, int, Batch], Tensor]] = {
    "warm": _warm,
    "krylov": _krylov,
    "exact": _exact,
    "filter": _filter,
}


def is_truncated(group: dict[str, Any]) -> bool:
    """Whether the group takes a rank-k step now, and not one of full rank."""
    return group["rule"] == "numuon" and group["rank_fraction"] < FULL_RANK_FRACTION


def lacks_memory(group: dict[str, Any], state: dict[str, Any]) -> bool:
    """Whether the group's mode keeps something that this state does not hold yet."""
    return group["topk"] in _MEMORY and f"{_MEMORY[group['topk']]}.0" not in state


def memory_shapes(group: dict[str, Any], parts: list[torch.Size]) -> dict[str, torch.Size]:
    """What the group's mode keeps of a parameter after a step of today's rank: keys of the state, and shapes.

    Args:
        group: that takes a rank-k step.
        parts: shapes of the matrices in the parameter, [..., out, in] each.
    """
    name, shapes = _MEMORY.get(group["topk"]), {}
    for part, shape in enumerate(parts):
        side = min(shape[-2:])
        k = rank_of_fraction(group["rank_fraction"], shape, multiple=group["rank_multiple"])
        one = (side, basis_columns(k, side, group["oversampling"])) if name == "basis" else (1, 1)
        if name is not None:
            shapes[f"{name}.{part}"] = torch.Size((*shape[:-2], *one))
    return shapes


def make_memory(batch: Batch, shape: torch.Size, device: torch.device) -> bool:
    """Make what the group's mode keeps between steps, for states that lack it; whether any did.

    Done for all parameters of a group at the same step, with a gradient or without: every process then holds the same
    keys, which distributed checkpoints rely on.

    Args:
        batch: of a group that takes a rank-k step.
        shape: of the part, [..., out, in].
        device: of the parameters.
    """
    group = batch.group
    shapes = list(memory_shapes(group, [shape]).values())
    if not shapes:
        return False
    name, (*several, rows, columns) = _MEMORY[group["topk"]], shapes[0]
    key = f"{name}.{batch.part}"
    missing = [(s, i) for s, i in zip(batch.states, batch.indices, strict=True) if key not in s]
    for state, index in missing:
        if name == "basis":
            fresh = random_basis(rows, columns, batch.seed(index)).expand(*several, -1, -1)
            dtype = getattr(torch, group["basis_dtype"])
        else:
            k = rank_of_fraction(group["rank_fraction"], shape, multiple=group["rank_multiple"])
            fresh = torch.full((*several, 1, 1), first_threshold(max(k, 1)))  # an empty matrix has k = 0
            dtype = torch.float32
        state[key] = fresh.to(device, dtype, copy=True)
    return bool(missing)


def direction(M: Tensor, batch: Batch) -> Tensor:
    """The step of a batch before its scale: polar factor of the top-k part, or of the whole momentum.

    Args:
        M: [parameters, ..., out, in] float32.
        batch: whose momenta these are; its states and ratios are updated.

    Returns:
        Like M, singular values at most about 1.
    """
    group = batch.group
    if group["rule"] == "muon":
        return POLARS[group["polar"]](M)
    if not is_truncated(group):
        return polar_express(M)
    k = rank_of_fraction(group["rank_fraction"], M.shape, multiple=group["rank_multiple"])
    step = TOPK[group["topk"]](M, k, batch)
    place = health_place(batch)
    if place is not None:
        check_health(M[place], step[place], k, batch)
    return step


def health_due(group: dict[str, Any]) -> bool:
    """Whether a matrix of the group is compared with the exact step now: at the first, and every `health_every`."""
    every = group["health_every"]
    return is_truncated(group) and every > 0 and (group["lmo_ratio"] is None or group["step"] % every == 0)


def health_place(batch: Batch) -> int | None:
    """Place in the batch of the parameter whose turn it is, if it is in it."""
    group = batch.group
    if batch.part or not health_due(group):
        return None
    chosen = group["step"] // group["health_every"] % len(group["params"])
    return batch.indices.index(chosen) if chosen in batch.indices else None


def check_health(M: Tensor, step: Tensor, k: int, batch: Batch) -> None:
    """Compare the step of a momentum, or one of its experts in turn, with the exact one."""
    momenta, steps = (X.reshape(-1, *X.shape[-2:]) for X in (M, step))
    if len(momenta):
        one = batch.group["step"] // batch.group["health_every"] % len(momenta)
        batch.ratios.append(lmo_ratio(momenta[one], steps[one], k))


def settle_health(group: dict[str, Any], ratio: float) -> None:
    """Write what a comparison found into the group; further columns for `warm` where it is low."""
    group["lmo_ratio"] = ratio
    if ratio < LEAST_LMO_RATIO and group["topk"] == "warm":
        group["oversampling"] = min(_MOST_OVERSAMPLING, 1.5 * group["oversampling"])
