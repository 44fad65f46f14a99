"""What a group of `NuMuon` may hold, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lowrank_kit.errors import UsageError, did_you_mean
from lowrank_kit.linalg.subspace import OVERSAMPLING
from lowrank_kit.optim.modes import POLARS, TOPK
from lowrank_kit.optim.rules import MATRIX_RULES, RULES, SCALES, layout_of
from lowrank_kit.optim.schedule import RankSchedule
from lowrank_kit.optim.ways import DISTRIBUTIONS

# Keys of a group beside the arguments of `NuMuon`: how the matrices lie in its parameters, as `Layout` has it, and
# where the group stands.
POSITION: dict[str, Any] = {
    "transposed": False,
    "split": (),
    "split_groups": 1,
    "step": 0,
    "rank_fraction": 1.0,
    "oversampling": OVERSAMPLING,
    "lmo_ratio": None,
}
# Stands for a rank schedule that is a function in a saved state, which holds plain values only.
FUNCTION = "function"
_CHOICES: dict[str, Iterable[str]] = {
    "rule": RULES,
    "topk": TOPK,
    "polar": POLARS,
    "scale": SCALES,
    "distribution": DISTRIBUTIONS,
    "momentum_dtype": ("float32", "bfloat16", "float64"),
    "basis_dtype": ("float32", "bfloat16"),
}
# Key -> its least value, and the least value it stays below.
_RANGES = {
    "lr": (0, math.inf),
    "weight_decay": (0, math.inf),
    "spectral_decay": (0, math.inf),
    "momentum": (0, 1),
    "betas": (0, 1),
    "eps": (0, math.inf),
    "rank_multiple": (1, math.inf),
    "health_every": (0, math.inf),
}


def check_group(group: dict[str, Any]) -> None:
    """Refuse a group that cannot be served.

    Raises:
        UsageError: an unknown choice, a number out of range, a schedule without its length, parameters that are no
            matrices under a matrix rule, parts that do not add up to the rows.
    """
    for key, choices in _CHOICES.items():
        if group[key] not in choices:
            raise UsageError(
                f'unknown {key} "{group[key]}" of an optimizer group', hint=did_you_mean(str(group[key]), choices)
            )
    for key, (least, below) in _RANGES.items():
        for value in group[key] if key == "betas" else (group[key],):
            if not least <= value < below:
                raise UsageError(f"{key} of an optimizer group must be in [{least}, {below}), got {value:g}")
    _check_schedule(group)
    if group["rule"] in MATRIX_RULES:
        wrong = [tuple(p.shape) for p in group["params"] if p.ndim not in (2, 3)]
        if wrong:
            raise UsageError(
                f"rule {group['rule']} is for matrices; got parameters of shapes {wrong[:3]}",
                hint='give them rule "adamw", or let lowrank_kit.optim.parameter_groups(model) choose',
            )
    layout = layout_of(group)
    for p in group["params"]:
        rows = p.shape[-1 if layout.transposed else -2] if p.ndim > 1 else 0
        if layout.split and rows != layout.groups * sum(layout.split):
            raise UsageError(
                f"{layout.groups} x {layout.split} rows in parts of a parameter of shape {tuple(p.shape)} with {rows}",
            )


def _check_schedule(group: dict[str, Any]) -> None:
    schedule, total_steps = group["rank_schedule"], group["total_steps"]
    if total_steps is not None and total_steps < 1:
        raise UsageError(f"total_steps must be at least 1, got {total_steps}")
    needs_length = callable(schedule) or RankSchedule.parse(schedule).kind != "fixed"
    if group["rule"] == "numuon" and needs_length and total_steps is None:
        name = "that is a function" if callable(schedule) else f'"{schedule}"'
        raise UsageError(
            f"the rank schedule {name} needs total_steps, its length in steps",
            hint='pass total_steps=..., or a fixed rank fraction: rank_schedule="fixed:0.25"',
        )


def refuse_flat(groups: list[dict[str, Any]]) -> None:
    """Refuse parameters that a wrapper has made flat shards of: there are no matrices in them any more.

    Raises:
        UsageError: FSDP1 or DeepSpeed's ZeRO has the parameters.
    """
    for group in groups:
        for p in group["params"]:
            if getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False):
                wrapper = "FSDP1 (FullyShardedDataParallel)"
            elif hasattr(p, "ds_id") or (group["rule"] in MATRIX_RULES and p.ndim < 2):
                wrapper = "DeepSpeed's ZeRO"
            else:
                continue
            raise UsageError(
                f"{wrapper} has cut the parameters into flat pieces, of which no matrix step can be taken",
                hint="use FSDP2 (torch.distributed.fsdp.fully_shard, or fsdp_version: 2 in accelerate), or DDP",
            )


def check_state(groups: list[dict[str, Any]], saved: dict[str, Any]) -> None:
    """Refuse a saved state of another optimizer.

    Args:
        groups: of the optimizer that is to take it.
        saved: what its `state_dict` gave.

    Raises:
        UsageError: another number of groups or parameters, another rule, a tensor of another shape.
    """
    hint = "make the optimizer from the same model with the same options as the one that was saved"
    sizes, saved_sizes = ([len(g["params"]) for g in each] for each in (groups, saved["param_groups"]))
    if sizes != saved_sizes:
        raise UsageError(f"the saved optimizer has groups of {saved_sizes} parameters, this one of {sizes}", hint=hint)
    for number, (group, other) in enumerate(zip(groups, saved["param_groups"], strict=True)):
        if other.get("rule") != group["rule"]:
            raise UsageError(
                f"group {number} was saved with rule {other.get('rule')} and has rule {group['rule']}", hint=hint
            )
        if other["rank_schedule"] == FUNCTION and not callable(group["rank_schedule"]):
            raise UsageError(
                f"group {number} was saved with a rank schedule that is a function, which a file cannot hold",
                hint="make the optimizer with the same function",
            )
        for p, index in zip(group["params"], other["params"], strict=True):
            for key in ("momentum", "exp_avg"):
                found = saved["state"].get(index, {}).get(key)
                if isinstance(found, Tensor) and found.shape != p.shape:
                    raise UsageError(
                        f"{key} of parameter {index} was saved with shape {tuple(found.shape)}, the parameter has "
                        f"{tuple(p.shape)}",
                        hint=hint,
                    )
