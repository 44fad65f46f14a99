"""How a model is sharded: FSDP2 through accelerate, in one dimension or with replicas (HSDP)."""

from __future__ import annotations

from typing import Any

from accelerate import ParallelismConfig, PartialState
from accelerate.utils import DistributedType
from torch import nn

from lowrank_kit.errors import UsageError
from lowrank_kit.processes import num_processes


def sharding_arguments(model: nn.Module, *, fsdp: bool, replicas: int) -> dict[str, Any]:
    """What `TrainingArguments` takes to shard a model with FSDP2; nothing where it is not to be sharded.

    Args:
        model: whose `_no_split_modules` are sharded each for itself.
        fsdp: whether to shard.
        replicas: groups of processes that hold the model once each; they divide the processes.
    """
    if not fsdp:
        return {}
    named = set(getattr(model, "_no_split_modules", None) or ())
    # A class may name modules of its relatives, which accelerate would look for in vain.
    layers = sorted({type(module).__name__ for module in model.modules()} & named)
    config = {"version": 2, "transformer_layer_cls_to_wrap": layers, "cpu_ram_efficient_loading": False}
    arguments: dict[str, Any] = {"fsdp": True, "fsdp_config": config}
    if replicas > 1:
        arguments["parallelism_config"] = ParallelismConfig(
            dp_replicate_size=replicas, dp_shard_size=num_processes() // replicas
        )
    return arguments


def check_can_shard() -> None:
    """Refuse to train unsharded what was to be sharded, as accelerate would, without a word, on the CPU.

    Raises:
        UsageError: there is no device that accelerate shards on.
    """
    state = PartialState()
    if state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise UsageError(
            f"FSDP: accelerate shards on GPUs and other accelerators, and this process would use the {state.device}",
            hint="leave out --fsdp: every process then holds the model (DDP)",
        )
