"""Texts on their way through the blocks of the dense and of the compressed model.

Shape legend: N sequences, B of a batch, T tokens, D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain as concatenated
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank_kit.compression.chain import Chain
from lowrank_kit.compression.piece import Piece
from lowrank_kit.compression.streams import Spilled, Stream, new_stream
from lowrank_kit.compression.team import agreed, share_of


class Flow:
    """The streams of some texts, all before the same block unless said otherwise.

    Args:
        chain: the blocks.
        texts: name -> int [N, T], of which this process takes its share.
        changed: names of the texts that also flow through the compressed model.
        spill: folder for the streams; None keeps them in memory.
    """

    def __init__(self, chain: Chain, texts: Mapping[str, Tensor], changed: Collection[str], spill: Path | None) -> None:
        self.chain, self.spill = chain, spill
        self.texts = {name: share_of(ids) for name, ids in texts.items()}
        self.dense: dict[str, Stream] = {}
        self.changed: dict[str, Stream] = {}
        self._changed_names = [name for name in texts if name in changed]

    def enter(self, before: Mapping[str, Piece]) -> None:
        """Begin at the first block.

        Args:
            before: what has been made of matrices that come before it.
        """
        with self.chain.entering(), torch.no_grad():
            for name, ids in self.texts.items():
                self.dense[name] = new_stream(self.spill, f"{name}-dense", self.chain.enter(ids), len(ids))
            with exchanged(self.chain.model, before):
                for name in self._changed_names:
                    ids = self.texts[name]
                    self.changed[name] = new_stream(self.spill, f"{name}-changed", self.chain.enter(ids), len(ids))

    def restore(self, place: int) -> bool:
        """Take up spilled streams that stand before block `place`; whether they are all there."""
        if self.spill is None:
            return False
        wanted = {f"{name}-dense" for name in self.texts} | {f"{name}-changed" for name in self._changed_names}
        found = {name: Spilled.find(self.spill, name, place) for name in wanted}
        there = {name: stream for name, stream in found.items() if stream is not None}
        if not agreed(len(there) == len(wanted)):
            return False
        self.dense = {name: there[f"{name}-dense"] for name in self.texts}
        self.changed = {name: there[f"{name}-changed"] for name in self._changed_names}
        return True

    def run_dense(self, name: str, index: int, block: nn.Module) -> None:
        """Move a dense stream on."""
        self.dense[name] = self.chain.run_all(index, block, self.dense[name])

    def peek(self, name: str, index: int, block: nn.Module) -> None:
        """Run a block on a dense stream, which stays where it is."""
        with torch.no_grad():
            for _, batch in self.dense[name].batches(self.chain.batch_size):
                self.chain.run(index, block, batch)

    def run_changed(self, index: int, block: nn.Module) -> None:
        """Move all streams of the compressed model on."""
        for name, stream in self.changed.items():
            self.changed[name] = self.chain.run_all(index, block, stream)

    def settle(self) -> None:
        """Give up what streams were at earlier places."""
        for stream in concatenated(self.dense.values(), self.changed.values()):
            stream.settle()


@contextmanager
def exchanged(model: nn.Module, pieces: Mapping[str, Piece]) -> Iterator[None]:
    """Inside, low-rank layers are in the place of some matrices of a model; its own come back afterwards."""
    with ExitStack() as stack:
        for name, piece in pieces.items():
            stack.callback(model.set_submodule, name, model.get_submodule(name))
            piece.install(model)
        yield


def twin(block: nn.Module) -> nn.Module:
    """A block with the same tensors, whose modules can be exchanged apart from it."""
    tensors = [*block.parameters(), *block.buffers()]
    return copy.deepcopy(block, {id(tensor): tensor for tensor in tensors})
