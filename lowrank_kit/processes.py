"""The processes of a run: how many there are, what only the first of them does, and what they tell one another."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_kit.errors import LowRankError

T = TypeVar("T")


def num_processes() -> int:
    """Processes of this run, as torchrun and accelerate launch tell them; 1 where neither did."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_index() -> int:
    """Which of them this one is; 0 is the one that writes and prints."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return process_index() == 0


def are_connected() -> bool:
    """Whether there is a process group of several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def connect(device: torch.device) -> torch.device:
    """Join the other processes of a launch, if there are; the device of this one.

    Args:
        device: of all; of "cuda" without a number each process has its own.
    """
    if num_processes() == 1:
        return device
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def disconnect() -> None:
    """Leave the process group, at the end of the last run of a process; without that torch warns."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def on_first(work: Callable[[], T]) -> T:
    """Do something on the first process only; the others wait for it, and get its result or its error."""
    if not are_connected():
        return work()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gathered(value: T) -> list[T]:
    """The value of every process, in their order, on every process."""
    if not are_connected():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place and on each of them."""
    if are_connected():
        dist.all_reduce(tensor)
    return tensor


def check_same(what: Mapping[str, str]) -> None:
    """Refuse to go on where processes have read different things.

    Args:
        what: label -> something short, as a hash, of this process.

    Raises:
        LowRankError: on every process, if they differ.
    """
    everyone = gathered(dict(what))
    for label, own in everyone[0].items():
        for index, other in enumerate(everyone):
            if other[label] != own:
                raise LowRankError(
                    f"process {index} has another {label} than process 0: {other[label][:12]} instead of {own[:12]}",
                    hint="give all machines the same files and package versions",
                )
