"""The blocks of a model one after the other, each run by itself on what the one before gave.

Shape legend: N sequences, B of a batch, T tokens, D hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from lowrank_kit.checkpoint.loading import in_evaluation
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

    def same_as(self, other: _Call) -> bool:
        """Whether all tensors in both are equal."""
        pairs = zip(tree_leaves((self.args, self.kwargs)), tree_leaves((other.args, other.kwargs)), strict=True)
        return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))


class Chain:
    """The blocks of a model, and what each is called with besides the hidden states.

    Attention masks and positions are those the model itself made for sequences of this length without padding: they
    are the same for every batch of a size, which is checked.

    Args:
        model: its blocks may be exchanged or changed in between.
        paths: of its blocks, in order.
        sample: int [B or more, T], any text, to see the calls with.

    Raises:
        LowRankError: the model does not run these blocks once each in this order, does not hand the output of each to
            the next one as it is, or hands them more of the text.
    """

    def __init__(self, model: PreTrainedModel, paths: Iterable[str], sample: Tensor, *, batch_size: int) -> None:
        self.model, self.paths = model, list(paths)
        self.batch_size = min(batch_size, len(sample))
        self._sample = sample[: self.batch_size]
        self._calls = {self.batch_size: self._see_calls(self._sample)}
        for path, call, other in zip(
            self.paths, self._calls[self.batch_size], self._see_calls(self._sample.flip(1)), strict=True
        ):
            if not call.same_as(other):
                self._refuse(f"calls {path} with more of the text than the hidden states")

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
        self.know(len(hidden_BTD))
        call = self._calls[len(hidden_BTD)][index]
        return _hidden(block(hidden_BTD.to(self.model.device), *call.args, **call.kwargs))

    def run_all(self, index: int, block: nn.Module, hidden_NTD: Tensor) -> Tensor:
        """Output of a block for all sequences, without autograd; where the input is."""
        with torch.no_grad(), in_evaluation(block):
            parts = [self.run(index, block, part).to(part.device) for part in hidden_NTD.split(self.batch_size)]
        return torch.cat(parts)

    def know(self, size: int) -> None:
        """See what the blocks are called with for so many sequences, unless it is known."""
        if size not in self._calls:
            self._calls[size] = self._see_calls(self._sample[:size])

    def _see_calls(self, ids_BT: Tensor) -> list[_Call]:
        """Run a batch through the dense or compressed model, and note what each block is called with."""
        order: list[str] = []
        seen: list[tuple[Tensor, _Call]] = []
        outputs: list[Tensor] = []

        def enters(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str) -> None:
            order.append(path)
            seen.append(_Call.of(args, kwargs))

        def leaves(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            outputs.append(_hidden(output))

        with ExitStack() as stack:
            for path in self.paths:
                block = self.model.get_submodule(path)
                stack.callback(block.register_forward_pre_hook(partial(enters, path=path), with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(leaves).remove)
            self._forward(ids_BT)
        if order != self.paths:
            self._refuse(f"runs {', '.join(order)}, not {', '.join(self.paths)}")
        for path, (hidden, _), output in zip(self.paths[1:], seen[1:], outputs, strict=False):
            if not torch.equal(hidden, output):
                self._refuse(f"changes the hidden states before {path}")
        return [call for _, call in seen]

    def _refuse(self, why: str) -> NoReturn:
        raise LowRankError(
            f"{type(self.model).__name__} {why}: its blocks are no chain",
            hint="--objective whiten with --refine none or e2e, which need none",
        )

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

        chain.know(len(batch))  # before there is a hook that would stop it
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
