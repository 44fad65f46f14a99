"""How a factorized matrix is stored: names, shapes and numbers of each form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_kit.checkpoint.stacks import StoredStack, Unit
from lowrank_kit.checkpoint.writer import TensorSpec, tensor_bytes
from lowrank_kit.layers import STACKED
from lowrank_kit.linalg.factor import Factors
from lowrank_kit.linalg.pivot import Pivoted, pivot


@dataclass(frozen=True)
class Form:
    """A form of storage.

    Args:
        title: what is stored.
        tensors: (path of the module, dtype as safetensors says it, (out, in), rank) -> what is on disk;
            the sentinels are last.
        split: factors -> what is stored of them, in the order of `tensors` and without the sentinel.
        join: what `split` gives -> W'.
        sentinels: their shapes.
    """

    title: str
    tensors: Callable[[str, str, tuple[int, int], int], list[TensorSpec]]
    split: Callable[[Factors], tuple[Tensor, ...]]
    join: Callable[..., Tensor]
    sentinels: tuple[tuple[int, ...], ...] = ((1,),)

    def numbers(self, shape: tuple[int, int], rank: int) -> int:
        """Numbers on disk, the sentinel and an index included."""
        return sum(math.prod(size) for _, _, size in self.tensors("", "F32", shape, rank))

    def nbytes(self, shape: tuple[int, int], rank: int, dtype: str) -> int:
        """Bytes of its tensors on disk."""
        return sum(tensor_bytes(kind, size) for _, kind, size in self.tensors("", dtype, shape, rank))

    def stored(self, factors: Factors, dtype: torch.dtype) -> list[Tensor]:
        """What is written of B A, in the order of `tensors`: numbers rounded to `dtype`, an index as it is."""
        parts = [part.to(dtype) if part.is_floating_point() else part for part in self.split(factors)]
        return [*parts, *(torch.zeros(size, dtype=dtype, device=factors.A.device) for size in self.sentinels)]


def _factors(path: str, dtype: str, shape: tuple[int, int], rank: int) -> list[TensorSpec]:
    out, inputs = shape
    return [
        (f"{path}.A.weight", dtype, (rank, inputs)),
        (f"{path}.B.weight", dtype, (out, rank)),
        (f"{path}.weight", dtype, (1,)),
    ]


def _pivoted(path: str, dtype: str, shape: tuple[int, int], rank: int) -> list[TensorSpec]:
    out, inputs = shape
    return [
        (f"{path}.A.weight", dtype, (rank, inputs)),
        (f"{path}.C.weight", dtype, (out - rank, rank)),
        (f"{path}.index", "I32", (out,)),
        (f"{path}.weight", dtype, (1,)),
    ]


def _split_pivoted(factors: Factors) -> tuple[Tensor, ...]:
    pivoted = pivot(factors.B, factors.A)
    return pivoted.rows, pivoted.coefficients, pivoted.index


FORMS: dict[str, Form] = {
    "factors": Form(
        "two thin matrices, r (out + in) numbers", _factors, lambda factors: (factors.A, factors.B), lambda A, B: B @ A
    ),
    "pivoted": Form(
        "r rows and coefficients for the rest, r (out + in) - r^2 numbers",
        _pivoted,
        _split_pivoted,
        lambda *parts: Pivoted(*parts).dense(),
    ),
}


def form_of(unit: Unit, name: str) -> Form:
    """A form by its name: of `FORMS`, or the stacked one of these experts."""
    return _stacked(unit) if isinstance(unit, StoredStack) else FORMS[name]


def _stacked(stack: StoredStack) -> Form:
    """Two factors for each expert, of one rank."""

    def tensors(path: str, dtype: str, shape: tuple[int, int], rank: int) -> list[TensorSpec]:
        out, inputs = shape
        return [
            (f"{path}.{stack.factors}.A", dtype, (stack.count, rank, inputs)),
            (f"{path}.{stack.factors}.B", dtype, (stack.count, out, rank)),
            *((name, dtype, size) for name, size in stack.sentinels),
        ]

    return Form(
        TITLES[STACKED],
        tensors,
        FORMS["factors"].split,
        FORMS["factors"].join,
        tuple(size for _, size in stack.sentinels),
    )


TITLES = {name: form.title for name, form in FORMS.items()} | {
    STACKED: "two thin matrices for each expert, r (out + in) numbers"
}
