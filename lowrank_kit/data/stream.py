"""A text source that need not fit into memory: read more than once, document by document, and never held."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lowrank_kit.data.sources import STDLIB, Document, read_source
from lowrank_kit.data.split import check_split, fitting, place
from lowrank_kit.errors import LowRankError, UsageError

# A plain file above this is no single document: the largest of texts that people hand around as one file.
PIECE_BYTES = 4_000_000
SIDES = ("train", "heldout")
_NEITHER = len(SIDES)


@dataclass(frozen=True)
class SidedDocument(Document):
    """A document and its side, "train" or "heldout"."""

    side: str


class StreamedCorpus:
    """A text source whose documents are held out by the rule of `load_corpus`, in the order they are read.

    The first use reads the source once for the places and sizes of the documents, 16 bytes for each; so a text is on
    the side where `load_corpus` puts it. It differs in that plain files of 4 MB or more are cut into documents, and
    that no document is cut in two to have something to hold out.

    Args:
        source: as in `read_source`.
        heldout_fraction, seed, max_bytes: as in `load_corpus`.

    Raises:
        UsageError: an argument is out of range; at the first use: the source is empty or cannot be split.
        LowRankError: at the first use: the source is damaged.
    """

    def __init__(
        self,
        source: str | None = None,
        *,
        heldout_fraction: float = 0.1,
        seed: int = 0,
        max_bytes: int | None = None,
    ) -> None:
        check_split(heldout_fraction, max_bytes)
        self.source = source or STDLIB
        self.heldout_fraction = heldout_fraction
        self.seed = seed
        self.max_bytes = max_bytes

    def documents(self) -> Iterator[SidedDocument]:
        """The documents of both sides, in the order they are read.

        Raises:
            LowRankError: the source has changed since its documents were split.
        """
        sides = self._sides
        for index, document in self._unchanged():
            if sides[index] != _NEITHER:
                yield SidedDocument(document.name, document.text, SIDES[sides[index]])

    def sample(self, max_bytes: int) -> Iterator[str]:
        """Texts of the train side, those first in seeded order that fit, in the order they are read.

        Args:
            max_bytes: of all of them together.

        Raises:
            LowRankError: the source has changed since its documents were split.
        """
        chosen = self._sides == SIDES.index("train")
        chosen[chosen] = fitting(self._places[chosen], self._sizes[chosen], max_bytes)
        return (document.text for index, document in self._unchanged() if chosen[index])

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of both sides."""
        return int(self._sizes[self._sides != _NEITHER].sum())

    @cached_property
    def _index(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        places, sizes = array("Q"), array("q")
        for document in self._read():
            places.append(place(document.text, self.seed))
            sizes.append(len(document.text.encode()))
        return np.frombuffer(places, dtype=np.uint64), np.frombuffer(sizes, dtype=np.int64)

    @property
    def _places(self) -> NDArray[np.uint64]:
        return self._index[0]

    @property
    def _sizes(self) -> NDArray[np.int64]:
        return self._index[1]

    @cached_property
    def _sides(self) -> NDArray[np.uint8]:
        """Of each document read, an index into SIDES, or _NEITHER where the cap leaves it out."""
        heldout = fitting(self._places, self._sizes, self.heldout_fraction * int(self._sizes.sum()))
        sides = np.full(len(heldout), _NEITHER, dtype=np.uint8)
        for number, (mask, share) in enumerate(
            [(~heldout, 1 - self.heldout_fraction), (heldout, self.heldout_fraction)]
        ):
            if self.max_bytes is not None:
                mask = mask.copy()
                mask[mask] = fitting(self._places[mask], self._sizes[mask], round(share * self.max_bytes))
            if not mask.any():
                self._refuse()
            sides[mask] = number
        return sides

    def _refuse(self) -> None:
        limit = "" if self.max_bytes is None else f", capped at {self.max_bytes}"
        raise UsageError(
            f"{self.source} is too small to hold out {self.heldout_fraction:g} of it by whole documents: "
            f"{int(self._sizes.sum())} bytes in {len(self._sizes)} documents{limit}",
            hint="give more text, or --no-stream, which cuts documents in two",
        )

    def _read(self) -> Iterator[Document]:
        return read_source(self.source, piece_bytes=PIECE_BYTES)

    def _unchanged(self) -> Iterator[tuple[int, Document]]:
        """The documents with their numbers, each compared with what was split."""
        index = -1
        for index, document in enumerate(self._read()):
            if index >= len(self._places) or place(document.text, self.seed) != self._places[index]:
                raise self._changed(document.name)
            yield index, document
        if index + 1 < len(self._places):
            raise self._changed("its end")

    def _changed(self, where: str) -> LowRankError:
        return LowRankError(f"{self.source} changed while it was read, at {where}", hint="start again when it is whole")
