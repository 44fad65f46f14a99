"""What a compression reads: calibration, refinement and check text from one source, no block in two of them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lowrank_kit.data.answers import load_text
from lowrank_kit.data.blocks import TokenBlocks, TokenRow, check_blocks_wanted, cut_blocks, end_of_text, token_row
from lowrank_kit.errors import UsageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Texts:
    """Blocks of one source, no two alike.

    Args:
        source: name of the text source.
        calibration: what the factors are made for.
        refinement: what they are refined on, if they are.
        check: what errors are measured on.
        documents: `Document.digest` of each document that one of the blocks has tokens of, in the order of the source.
        corpus_sha256: of the source, held-out part and all.
    """

    source: str
    calibration: TokenBlocks
    refinement: TokenBlocks | None
    check: TokenBlocks
    documents: tuple[str, ...]
    corpus_sha256: str

    @property
    def sets(self) -> dict[str, TokenBlocks]:
        """Name -> blocks of those that there are."""
        every = {"calibration": self.calibration, "refinement": self.refinement, "check": self.check}
        return {name: blocks for name, blocks in every.items() if blocks is not None}

    def record(self) -> dict[str, Any]:
        """For compression.json: source, tokens and hash of the calibration, and beside them what else was read."""
        hashes = {name: {"sha256": blocks.sha256, "tokens": blocks.num_tokens} for name, blocks in self.sets.items()}
        return {
            "source": self.source,
            **hashes["calibration"],
            "refinement": hashes.get("refinement"),
            "check": hashes["check"],
            "corpus_sha256": self.corpus_sha256,
            "documents": list(self.documents),
        }


def draw_texts(
    source: str | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_tokens: int,
    calibration: int,
    check: int,
    refinement: int = 0,
    max_bytes: int | None = None,
    seed: int = 0,
) -> Texts:
    """Draw blocks from the part of a source that `lowrank train` would train on; what is held out is left alone.

    Blocks with the same tokens count once, those of one token repeated not at all. The calibration is drawn from one
    end of a seeded order and the check from the other, so neither changes with the number of any other set while
    there is text for all. Where there is not, each has its share of what there is, at least one block; a warning
    tells how much.

    Args:
        source: as in `load_text`.
        block_tokens: T, tokens in a block.
        calibration, check: blocks wanted, at least 1.
        refinement: blocks wanted; 0 for none.
        max_bytes: most bytes of text to take from the source.
        seed: draws the order.

    Raises:
        UsageError: a number out of range, no such source, text of one token, or fewer different blocks than sets.
        LowRankError: the source is damaged.
    """
    if min(calibration, check) < 1 or refinement < 0:
        raise UsageError(f"{calibration} calibration, {check} check and {refinement} refinement blocks: too few")
    check_blocks_wanted(block_tokens, "blocks", None)
    wanted = {"calibration": calibration, "check": check} | ({"refinement": refinement} if refinement else {})
    corpus = load_text(source, tokenizer, max_bytes=max_bytes)
    row = token_row(corpus.train, tokenizer)
    blocks, _ = cut_blocks(row.ids, row.ends, block_tokens)
    _refuse_one_token(row, end_of_text(tokenizer))
    different = _different(blocks)
    shares = _shares(len(different), wanted)
    _tell_shortage(f"the text {corpus.source}", blocks.shape, shares, wanted)
    drawn = _draw(different, shares, seed)
    sets = {
        name: TokenBlocks(torch.from_numpy(blocks[indices]), row.bytes_per_token) for name, indices in drawn.items()
    }
    for one, other in combinations(sets, 2):
        refuse_overlap(sets[one], sets[other], (one, other))
    return Texts(
        corpus.source,
        sets["calibration"],
        sets.get("refinement"),
        sets["check"],
        _documents(row, np.concatenate(list(drawn.values())), block_tokens),
        corpus.sha256,
    )


def refuse_overlap(a: TokenBlocks, b: TokenBlocks, names: tuple[str, str]) -> None:
    """Refuse two sets that have a block in common.

    Args:
        a, b: of the same block length.
        names: what to call them in the message.

    Raises:
        UsageError: a common block, or blocks of different lengths, which cannot be compared.
    """
    if a.block_tokens != b.block_tokens:
        raise UsageError(
            f"{names[0]} text in blocks of {a.block_tokens} tokens cannot be compared with {names[1]} text in blocks "
            f"of {b.block_tokens}",
            hint="cut both to the same length",
        )
    contents = set(_digests(a.ids.numpy()))
    common = sum(digest in contents for digest in _digests(b.ids.numpy()))
    if common:
        raise UsageError(
            f"{common} of {len(b)} blocks of the {names[1]} text are in the {names[0]} text too",
            hint="draw_texts draws blocks of one source apart",
        )


def _refuse_one_token(row: TokenRow, end: list[int]) -> None:
    kinds = np.setdiff1d(np.flatnonzero(np.bincount(row.ids)), end)
    if len(kinds) < 2:
        times = len(row.ids) - len(end) * len(row.ends)
        raise UsageError(f"the text is one token, {times:,} times", hint="give text that the model is for")


def _different(blocks: NDArray[np.int32]) -> NDArray[np.int64]:
    """Which blocks [N, T] have not been there before, and are not one token repeated; ascending."""
    first: dict[bytes, int] = {}
    for index, digest in enumerate(_digests(blocks)):
        first.setdefault(digest, index)
    varied = (blocks != blocks[:, :1]).any(axis=1)
    return np.array([index for index in first.values() if varied[index]], dtype=np.int64)


def _digests(blocks: NDArray[Any]) -> list[bytes]:
    """Hash of the tokens of each block [N, T], whatever their dtype."""
    return [hashlib.sha256(block).digest() for block in blocks.astype("<i4")]


def _shares(available: int, wanted: Mapping[str, int]) -> dict[str, int]:
    """What is there shared out in proportion to what is wanted, at least one each if it goes round, nothing left."""
    room, rest = min(available, sum(wanted.values())), sum(wanted.values())
    shares = {}
    # From the smallest on, what is rounded down goes to those that want more; none gets more than it wants.
    for name in sorted(wanted, key=lambda name: wanted[name]):
        shares[name] = min(room, max(1, room * wanted[name] // rest))
        room, rest = room - shares[name], rest - wanted[name]
    return shares


def _tell_shortage(text: str, shape: tuple[int, ...], shares: Mapping[str, int], wanted: Mapping[str, int]) -> None:
    if not all(shares.values()):
        raise UsageError(
            f"{text} has {sum(shares.values())} different among its {shape[0]} blocks of {shape[1]} tokens to train "
            f"on, {len(wanted)} are needed: one each for {', '.join(wanted)}",
            hint="give more text, or a smaller --block-tokens",
        )
    if shares != wanted:
        had = ", ".join(f"{shares[name]} of {wanted[name]} {name} blocks" for name in wanted)
        logger.warning("%s is shorter than wanted: %s", text, had)


def _draw(different: NDArray[np.int64], shares: Mapping[str, int], seed: int) -> dict[str, NDArray[np.int64]]:
    """Indices of the blocks of each set, ascending; the calibration is what `token_blocks` would choose."""
    order = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed)).numpy()
    begin, end = shares["calibration"], len(order) - shares["check"]
    parts = {"calibration": order[:begin], "check": order[end:]}
    if "refinement" in shares:
        parts["refinement"] = order[begin : begin + shares["refinement"]]
    return {name: different[np.sort(part)] for name, part in parts.items()}


def _documents(row: TokenRow, drawn: NDArray[np.int64], block_tokens: int) -> tuple[str, ...]:
    """Digests of the documents that blocks have tokens of, the end-of-text token of a document being one of them."""
    first = np.searchsorted(row.ends, drawn * block_tokens, side="right")
    last = np.searchsorted(row.ends, (drawn + 1) * block_tokens - 1, side="right")
    used = sorted({index for begin, end in zip(first, last, strict=True) for index in range(begin, end + 1)})
    return tuple(dict.fromkeys(row.digests[index] for index in used))
