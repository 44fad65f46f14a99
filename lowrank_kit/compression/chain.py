"""The blocks of a model one after the other, each run by itself on what the one before gave.

Shape legend: N sequences, B of a batch, T tokens, D hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from lowrank_kit.checkpoint.loading import in_evaluation
from lowrank_kit.checkpoint.partial import PartialModel
from lowrank_kit.compression.streams import Stream
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
    are the same for every batch of a size, which is checked. No block is run to see them, so that blocks may be empty.

    Args:
        model: its blocks are never changed.
        paths: of its blocks, in order.
        sample: int [B or more, T], any text, to see the calls with.
        parts: fills what of the model is needed outside of the blocks; None for a model that is whole.

    Raises:
        NoChainError: the model does not run these blocks once each in this order, does not hand the output of each to
            the next one as it is, or hands them more of the text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        paths: Iterable[str],
        sample: Tensor,
        *,
        batch_size: int,
        parts: PartialModel | None = None,
    ) -> None:
        self.model, self.paths, self.parts = model, list(paths), parts
        self.batch_size = min(batch_size, len(sample))
        self._after: set[str] | None = None
        self._sample = sample[: self.batch_size]
        with self.entering():
            self._answer, calls = self._find_answer()
            self._calls = {self.batch_size: calls}
            for path, call, other in zip(
                self.paths, calls, self._see_calls(self._sample.flip(1), self._answer), strict=True
            ):
                if not call.same_as(other):
                    self._refuse(f"calls {path} with more of the text than the hidden states")

    def entering(self) -> AbstractContextManager[None]:
        """Inside, what `enter` needs is there: all that is outside of the blocks, but the head."""
        return self._outside(self.model.get_output_embeddings())

    def leaving(self) -> AbstractContextManager[None]:
        """Inside, what `leave` needs is there: all that is outside of the blocks, but embeddings that are no head."""
        return self._outside(self.model.get_input_embeddings())

    def _outside(self, without: nn.Module | None) -> AbstractContextManager[None]:
        if self.parts is None:
            return contextlib.nullcontext()
        not_needed = [name for name, module in self.model.named_modules() if module is without]
        return self.parts.filled(self.parts.outside([*self.paths, *not_needed]))

    def inside(self, index: int) -> AbstractContextManager[None]:
        """Inside, the weights of a block are there."""
        return (
            contextlib.nullcontext() if self.parts is None else self.parts.filled(self.parts.below(self.paths[index]))
        )

    def empty(self, index: int) -> None:
        """Give the memory of a block's weights back, inside of `inside`; a twin of it keeps its own."""
        if self.parts is not None:
            self.parts.forget(self.parts.below(self.paths[index]))

    @contextmanager
    def emptied(self, index: int) -> Iterator[None]:
        """Inside, which is inside of `inside`, the weights of a block are not there; afterwards they are again."""
        self.empty(index)
        yield
        if self.parts is not None:
            self.parts.fill(self.parts.below(self.paths[index]))

    def block(self, index: int) -> nn.Module:
        """The model's own."""
        return self.model.get_submodule(self.paths[index])

    def enter(self, ids: Tensor) -> Iterator[Tensor]:
        """What the first block reads, [B, T, D] on the CPU, for int [N, T]; inside of `entering`.

        As `run` and `leave`, it leaves autograd to the caller.
        """
        first = self.block(0)

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered.append(_Call.of(args, kwargs)[0].cpu())
            raise _Stop

        for batch in ids.split(self.batch_size):
            entered: list[Tensor] = []
            handle = first.register_forward_pre_hook(stop, with_kwargs=True)
            try:
                with contextlib.suppress(_Stop):
                    self._forward(batch)
            finally:
                handle.remove()
            yield entered[0]

    def leave(self, ids_BT: Tensor, hidden_BTD: Tensor) -> Tensor:
        """Logits [B, T, V] for what the last block gave; inside of `leaving`."""
        hidden_BTD = hidden_BTD.to(self.device)
        embeddings: Any = self.model.get_input_embeddings()
        nothing = hidden_BTD.new_zeros(*ids_BT.shape, embeddings.weight.shape[1])
        with ExitStack() as stack:
            stack.enter_context(self._standing_in(lambda path, args, kwargs: self._answer(hidden_BTD)))
            stack.enter_context(_instead(embeddings, lambda *args, **kwargs: nothing))
            stack.enter_context(in_evaluation(self.model))
            logits: Tensor = self.model(input_ids=self._ids(ids_BT), use_cache=False).logits
        return logits

    def run(self, index: int, block: nn.Module, hidden_BTD: Tensor) -> Tensor:
        """Output of a block, or of another in its place, for [B, T, D] on any device; on the model's."""
        self.know(len(hidden_BTD))
        call = self._calls[len(hidden_BTD)][index]
        return _hidden(block(hidden_BTD.to(self.device), *call.args, **call.kwargs))

    def run_all(self, index: int, block: nn.Module, stream: Stream) -> Stream:
        """What a block makes of all sequences, without autograd; the stream is used up.

        Raises:
            LowRankError: NaN or Inf in it.
        """

        def run(hidden_BTD: Tensor) -> Tensor:
            with torch.no_grad(), in_evaluation(block):
                given = self.run(index, block, hidden_BTD).cpu()
            if not given.isfinite().all():
                raise LowRankError(
                    f"NaN or Inf in the output of {self.paths[index]}: "
                    f"{int((~given.isfinite()).sum())} of {given.numel()} activations",
                    hint="try --dtype float32; if the dense model itself gives NaN on this text, it is broken",
                )
            return given

        return stream.advance(run, self.batch_size, index + 1)

    @property
    def device(self) -> torch.device:
        """Where blocks run."""
        return self.model.device if self.parts is None else self.parts.device

    def is_after(self, name: str) -> bool:
        """Whether a module outside of the blocks is run after the last of them."""
        if self._after is None:
            self._after = self._see_after()
        return name in self._after

    def know(self, size: int) -> None:
        """See what the blocks are called with for so many sequences, unless it is known."""
        if size not in self._calls:
            with self.entering():
                self._calls[size] = self._see_calls(self._sample[:size], self._answer)

    def _find_answer(self) -> tuple[_Answer, list[_Call]]:
        """How blocks give their output, and what they are called with."""
        refused: list[NoChainError] = []
        for answer in _ANSWERS:
            try:
                return answer, self._see_calls(self._sample, answer)
            except NoChainError as error:
                refused.append(error)
        raise refused[0]

    def _see_calls(self, ids_BT: Tensor, answer: _Answer) -> list[_Call]:
        """Run a batch through the model, blocks apart, and note what each block is called with."""
        order: list[str] = []
        calls: list[_Call] = []
        given: Tensor | None = None

        def note(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal given
            hidden, call = _Call.of(args, kwargs)
            if isinstance(hidden, Tensor) and hidden.ndim != 3:
                self._refuse(f"runs several streams at once through {path}, {list(hidden.shape)}")
            if given is not None and not (isinstance(hidden, Tensor) and torch.equal(hidden, given)):
                self._refuse(f"changes the hidden states before {path}")
            order.append(path)
            calls.append(call)
            # Other numbers, so that a block that is handed an earlier one's output is seen.
            given = hidden.flip(0, 1) + 1
            return answer(given)

        try:
            with self._standing_in(note), torch.no_grad():
                self._forward(ids_BT)
        # What a model does with an output that it does not expect.
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            self._refuse(f"stops when its blocks are run apart ({type(error).__name__}: {error})")
        if order != self.paths:
            self._refuse(f"runs {', '.join(order)}, not {', '.join(self.paths)}")
        return calls

    def _see_after(self) -> set[str]:
        """Names of the modules that are run after the last block."""
        after: set[str] = set()
        passed = False

        def note(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal passed
            passed = path == self.paths[-1]
            return self._answer(_Call.of(args, kwargs)[0])

        def reached(name: str) -> None:
            if passed:
                after.add(name)

        with ExitStack() as stack:
            stack.enter_context(self.entering())
            stack.enter_context(self.leaving())
            for name, module in self.model.named_modules():
                stack.callback(module.register_forward_pre_hook(lambda *_, name=name: reached(name)).remove)
            stack.enter_context(self._standing_in(note))
            stack.enter_context(in_evaluation(self.model))
            stack.enter_context(torch.no_grad())
            self.model(input_ids=self._ids(self._sample[:1]), use_cache=False)
        return after

    @contextmanager
    def _standing_in(self, answer: Callable[[str, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
        """Inside, no block runs: what it is called with goes to `answer`, and what that gives is its output."""
        with ExitStack() as stack:
            for path in self.paths:
                instead = partial(_answered, answer, path)
                stack.enter_context(_instead(self.model.get_submodule(path), instead))
            yield

    def _refuse(self, why: str) -> NoReturn:
        raise NoChainError(
            f"{type(self.model).__name__} {why}: its blocks are no chain",
            hint="--objective whiten with --refine none or e2e, which need none",
        )

    def _forward(self, ids_BT: Tensor) -> None:
        with in_evaluation(self.model):
            self.model.base_model(input_ids=self._ids(ids_BT), use_cache=False)

    def _ids(self, ids_BT: Tensor) -> Tensor:
        return ids_BT.to(self.device, torch.int64)


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, something else is run in the place of a module; its hooks are run as ever."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _answered(answer: Callable[..., Any], path: str, *args: Any, **kwargs: Any) -> Any:
    return answer(path, args, kwargs)


class NoChainError(LowRankError):
    """A model whose blocks cannot be run one by one."""


def block_paths(matrices: Iterable[Matrix]) -> list[str]:
    """Paths of the blocks that hold matrices, in their order."""
    paths = {matrix.block: block_path(matrix.name) for matrix in matrices if matrix.block is not None}
    return [paths[index] for index in sorted(paths)]


def read_input(chain: Chain, index: int, block: nn.Module, path: str, stream: Stream) -> Iterator[Tensor]:
    """What a module of a block reads, batch by batch; the block is run no further than to it.

    Args:
        index, block, stream: as in `Chain.run_all`; the stream stays as it is.
        path: of the module in the block.

    Raises:
        LowRankError: the module is not reached.
    """
    for _, batch in stream.batches(chain.batch_size):
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
    return output[0] if isinstance(output, tuple | list) else output


_Answer = Callable[[Tensor], Any]
# How blocks give the hidden states: as they are, or first of several.
_ANSWERS: tuple[_Answer, ...] = (lambda hidden: hidden, lambda hidden: (hidden,), lambda hidden: (hidden, None))
