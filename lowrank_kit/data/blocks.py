"""Documents to token blocks of one length, hashed: what models are trained, calibrated and scored on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lowrank_kit.data.sources import Document
from lowrank_kit.errors import UsageError, did_you_mean

# Enough to keep a fast tokenizer's threads busy, little enough to hold the token lists of a batch in memory.
_DOCUMENTS_PER_BATCH = 256
_CHARACTERS_PER_BATCH = 1_000_000
PACKINGS = ("blocks", "documents")
# What a label is that no loss is taken of: PyTorch's, transformers' and Trainer's.
IGNORED = -100

Text = TypeVar("Text", bound=Document)


class TokenBlocks(Dataset[dict[str, Tensor]]):
    """N blocks of T tokens. An item is `{"input_ids", "labels"}`, int64 [T] each, as transformers' Trainer takes it.

    Args:
        ids: int32 or uint16 [N, T], in memory or memory-mapped.
        bytes_per_token: UTF-8 bytes of the documents / tokens of the documents: bits per byte is
            nats per token / ln 2 / bytes_per_token.
        document_starts: int64, ascending: where documents begin, counted in tokens over all blocks. An item then has
            `position_ids`, which begin at 0 with each document, and no label for a document's first token:
            transformers keeps attention inside the documents. None: it reaches over the whole block.
        sha256: of the ids, where it is known without reading them all; so with `largest_id`.
    """

    def __init__(
        self,
        ids: Tensor,
        bytes_per_token: float,
        *,
        document_starts: NDArray[np.int64] | None = None,
        sha256: str | None = None,
        largest_id: int | None = None,
    ) -> None:
        self.ids = ids
        self.bytes_per_token = bytes_per_token
        self.document_starts = document_starts
        self.sha256 = _sha256(ids) if sha256 is None else sha256
        self.largest_id = int(ids.max()) if largest_id is None else largest_id

    @property
    def num_tokens(self) -> int:
        return self.ids.numel()

    @property
    def block_tokens(self) -> int:
        return self.ids.shape[1]

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index].long()
        item = {"input_ids": ids, "labels": ids.clone()}
        if self.document_starts is not None:
            starts = self._starts_in(index)
            item["position_ids"] = _positions(starts, len(ids))
            item["labels"][starts] = IGNORED
        return item

    def _starts_in(self, index: int) -> Tensor:
        """Where documents begin in a block."""
        assert self.document_starts is not None
        begin = index * self.block_tokens
        first, last = np.searchsorted(self.document_starts, [begin, begin + self.block_tokens])
        return torch.from_numpy(self.document_starts[first:last] - begin)


def _positions(starts: Tensor, block_tokens: int) -> Tensor:
    """Each token's distance from the last start up to it; what goes on from the block before begins at 0 as well."""
    last_start = torch.zeros(block_tokens, dtype=torch.int64).index_copy(0, starts, starts).cummax(0).values
    return torch.arange(block_tokens) - last_start


def _sha256(ids: Tensor) -> str:
    """Of the shape and the ids, little-endian int32 on every machine."""
    header = f"{ids.shape[0]}x{ids.shape[1]}:".encode()
    return hashlib.sha256(header + ids.numpy().astype("<i4").tobytes()).hexdigest()


def token_blocks(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    block_tokens: int,
    *,
    packing: str = "blocks",
    max_blocks: int | None = None,
    seed: int = 0,
) -> TokenBlocks:
    """Tokenize documents, join them with the end-of-text token, and cut the row into blocks that do not overlap.

    No other special tokens are added; a tokenizer without an end-of-text token joins with nothing. The tokens after
    the last whole block are left out.

    Args:
        documents: read once, in order.
        block_tokens: T, at least 2: a block of one token predicts nothing.
        packing: "blocks", or "documents" for blocks that know where documents begin.
        max_blocks: a seeded choice of that many blocks, in their order; None or more than there are: all.
        seed: draws the choice.

    Raises:
        UsageError: there are fewer tokens than one block, or an argument is out of range.
    """
    check_blocks_wanted(block_tokens, packing, max_blocks)
    row = token_row(documents, tokenizer)
    rows, starts = cut_blocks(row.ids, row.ends, block_tokens, max_blocks=max_blocks, seed=seed)
    return TokenBlocks(
        torch.from_numpy(rows), row.bytes_per_token, document_starts=starts if packing == "documents" else None
    )


@dataclass(frozen=True)
class TokenRow:
    """The tokens of documents in a row, the end-of-text token after each; of D documents that have tokens.

    Args:
        ids: int32 [L].
        ends: int64 [D], where each document ends in the row, ascending.
        digests: [D], `Document.digest` of each.
        bytes_per_token: as in `TokenBlocks`; NaN without tokens.
    """

    ids: NDArray[np.int32]
    ends: NDArray[np.int64]
    digests: tuple[str, ...]
    bytes_per_token: float


def token_row(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> TokenRow:
    """Tokenize documents and join them with the end-of-text token.

    Args:
        documents: read once, in order.
    """
    parts: list[np.ndarray] = []
    digests: list[str] = []
    num_bytes = num_document_tokens = 0
    end = end_of_text(tokenizer)
    for document, ids in tokenized(documents, tokenizer):
        num_bytes += len(document.text.encode())
        num_document_tokens += len(ids)
        parts.append(np.array(ids + end, dtype=np.int32))
        digests.append(document.digest)
    return TokenRow(
        np.concatenate(parts) if parts else np.empty(0, dtype=np.int32),
        np.cumsum([len(part) for part in parts], dtype=np.int64),
        tuple(digests),
        num_bytes / num_document_tokens if parts else math.nan,
    )


def check_blocks_wanted(block_tokens: int, packing: str, max_blocks: int | None) -> None:
    """Refuse arguments of `token_blocks` that are out of range.

    Raises:
        UsageError: one of them.
    """
    if block_tokens < 2:
        raise UsageError(f"a block has at least 2 tokens, got {block_tokens}")
    if max_blocks is not None and max_blocks < 1:
        raise UsageError(f"max_blocks is at least 1, got {max_blocks}")
    if packing not in PACKINGS:
        raise UsageError(f'unknown packing "{packing}"', hint=did_you_mean(packing, PACKINGS))


def cut_blocks(
    row: NDArray[Any],
    ends: NDArray[np.int64],
    block_tokens: int,
    *,
    max_blocks: int | None = None,
    seed: int = 0,
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Cut a row of tokens into blocks, of which a seeded choice may be taken.

    Args:
        row: int [L], a view of which is returned where all blocks are taken.
        ends: [D], where documents end in the row, ascending.
        block_tokens, max_blocks, seed: as in `token_blocks`.

    Returns:
        The blocks [N, T], and where documents begin, counted in tokens over these blocks.

    Raises:
        UsageError: there are fewer tokens than one block.
    """
    num_blocks = len(row) // block_tokens
    if num_blocks == 0:
        raise UsageError(
            f"the text has {len(row)} tokens, fewer than one block of {block_tokens}",
            hint="give more text, or a smaller block length",
        )
    blocks = row[: num_blocks * block_tokens].reshape(num_blocks, block_tokens)
    if max_blocks is None or max_blocks >= num_blocks:
        return blocks, ends  # a document begins where another ends
    drawn = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed))[:max_blocks]
    chosen = drawn.sort().values.numpy()
    starts = ends[np.isin(ends // block_tokens, chosen)]
    return blocks[chosen], np.searchsorted(chosen, starts // block_tokens) * block_tokens + starts % block_tokens


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands between documents: the end-of-text token, if the tokenizer has one."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def tokenized(documents: Iterable[Text], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Text, list[int]]]:
    """Each document with its token ids, in order, without the end-of-text token; those without tokens left out."""
    for batch in _batches(documents):
        texts = [document.text for document in batch]
        # verbose=False: a document longer than the model's context is no mistake here, it will be cut.
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        yield from ((document, ids) for document, ids in zip(batch, encoded["input_ids"], strict=True) if ids)


def _batches(documents: Iterable[Text]) -> Iterator[list[Text]]:
    batch: list[Text] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _DOCUMENTS_PER_BATCH or characters >= _CHARACTERS_PER_BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
