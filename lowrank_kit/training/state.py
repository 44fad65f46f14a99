"""What a run needs to go on from a checkpoint: weights, the optimizer's state, schedule, and random states.

Parameters go by their names in the model, and so does what the optimizer keeps for them; what is no tensor is plain
JSON. A restored state is bit for bit the saved one; on other processes than it was saved on, each takes its part.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, zeros
from transformers import set_seed

from lowrank_kit.errors import UsageError
from lowrank_kit.optim.groups import FUNCTION
from lowrank_kit.processes import gathered, num_processes, process_index
from lowrank_kit.training.checkpoints import load_tensors, read_document, read_manifest, save_checkpoint, saved_shapes

logger = logging.getLogger(__name__)

OPTIMIZER_FILE, SCHEDULE_FILE, RANDOM_FILE = "optimizer.json", "schedule.json", "random.json"
_MODEL, _OPTIMIZER = "model.", "optimizer."
# Keys of a group that are no settings: tensors, and names that are compared.
_MEMBERS = ("params", "param_names")


def save_state(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    schedules: Mapping[str, Any],
    documents: Mapping[str, Mapping[str, Any]],
    keep: int,
) -> Path:
    """Write a checkpoint of a run; called on every process at once.

    Args:
        folder: of the checkpoints.
        step: optimizer steps made.
        model: whole, or sharded by FSDP2.
        optimizer: whose parameters are the model's.
        schedules: name -> what has a `state_dict` of plain values: learning-rate scheduler, gradient scaler.
        documents: further files, file name -> JSON object.
        keep: how many checkpoints stay.

    Raises:
        LowRankError: see `save_checkpoint`.
    """
    names = _parameter_names(model)
    tensors = {f"{_MODEL}{name}": tensor for name, tensor in model_tensors(model).items()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            tensors |= {f"{_OPTIMIZER}{names[p]}:{key}": value for key, value in state.items()}
    files: dict[str, Mapping[str, Any]] = {
        OPTIMIZER_FILE: {"groups": [_saved_group(group, names) for group in optimizer.param_groups]},
        SCHEDULE_FILE: {name: each.state_dict() for name, each in schedules.items()},
        RANDOM_FILE: {"processes": gathered(_random_state())},
        **documents,
    }
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return save_checkpoint(folder, step, contiguous, files, keep=keep)


def load_state(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, schedules: Mapping[str, Any]
) -> None:
    """Put weights, optimizer and schedules where they were; called on every process at once.

    Args:
        checkpoint: a whole one, saved by any number of processes, sharded or not.
        model: as it trains, whole or sharded by FSDP2.
        optimizer: made for it, with no step made yet.
        schedules: as in `save_state`.

    Raises:
        UsageError: the checkpoint is of another model or another optimizer.
    """
    saved = saved_shapes(checkpoint)
    names = _parameter_names(model)
    targets = {f"{_MODEL}{name}": tensor.detach() for name, tensor in model_tensors(model).items()}
    _check_model(checkpoint, saved, targets)
    states = {p: _empty_state(p, f"{_OPTIMIZER}{name}:", saved) for p, name in names.items()}
    for p, state in states.items():
        targets |= {f"{_OPTIMIZER}{names[p]}:{key}": tensor for key, tensor in state.items()}
    groups = read_document(checkpoint, OPTIMIZER_FILE)["groups"]
    _check_groups(checkpoint, [_saved_group(group, names) for group in optimizer.param_groups], groups)
    load_tensors(checkpoint, targets)
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        group.update({key: _like(group.get(key), value) for key, value in values.items() if key not in _MEMBERS})
        for p in group["params"]:
            if states[p]:
                optimizer.state[p] = states[p]
    stored = read_document(checkpoint, SCHEDULE_FILE)
    for name, each in schedules.items():
        if name in stored:
            each.load_state_dict(stored[name])


def load_random_state(checkpoint: Path, seed: int) -> None:
    """Go on with the random numbers of this process where the checkpoint left them.

    Args:
        checkpoint: a whole one.
        seed: of the run. Where this process is one more than there were, it seeds its own random numbers.
    """
    saved, index = read_manifest(checkpoint)["processes"], process_index()
    if saved != num_processes():
        logger.info("saved by %d processes, going on with %d: dropout falls differently", saved, num_processes())
    if index >= saved:
        set_seed(seed + index)
        return
    _set_random_state(read_document(checkpoint, RANDOM_FILE)["processes"][index])


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter or buffer of what a checkpoint of a model holds; tied parameters once."""
    held = model.state_dict(keep_vars=True)
    unique = {id(tensor): name for name, tensor in reversed(held.items())}
    return {name: held[name] for name in held if unique[id(held[name])] == name}


def _parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    return {p: name for name, p in model.named_parameters()}


def _saved_group(group: Mapping[str, Any], names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
    """A group as JSON holds it: its parameters by name, a schedule that is a function by a word."""
    plain = {key: FUNCTION if callable(value) else value for key, value in group.items() if key not in _MEMBERS}
    return {**plain, "param_names": [names[p] for p in group["params"]]}


def _empty_state(p: nn.Parameter, prefix: str, saved: Mapping[str, tuple[tuple[int, ...], Any]]) -> dict[str, Tensor]:
    """What to read the optimizer's state of a parameter into: sharded as the parameter is, counters on the CPU."""
    state: dict[str, Tensor] = {}
    for name, (shape, dtype) in saved.items():
        if not name.startswith(prefix):
            continue
        if not shape:
            state[name.removeprefix(prefix)] = torch.zeros(shape, dtype=dtype)
        elif isinstance(p, DTensor):
            made = zeros(shape, dtype=dtype, device_mesh=p.device_mesh, placements=p.placements)
            state[name.removeprefix(prefix)] = made
        else:
            state[name.removeprefix(prefix)] = torch.zeros(shape, dtype=dtype, device=p.device)
    return state


def _check_model(
    checkpoint: Path, saved: Mapping[str, tuple[tuple[int, ...], Any]], targets: Mapping[str, Tensor]
) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in targets.items()}
    found = {name: shape for name, (shape, _) in saved.items() if name.startswith(_MODEL)}
    for name in [*expected, *(name for name in found if name not in expected)]:
        if expected.get(name) != found.get(name):
            there, here = (str(shapes.get(name, "not there")) for shapes in (found, expected))
            raise UsageError(
                f"{checkpoint} is of another model: {name.removeprefix(_MODEL)} is {there} in it, here {here}",
                hint="resume with the model that the run was started with",
            )


def _check_groups(checkpoint: Path, groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    hint = "resume with the optimizer that the run was started with"
    if len(groups) != len(saved):
        raise UsageError(f"{checkpoint} has {len(saved)} optimizer groups, this run {len(groups)}", hint=hint)
    for number, (group, other) in enumerate(zip(groups, saved, strict=True)):
        for key in ("param_names", "rule"):
            if group.get(key) != other.get(key):
                raise UsageError(
                    f"{checkpoint}: optimizer group {number} was saved with another {key}: {_short(other.get(key))} "
                    f"instead of {_short(group.get(key))}",
                    hint=hint,
                )


def _short(value: Any) -> str:
    return f"{value}" if len(f"{value}") < 80 else f"{value}"[:77] + "..."


def _like(present: Any, value: Any) -> Any:
    """JSON knows no tuples, and no functions."""
    if value == FUNCTION:
        return present
    return tuple(value) if isinstance(present, tuple) else value


def _random_state() -> dict[str, Any]:
    """Of Python, numpy and torch, as JSON holds it."""
    kind, keys, *position = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *position],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = bytes(torch.cuda.get_rng_state().tolist()).hex()
    return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_bytes(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
