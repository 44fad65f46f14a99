"""Parameters that are spread over processes: where their shards are, and what is sent for them.

A parameter is spread when it is a DTensor, as FSDP2's are. Every process has to step the same parameters in the same
order. Shape legend: a parameter is [out, in], or [experts, out, in]; W processes share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from lowrank_kit.linalg.shards import Shards


@dataclass
class Processes:
    """What an optimizer knows of the processes it runs in.

    Args:
        replicas: those that hold the same parameters, as DDP has it, and share the work; None: each does all of it.
        sent: bytes that this one has sent, as a ring of W does it: an all-reduce of s bytes sends 2 s (W - 1) / W, an
            all-gather W - 1 times the own part.
    """

    replicas: dist.ProcessGroup | None = None
    sent: int = 0


def local(x: Tensor) -> Tensor:
    """What this process holds of a tensor; in-place changes of it change the tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def from_shard(x: Tensor, like: DTensor, placements: Sequence[Placement], shape: torch.Size) -> DTensor:
    """The tensor of `shape` whose shard here is `x`, on the mesh of `like`."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(x, like.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def from_whole(x: Tensor, like: DTensor, placements: Sequence[Placement]) -> DTensor:
    """A tensor that every process holds, spread on the mesh of `like`; sends nothing."""
    mesh = like.device_mesh
    whole = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=placements)


@dataclass(frozen=True)
class Spread:
    """Where the shards of a parameter are: along one of its dimensions, over the W processes of one group.

    Args:
        axis: of the mesh.
        dim: of the parameter, as it is stored.
        group: the processes; in a mesh with replicas each row of it is a group of its own.
        world: W.
        rank: place of this process in the group.
        processes: counts what is sent.
    """

    axis: int
    dim: int
    group: dist.ProcessGroup
    world: int
    rank: int
    processes: Processes

    def runs(self, length: int) -> list[int]:
        """How much of a dimension each process holds: as `torch.chunk` cuts it, the last ones perhaps nothing."""
        chunk = -(-length // self.world)
        return [max(0, min(length - chunk * rank, chunk)) for rank in range(self.world)]

    def own(self, x: Tensor) -> Tensor:
        """The rows, in the first dimension, that this process holds of a whole tensor."""
        runs = self.runs(x.shape[0])
        return x[sum(runs[: self.rank]) :][: runs[self.rank]]

    def shards(self) -> Shards:
        """What the maths asks of the other processes."""
        return Shards(
            sum=lambda x: self._reduced(x, dist.ReduceOp.SUM),
            max=lambda x: self._reduced(x, dist.ReduceOp.MAX),
            stack=self._stacked,
            index=self.rank,
        )

    def _reduced(self, x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        x = x.contiguous()
        dist.all_reduce(x, operation, group=self.group)
        self.processes.sent += 2 * x.nbytes * (self.world - 1) // self.world
        return x

    def _stacked(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        found = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(found, x, group=self.group)
        self.processes.sent += x.nbytes * (self.world - 1)
        return torch.cat(found, dim=-2)


def is_whole(p: Tensor) -> bool:
    """Whether this process holds all of a parameter."""
    return not isinstance(p, DTensor) or not _cuts(p)


def spread_of(p: Tensor, processes: Processes) -> Spread | None:
    """How a parameter is spread; None where it is not, or is cut more than once, as by tensor parallelism and FSDP."""
    if not isinstance(p, DTensor) or len(_cuts(p)) != 1:
        return None
    (axis,) = _cuts(p)
    placement = p.placements[axis]
    if type(placement) is not Shard:
        return None
    group = p.device_mesh.get_group(axis)
    return Spread(axis, placement.dim % p.ndim, group, dist.get_world_size(group), dist.get_rank(group), processes)


def memory_placements(p: DTensor, processes: Processes) -> list[Placement]:
    """How what a matrix keeps between steps is spread: by its first dimension where the parameter is, by any."""
    spread = spread_of(p, processes)
    placements: list[Placement] = [Replicate()] * p.device_mesh.ndim
    if spread is not None:
        placements[spread.axis] = Shard(0)
    return placements


def spread_like(p: Tensor, x: Tensor, processes: Processes) -> Tensor:
    """A tensor of a saved state where its parameter is: whole for a plain one, on the mesh of one that is spread."""
    if not isinstance(p, DTensor):
        return x.full_tensor() if isinstance(x, DTensor) else x
    if isinstance(x, DTensor):
        return x
    return from_whole(x, p, p.placements if x.shape == p.shape else memory_placements(p, processes))


def least_of_all(value: float, p: Tensor, processes: Processes) -> float:
    """The least value among the processes that share a parameter."""
    groups = [processes.replicas] if processes.replicas is not None else []
    if isinstance(p, DTensor):
        groups = [p.device_mesh.get_group(axis) for axis in range(p.device_mesh.ndim)]
    found = torch.tensor(value, device=p.device)
    for group in groups:
        dist.all_reduce(found, dist.ReduceOp.MIN, group=group)
    return found.item()


def _cuts(p: DTensor) -> list[int]:
    """Dimensions of the mesh along which a parameter is not the same."""
    mesh = p.device_mesh
    return [i for i, placement in enumerate(p.placements) if not placement.is_replicate() and mesh.size(i) > 1]
