"""A text source, split by document into a part to train on and a part held out."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lowrank_kit.data.sources import STDLIB, Document, read_source
from lowrank_kit.data.split import check_split, fitting, place
from lowrank_kit.errors import UsageError


@dataclass(frozen=True)
class Corpus:
    """What a run reads: no text is on both sides; `sha256` stands for the names and texts of both."""

    source: str
    train: tuple[Document, ...]
    heldout: tuple[Document, ...]
    sha256: str


def load_corpus(
    source: str | None = None, *, heldout_fraction: float = 0.1, seed: int = 0, max_bytes: int | None = None
) -> Corpus:
    """Read a source and hold out part of it, by document.

    The documents are put in an order drawn from the seed and their contents: the order they were read in does not
    matter, equal documents go to the same side, and adding a document moves few others. Held out are those first in
    that order that fit into the held-out share. If not one fits (a single file, or few large ones), each document is
    cut in two near the mark, at the end of a paragraph or a line: the beginning is trained on, the end held out.

    Args:
        source: as in `read_source`.
        heldout_fraction: share of the bytes to hold out, 0 < f < 1.
        seed: draws the order.
        max_bytes: cap on both sides together, shared out in the same proportion, for quick runs. Each side of a
            capped corpus is part of the same side of the whole one.

    Raises:
        UsageError: an argument is out of range, the source is empty, or too small to leave text on both sides.
        LowRankError: the source is damaged (`read_source`).
    """
    check_split(heldout_fraction, max_bytes)
    return split_documents(
        read_source(source),
        source or STDLIB,
        heldout_fraction=heldout_fraction,
        seed=seed,
        max_bytes=max_bytes,
    )


def split_documents(
    documents: Iterable[Document],
    source: str,
    *,
    heldout_fraction: float = 0.1,
    seed: int = 0,
    max_bytes: int | None = None,
    cut: bool = True,
) -> Corpus:
    """What `load_corpus` does with the documents of a source; where `cut` is false none is cut in two.

    Raises:
        UsageError: an argument is out of range, or too few documents to leave text on both sides.
    """
    check_split(heldout_fraction, max_bytes)
    documents = sorted(documents, key=lambda document: document.name)
    train, heldout = _split(documents, heldout_fraction, seed, cut)
    if max_bytes is not None:
        train = _cap(train, round((1 - heldout_fraction) * max_bytes), seed, cut)
        heldout = _cap(heldout, round(heldout_fraction * max_bytes), seed, cut)
    if not train or not heldout:
        limit = "" if max_bytes is None else f", capped at {max_bytes}"
        raise UsageError(
            f"{source} is too small to hold out {heldout_fraction:g} of it: "
            f"{_num_bytes(documents)} bytes in {len(documents)} documents{limit}",
            hint="give more text" if max_bytes is None else "give more text, or a higher cap",
        )
    return Corpus(source, tuple(train), tuple(heldout), _fingerprint(train, heldout))


def _split(
    documents: Sequence[Document], fraction: float, seed: int, cut: bool
) -> tuple[list[Document], list[Document]]:
    heldout_texts = _fitting_texts(documents, fraction * _num_bytes(documents), seed)
    if heldout_texts or not cut:
        train = [document for document in documents if document.text not in heldout_texts]
        return train, [document for document in documents if document.text in heldout_texts]
    halves = [_cut(document.text, round((1 - fraction) * len(document.text))) for document in documents]
    pairs = list(zip(documents, halves, strict=True))
    # A line of one document may be the whole end of another: what is trained on is not held out.
    beginnings = {beginning for beginning, _ in halves}
    return (
        [Document(document.name, beginning) for document, (beginning, _) in pairs if beginning.strip()],
        [Document(document.name, end) for document, (_, end) in pairs if end.strip() and end not in beginnings],
    )


def _cap(documents: Sequence[Document], max_bytes: int, seed: int, cut: bool) -> list[Document]:
    """The documents that fit, in seeded order; if not one does, the beginning of the first where it may be cut."""
    if _num_bytes(documents) <= max_bytes:
        return list(documents)
    texts = _fitting_texts(documents, max_bytes, seed)
    if texts or not cut:
        return [document for document in documents if document.text in texts]
    first = min(documents, key=lambda document: place(document.text, seed))
    # Cut in bytes; a character cut through at the end is dropped.
    beginning = first.text.encode()[:max_bytes].decode(errors="ignore")
    beginning, _ = _cut(beginning, len(beginning))
    return [Document(first.name, beginning)] if beginning.strip() else []


def _fitting_texts(documents: Sequence[Document], max_bytes: float, seed: int) -> set[str]:
    """Texts, first in seeded order, whose documents (all that share the text) fit into `max_bytes` together."""
    texts = [document.text for document in documents]
    places = np.array([place(text, seed) for text in texts], dtype=np.uint64)
    sizes = np.array([len(text.encode()) for text in texts], dtype=np.int64)
    return set(itertools.compress(texts, fitting(places, sizes, max_bytes)))


def _cut(text: str, mark: int) -> tuple[str, str]:
    """Cut at the last paragraph, line or word that ends in the tenth before the mark; at the mark if none does."""
    for separator in ("\n\n", "\n", " "):
        found = text.rfind(separator, mark * 9 // 10, mark)
        if found >= 0:
            mark = found + len(separator)
            break
    return text[:mark], text[mark:]


def _num_bytes(documents: Iterable[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def _fingerprint(train: Sequence[Document], heldout: Sequence[Document]) -> str:
    digest = hashlib.sha256()
    for side, documents in (("train", train), ("heldout", heldout)):
        for document in documents:
            text_hash = hashlib.sha256(document.text.encode()).hexdigest()
            digest.update(f"{side}\t{document.name}\t{text_hash}\n".encode())
    return digest.hexdigest()
