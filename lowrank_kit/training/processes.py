"""Launches of a training: what falls to each process, and which are refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from lowrank_kit.errors import UsageError
from lowrank_kit.processes import are_connected, num_processes

_THEIRS = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
_HOW = "torchrun --nproc-per-node 2 --no-python lowrank train ..."


def replicas() -> dist.ProcessGroup | None:
    """The processes that share the work of the matrix rules where each holds the model whole; None where one does."""
    return dist.group.WORLD if are_connected() else None


@contextmanager
def unchanged_environment() -> Iterator[None]:
    """Undo what accelerate and the Trainer write into the environment: a later run would take it for a wish."""
    before = {name: value for name, value in os.environ.items() if name.startswith(_THEIRS)}
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith(_THEIRS) and name not in before]:
            del os.environ[name]
        os.environ.update(before)


def batch_per_process(batch_size: int) -> int:
    """Sequences of a forward pass that fall to one process.

    Raises:
        UsageError: it does not divide.
    """
    processes = num_processes()
    if batch_size % processes:
        below = batch_size - batch_size % processes
        hint = " or ".join(f"--batch-size {size}" for size in (below, below + processes) if size)
        raise UsageError(f"a batch of {batch_size} sequences does not divide over {processes} processes", hint=hint)
    return batch_size // processes


def check_launch(*, fsdp: bool, replicas: int) -> None:
    """Refuse a launch that would train something else than it says.

    Args:
        fsdp: whether the settings ask for sharding.
        replicas: groups of processes that hold the model sharded, each the whole of it.

    Raises:
        UsageError: DeepSpeed's ZeRO, Megatron-LM, FSDP1; sharding over one process; replicas that leave nothing to
            shard over, or that do not divide the processes.
    """
    plugins = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}
    for variable, name in plugins.items():
        if _is_on(variable):
            raise UsageError(
                f"{name} cuts parameters into pieces that are no matrices: NuMuon cannot step them ({variable} is set)",
                hint=f"shard with FSDP2 (--fsdp), or do not shard (DDP): {_HOW}",
            )
    if launched_with_fsdp() and os.environ.get("FSDP_VERSION", "1") == "1":
        raise UsageError(
            "FSDP1 flattens parameters, which leaves NuMuon no matrices (FSDP_VERSION is 1, accelerate's default)",
            hint="FSDP2: accelerate launch --use_fsdp --fsdp_version 2 ..., or torchrun with --fsdp; or DDP: no FSDP",
        )
    processes = num_processes()
    if fsdp and processes == 1:
        raise UsageError("--fsdp shards a model over processes, and there is one", hint=f"{_HOW} --fsdp")
    if replicas > 1 and not fsdp:
        raise UsageError(f"--replicas {replicas} is for --fsdp; DDP has a replica in every process", hint="add --fsdp")
    if fsdp and (processes % replicas or processes == replicas):
        raise UsageError(
            f"{replicas} replicas of a sharded model need a multiple of {replicas} processes, {2 * replicas} or more; "
            f"there are {processes}",
            hint="leave out --fsdp: with a whole replica in every process it is DDP"
            if processes == replicas
            else f"--replicas {next(n for n in range(min(replicas, processes // 2), 0, -1) if processes % n == 0)}",
        )


def launched_with_fsdp() -> bool:
    """Whether `accelerate launch` was told to shard."""
    return _is_on("ACCELERATE_USE_FSDP")


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")
