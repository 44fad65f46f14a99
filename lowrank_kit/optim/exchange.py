"""Brings spread parameters together, each where its step is worked out, and spreads what comes of it.

A parameter has pieces: the tensor to work on, and what its mode keeps between steps. Each class here is one way:
`collect` gives the whole pieces of the parameters whose places are `mine`, from what each process holds of all, and
`give_back` takes whole pieces of those and gives what each process holds of all, in the forms asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement

from lowrank_kit.optim.spread import Processes, Spread, from_shard, from_whole, local

Pieces = list[Tensor]


@dataclass(frozen=True)
class Form:
    """Whole shape of a piece, and how it is spread on the mesh of its parameter; nothing for a plain tensor."""

    shape: torch.Size
    placements: tuple[Placement, ...] = ()


class Gather:
    """Every process gets everything: the readable reference, and the way for what is cut more than once.

    Args:
        params: DTensors of one shape.
        processes: counts what is sent.
    """

    def __init__(self, params: Sequence[DTensor], processes: Processes) -> None:
        self.like, self.processes = params[0], processes
        self.mine: Sequence[int] = range(len(params))

    def collect(self, pieces: list[Pieces]) -> list[Pieces]:
        return [[self._whole(x) for x in own] for own in pieces]

    def give_back(self, whole: list[Pieces], forms: Sequence[Form]) -> list[Pieces]:
        return [
            [from_whole(x, self.like, form.placements) for x, form in zip(own, forms, strict=True)] for own in whole
        ]

    def _whole(self, x: Tensor) -> Tensor:
        assert isinstance(x, DTensor)
        whole = x.full_tensor()
        # What it gets, which is on average what it sends.
        self.processes.sent += (whole.numel() - local(x).numel()) * x.element_size()
        return whole


class Owners:
    """Each parameter goes to the process that owns it, and nowhere else: one all-to-all there, and one back.

    Args:
        params: DTensors of one shape, spread alike.
        places: of each parameter; place p is owned by process p mod W.
        spread: of the parameters.
    """

    def __init__(self, params: Sequence[DTensor], places: Sequence[int], spread: Spread) -> None:
        self.like, self.spread = params[0], spread
        self.owned = _shares(places, spread.world)
        self.mine = self.owned[spread.rank]

    def collect(self, pieces: list[Pieces]) -> list[Pieces]:
        forms = [[Form(x.shape, x.placements) for x in pieces[i] if isinstance(x, DTensor)] for i in self.mine]
        received = self._swap(
            [[local(x) for i in owned for x in pieces[i]] for owned in self.owned],
            [[self._shard(form, rank) for own in forms for form in own] for rank in range(self.spread.world)],
        )
        parts = [iter(part) for part in received]
        return [[torch.cat([next(part) for part in parts], dim=self._dim(form)) for form in own] for own in forms]

    def give_back(self, whole: list[Pieces], forms: Sequence[Form]) -> list[Pieces]:
        dims = [self._dim(form) for form in forms]
        cut = [[x.split(self.spread.runs(x.shape[d]), dim=d) for x, d in zip(own, dims, strict=True)] for own in whole]
        received = self._swap(
            [[x[rank] for own in cut for x in own] for rank in range(self.spread.world)],
            [[self._shard(form, self.spread.rank) for _ in owned for form in forms] for owned in self.owned],
        )
        shards = _by_parameter(self.owned, received, len(forms))
        return [
            [from_shard(x, self.like, form.placements, form.shape) for x, form in zip(own, forms, strict=True)]
            for own in shards
        ]

    def _dim(self, form: Form) -> int:
        placement = form.placements[self.spread.axis]
        assert isinstance(placement, Shard)
        return placement.dim % len(form.shape)

    def _shard(self, form: Form, rank: int) -> torch.Size:
        shape = list(form.shape)
        shape[self._dim(form)] = self.spread.runs(form.shape[self._dim(form)])[rank]
        return torch.Size(shape)

    def _swap(self, outgoing: list[Pieces], incoming: list[list[torch.Size]]) -> list[Pieces]:
        """Send a list of tensors to each process, and get one of known shapes from each, all in float32."""
        sizes_out = [sum(x.numel() for x in pieces) for pieces in outgoing]
        sizes_in = [sum(shape.numel() for shape in shapes) for shapes in incoming]
        sent = _flat([x for pieces in outgoing for x in pieces], local(self.like).device)
        received = sent.new_empty(sum(sizes_in))
        dist.all_to_all_single(received, sent, sizes_in, sizes_out, group=self.spread.group)
        self.spread.processes.sent += (sent.numel() - sizes_out[self.spread.rank]) * sent.element_size()
        return [_unpacked(part, shapes) for part, shapes in zip(received.split(sizes_in), incoming, strict=True)]


class Replicas:
    """Every process holds every parameter, as under DDP: each steps some, and sends the result to the others.

    Args:
        params: plain tensors of one shape.
        places: of each parameter; place p is stepped by process p mod W.
        processes: with their group.
    """

    def __init__(self, params: Sequence[Tensor], places: Sequence[int], processes: Processes) -> None:
        assert processes.replicas is not None
        self.device, self.processes, self.group = params[0].device, processes, processes.replicas
        self.owned = _shares(places, dist.get_world_size(self.group))
        self.mine = self.owned[dist.get_rank(self.group)]

    def collect(self, pieces: list[Pieces]) -> list[Pieces]:
        return [pieces[i] for i in self.mine]

    def give_back(self, whole: list[Pieces], forms: Sequence[Form]) -> list[Pieces]:
        # All-gather takes equal parts: those of processes with fewer parameters are filled up.
        sent = torch.zeros(max(map(len, self.owned)) * sum(form.shape.numel() for form in forms), device=self.device)
        flat = _flat([x for own in whole for x in own], self.device)
        sent[: len(flat)] = flat
        parts = [torch.empty_like(sent) for _ in self.owned]
        dist.all_gather(parts, sent, group=self.group)
        self.processes.sent += sent.nbytes * (len(parts) - 1)
        shapes = [form.shape for form in forms]
        received = [_unpacked(part, shapes * len(owned)) for owned, part in zip(self.owned, parts, strict=True)]
        return _by_parameter(self.owned, received, len(forms))


def _shares(places: Sequence[int], world: int) -> list[list[int]]:
    """Which parameters each process owns."""
    return [[i for i, place in enumerate(places) if place % world == rank] for rank in range(world)]


def _flat(pieces: Pieces, device: torch.device) -> Tensor:
    return torch.cat([torch.empty(0, device=device), *(x.reshape(-1).float() for x in pieces)])


def _unpacked(flat: Tensor, shapes: Sequence[torch.Size]) -> Pieces:
    sizes = [shape.numel() for shape in shapes]
    flat = flat[: sum(sizes)]
    return [x.view(shape) for x, shape in zip(flat.split(sizes), shapes, strict=True)] if sizes else []


def _by_parameter(owned: list[list[int]], received: list[Pieces], number: int) -> list[Pieces]:
    """`number` pieces of each parameter, from the row of them that each owner sent."""
    found: list[Pieces] = [[] for each in owned for _ in each]
    for each, row in zip(owned, received, strict=True):
        for place, i in enumerate(each):
            found[i] = row[place * number : (place + 1) * number]
    return found
