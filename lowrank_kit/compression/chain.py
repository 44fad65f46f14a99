"""The blocks of a model one after the other, each run by itself on what the one before gave.

Shape legend: N sequences, B of a batch, T tokens, D hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_kit.compression.statistics import in_evaluation
from lowrank_kit.errors import LowRankError
from lowrank_kit.matrices import Matrix, block_path


@dataclass(frozen=True)
class _Call:
    """What a block was called with, besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, _Call]:
        """The hidden states, which come first or by name, and the rest."""
        if args:
            return args[0], cls(args[1:], kwargs)
        return kwargs["hidden_states"], cls((), {k: v for k, v in kwargs.items() if k != "hidden_states"})


class Chain:
    """The blocks of a model, and what each is called with besides the hidden states.

    Attention masks and positions are those the model itself made for sequences of this length without padding: they
    are the same for every batch of a size.

    Args:
        model: its blocks may be exchanged or changed in between.
        paths: of its blocks, in order.
        sample: int [B or more, T], any text, to see the calls with.

    Raises:
        LowRankError: the model does not hand the output of each block to the next one as it is.
    """

    def __init__(self, model: PreTrainedModel, paths: Iterable[str], sample: Tensor, *, batch_size: int) -> None:
        self.model, self.paths = model, list(paths)
        self.batch_size = min(batch_size, len(sample))
        self._sample = sample[: self.batch_size]
        self._calls: dict[int, list[_Call]] = {}
        self._see_calls(self.batch_size)

    def enter(self, ids: Tensor) -> Tensor:
        """What the first block reads, [N, T, D] on the CPU, for int [N, T]."""
        first = self.model.get_submodule(self.paths[0])
        entered: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered.append(_Call.of(args, kwargs)[0].cpu())
            raise _Stop

        handle = first.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            for batch in ids.split(self.batch_size):
                with contextlib.suppress(_Stop):
                    self._forward(batch)
        finally:
            handle.remove()
        return torch.cat(entered)

    def run(self, index: int, block: nn.Module, hidden_BTD: Tensor) -> Tensor:
        """Output of a block, or of another in its place, for [B, T, D] on any device; on the model's."""
        if len(hidden_BTD) not in self._calls:
            self._see_calls(len(hidden_BTD))
        call = self._calls[len(hidden_BTD)][index]
        return _hidden(block(hidden_BTD.to(self.model.device), *call.args, **call.kwargs))

    def run_all(self, index: int, block: nn.Module, hidden_NTD: Tensor) -> Tensor:
        """Output of a block for all sequences, without autograd; where the input is."""
        with torch.no_grad(), in_evaluation(block):
            parts = [self.run(index, block, part).to(part.device) for part in hidden_NTD.split(self.batch_size)]
        return torch.cat(parts)

    def _see_calls(self, size: int) -> None:
        """Run a batch of a size through the dense or compressed model, and note what each block is called with."""
        seen: list[tuple[Tensor, _Call]] = []
        outputs: list[Tensor] = []

        def enters(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(_Call.of(args, kwargs))

        def leaves(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            outputs.append(_hidden(output))

        with ExitStack() as stack:
            for path in self.paths:
                block = self.model.get_submodule(path)
                stack.callback(block.register_forward_pre_hook(enters, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(leaves).remove)
            self._forward(self._sample[:size])
        for path, (hidden, _), output in zip(self.paths[1:], seen[1:], outputs, strict=False):
            if not torch.equal(hidden, output):
                raise LowRankError(
                    f"{type(self.model).__name__} changes the hidden states before {path}: its blocks are no chain",
                    hint="--objective whiten with --refine none or e2e, which need none",
                )
        self._calls[size] = [call for _, call in seen]

    def _forward(self, ids_BT: Tensor) -> None:
        with torch.no_grad(), in_evaluation(self.model):
            self.model.base_model(input_ids=ids_BT.to(self.model.device, torch.int64), use_cache=False)


def block_paths(matrices: Iterable[Matrix]) -> list[str]:
    """Paths of the blocks that hold matrices, in their order."""
    paths = {matrix.block: block_path(matrix.name) for matrix in matrices if matrix.block is not None}
    return [paths[index] for index in sorted(paths)]


def read_input(chain: Chain, index: int, block: nn.Module, path: str, hidden_NTD: Tensor) -> Iterator[Tensor]:
    """What a module of a block reads, batch by batch; the block is run no further than to it.

    Args:
        index, block, hidden_NTD: as in `Chain.run_all`.
        path: of the module in the block.

    Raises:
        LowRankError: the module is not reached.
    """
    for batch in hidden_NTD.split(chain.batch_size):
        read: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Tensor, ...], read: list[Tensor] = read) -> None:
            read.append(args[0])
            raise _Stop

        handle = block.get_submodule(path).register_forward_pre_hook(stop)
        try:
            with contextlib.suppress(_Stop), torch.no_grad(), in_evaluation(block):
                chain.run(index, block, batch)
        finally:
            handle.remove()
        if not read:
            raise LowRankError(f"the calibration text does not reach {chain.paths[index]}.{path}")
        yield read[0]


class _Stop(Exception):
    """Enough has been run."""


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
