"""Parts of a model that are worked on one after the other: what is before its blocks, each block, what is after."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lowrank_kit.checkpoint.stacks import Unit
from lowrank_kit.compression.chain import Chain
from lowrank_kit.matrices import Matrix

BEFORE, AFTER = "before the blocks", "after the blocks"


@dataclass(frozen=True)
class Section:
    """Matrices that are worked on together.

    Args:
        index: in their order; block i is section i + 1.
        path: of the block, BEFORE or AFTER.
        stored: name -> matrix, or experts of a weight.
    """

    index: int
    path: str
    stored: Mapping[str, Unit]

    @property
    def matrices(self) -> list[Matrix]:
        """All of them, experts one by one."""
        return [matrix for unit in self.stored.values() for matrix in unit.matrices]

    @property
    def costs(self) -> dict[str, int]:
        """Name -> work of a decomposition, about."""
        return {
            name: unit.count * min(unit.matrix.shape) * unit.matrix.shape[0] * unit.matrix.shape[1]
            for name, unit in self.stored.items()
        }

    @property
    def prefix(self) -> str:
        """What names of matrices begin with before their path in the block."""
        return "" if self.path in (BEFORE, AFTER) else f"{self.path}."

    def inside(self, name: str) -> str:
        """Path of a matrix in the block, or in the model where this is no block."""
        return name.removeprefix(self.prefix)


def sections_of(stored: Iterable[Unit], blocks: Sequence[str], chain: Chain | None) -> list[Section]:
    """All sections of a model, also those without a matrix.

    Args:
        stored: the matrices.
        blocks: paths, in order.
        chain: tells what comes after the blocks; None counts all that is outside of them as before.
    """
    places: dict[str, dict[str, Unit]] = {path: {} for path in (BEFORE, *blocks, AFTER)}
    for one in stored:
        name = one.matrix.name
        inside = next((path for path in blocks if name.startswith(f"{path}.")), None)
        places[inside or (AFTER if chain is not None and chain.is_after(name) else BEFORE)][name] = one
    return [Section(index, path, here) for index, (path, here) in enumerate(places.items())]
