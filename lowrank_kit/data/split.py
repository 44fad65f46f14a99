"""Which documents are held out: a seeded order of contents, and those first in it that fit."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from lowrank_kit.errors import UsageError


def check_split(heldout_fraction: float, max_bytes: int | None) -> None:
    """Refuse a share or a cap out of range.

    Raises:
        UsageError: one of the two.
    """
    if not 0 < heldout_fraction < 1:
        raise UsageError(
            f"the held-out fraction is between 0 and 1, got {heldout_fraction}", hint="0.1 holds out a tenth"
        )
    if max_bytes is not None and max_bytes < 1:
        raise UsageError(f"max_bytes is at least 1, got {max_bytes}")


def place(text: str, seed: int) -> int:
    """Place of a text in the order drawn from the seed: 64 bits, of the text alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:".encode() + text.encode()).digest()[:8], "big")


def fitting(places: NDArray[np.uint64], sizes: NDArray[np.int64], max_bytes: float) -> NDArray[np.bool_]:
    """Which documents, taken in the order of their places, fit into `max_bytes` together.

    One that does not fit is passed over, and smaller ones after it may be taken. Documents with the same place have
    the same text, and are taken together or not at all.

    Args:
        places: [D].
        sizes: [D], in bytes.
        max_bytes: room for all that are taken.

    Returns:
        bool [D].
    """
    ordered, group = np.unique(places, return_inverse=True)
    group_sizes = np.bincount(group, weights=sizes).astype(np.int64)
    chosen = np.zeros(len(ordered), dtype=bool)
    room, rest = int(max_bytes), np.arange(len(ordered))
    while (rest := rest[group_sizes[rest] <= room]).size:
        taken = rest[: np.searchsorted(np.cumsum(group_sizes[rest]), room, side="right")]
        chosen[taken] = True
        room -= int(group_sizes[taken].sum())
        rest = rest[taken.size :]
    return chosen[group]
