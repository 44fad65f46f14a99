"""The hidden states of a text between two blocks: in memory, or in a file.

Shape legend: N sequences, B of a batch, T tokens, D hidden.
"""

from __future__ import annotations

import itertools
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowrank_kit.compression.team import total
from lowrank_kit.report.files import write_text


class Stream(ABC):
    """Hidden states [N, T, D] of a text at one place of the chain of blocks.

    Args:
        shape: (N, T, D).
        dtype: of the numbers.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Which sequences, and their states [B, T, D], in order."""
        for start in range(0, len(self), size):
            rows = slice(start, min(start + size, len(self)))
            yield rows, self.rows(rows)

    @abstractmethod
    def rows(self, rows: slice | Tensor) -> Tensor:
        """States of some sequences, on the CPU."""

    @abstractmethod
    def advance(self, block: Callable[[Tensor], Tensor], size: int, place: int) -> Stream:
        """What a block makes of the states, batch by batch; this stream is not to be used any more.

        Args:
            block: [B, T, D] -> [B, T, D].
            size: B.
            place: number of blocks run afterwards.
        """

    @abstractmethod
    def settle(self) -> None:
        """Give up what the states were at earlier places."""

    @abstractmethod
    def drop(self) -> None:
        """Give up what the states are; the stream is not to be used any more."""

    def mean_square(self, size: int) -> float:
        """Mean of the squares of all numbers, on all processes, in float64."""
        squares = sum(batch.double().square().sum().item() for _, batch in self.batches(size))
        return total(squares) / total(math.prod(self.shape))


class Held(Stream):
    """In memory, overwritten in place.

    Args:
        states: [N, T, D].
    """

    def __init__(self, states: Tensor) -> None:
        count, tokens, hidden = states.shape
        super().__init__((count, tokens, hidden), states.dtype)
        self.states = states

    def rows(self, rows: slice | Tensor) -> Tensor:
        """A view where `rows` is a slice."""
        return self.states[rows]

    def advance(self, block: Callable[[Tensor], Tensor], size: int, place: int) -> Stream:
        """In place."""
        for rows, batch in self.batches(size):
            self.states[rows] = block(batch)
        return self

    def copy(self) -> Held:
        """The same states once more."""
        return Held(self.states.clone())

    def settle(self) -> None:
        """Nothing is left of them."""

    def drop(self) -> None:
        """Whoever holds the stream holds the states."""


class Spilled(Stream):
    """In a file, of which one batch at a time is mapped and copied: none of it stays in memory.

    Args:
        folder: of the file.
        name: what its name begins with.
        place: number of blocks run before, which is in its name.
    """

    def __init__(self, folder: Path, name: str, place: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self.folder, self.name, self.place = folder, name, place
        self.row_bytes = math.prod(shape[1:]) * dtype.itemsize

    @property
    def path(self) -> Path:
        """The file, which has its name once it is whole."""
        return self.folder / f"{self.name}-{self.place:05d}.bin"

    def write(self, batches: Iterator[Tensor]) -> Stream:
        """Fill the file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {"shape": self.shape, "dtype": str(self.dtype).removeprefix("torch.")}
        write_text(self.folder / f"{self.name}.json", json.dumps(about))
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            for batch in batches:
                file.write(_bytes_of(batch.to("cpu", self.dtype)))
        if (found := temporary.stat().st_size) != self.row_bytes * len(self):
            raise ValueError(f"{temporary}: {found} bytes for {self.shape} of {self.dtype}")
        temporary.replace(self.path)
        return self

    def rows(self, rows: slice | Tensor) -> Tensor:
        """A copy."""
        index = rows if isinstance(rows, slice) else rows.numpy()
        mapped = np.memmap(self.path, dtype=np.uint8, mode="r", shape=(len(self), self.row_bytes))
        copied = torch.from_numpy(np.array(mapped[index]))
        return copied.view(self.dtype).view(-1, *self.shape[1:])

    def advance(self, block: Callable[[Tensor], Tensor], size: int, place: int) -> Stream:
        """A new file; the old one stays until `settle`, so that a run that is killed can go on from it."""
        after = Spilled(self.folder, self.name, place, self.shape, self.dtype)
        return after.write(block(batch) for _, batch in self.batches(size))

    def settle(self) -> None:
        """Remove the files of earlier places."""
        for path in self.folder.glob(f"{self.name}-?????.bin"):
            if path != self.path:
                path.unlink()

    def drop(self) -> None:
        """Remove the file."""
        self.path.unlink()

    @classmethod
    def find(cls, folder: Path, name: str, place: int) -> Spilled | None:
        """The stream that an earlier run left at a place, if there is one."""
        if not (about := folder / f"{name}.json").exists():
            return None
        told = json.loads(about.read_text())
        found = cls(folder, name, place, tuple(told["shape"]), getattr(torch, told["dtype"]))
        return found if found.path.exists() else None


def new_stream(folder: Path | None, name: str, batches: Iterator[Tensor], count: int, place: int = 0) -> Stream:
    """A stream of what is given batch by batch.

    Args:
        folder: for its file; None keeps it in memory.
        name: of the file.
        batches: [B, T, D] each.
        count: N.
        place: number of blocks run before.
    """
    first = next(batches)
    every = itertools.chain([first], batches)
    if folder is None:
        return Held(torch.cat(list(every)))
    return Spilled(folder, name, place, (count, first.shape[1], first.shape[2]), first.dtype).write(every)


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
