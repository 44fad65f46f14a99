"""How a factorized matrix is stored: names, shapes and numbers of each form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lowrank_kit.checkpoint.writer import TensorSpec, tensor_bytes


@dataclass(frozen=True)
class Form:
    """A form of storage.

    Args:
        title: what is stored.
        tensors: (path of the module, dtype as safetensors says it, (out, in), rank) -> what is on disk.
    """

    title: str
    tensors: Callable[[str, str, tuple[int, int], int], list[TensorSpec]]

    def numbers(self, shape: tuple[int, int], rank: int) -> int:
        """Numbers on disk, the sentinel and an index included."""
        return sum(math.prod(size) for _, _, size in self.tensors("", "F32", shape, rank))

    def nbytes(self, shape: tuple[int, int], rank: int, dtype: str) -> int:
        """Bytes of its tensors on disk."""
        return sum(tensor_bytes(kind, size) for _, kind, size in self.tensors("", dtype, shape, rank))


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


FORMS: dict[str, Form] = {
    "factors": Form("two thin matrices, r (out + in) numbers", _factors),
    "pivoted": Form("r rows and coefficients for the rest, r (out + in) - r^2 numbers", _pivoted),
}
