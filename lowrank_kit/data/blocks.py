"""Documents to token blocks of one length, hashed: what models are trained, calibrated and scored on."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lowrank_kit.data.sources import Document
from lowrank_kit.errors import UsageError

# Enough to keep a fast tokenizer's threads busy, little enough to hold the token lists of a batch in memory.
_DOCUMENTS_PER_BATCH = 256


class TokenBlocks(Dataset[dict[str, Tensor]]):
    """N blocks of T tokens. An item is `{"input_ids", "labels"}`, int64 [T] each, as transformers' Trainer takes it.

    Args:
        ids: int32 [N, T].
        bytes_per_token: UTF-8 bytes of the documents / tokens of the documents: bits per byte is
            nats per token / ln 2 / bytes_per_token.
    """

    def __init__(self, ids: Tensor, bytes_per_token: float) -> None:
        self.ids = ids
        self.bytes_per_token = bytes_per_token
        # Of the shape and the ids, little-endian int32 on every machine.
        header = f"{ids.shape[0]}x{ids.shape[1]}:".encode()
        self.sha256 = hashlib.sha256(header + ids.numpy().astype("<i4").tobytes()).hexdigest()

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
        return {"input_ids": ids, "labels": ids.clone()}


def token_blocks(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    block_tokens: int,
    *,
    max_blocks: int | None = None,
    seed: int = 0,
) -> TokenBlocks:
    """Tokenize documents, join them with the end-of-text token, and cut the row into blocks that do not overlap.

    No other special tokens are added; a tokenizer without an end-of-text token joins with nothing. The tokens after
    the last whole block are left out.

    Args:
        documents: read once, in order.
        block_tokens: T, at least 2: a block of one token predicts nothing.
        max_blocks: a seeded choice of that many blocks, in their order; None or more than there are: all.
        seed: draws the choice.

    Raises:
        UsageError: there are fewer tokens than one block, or an argument is out of range.
    """
    if block_tokens < 2:
        raise UsageError(f"a block has at least 2 tokens, got {block_tokens}")
    if max_blocks is not None and max_blocks < 1:
        raise UsageError(f"max_blocks is at least 1, got {max_blocks}")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts: list[np.ndarray] = []
    num_bytes = num_document_tokens = 0
    for text, ids in _tokenized(documents, tokenizer):
        if not ids:
            continue
        num_bytes += len(text.encode())
        num_document_tokens += len(ids)
        parts.append(np.array(ids + end, dtype=np.int32))
    row = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
    num_blocks = len(row) // block_tokens
    if num_blocks == 0:
        raise UsageError(
            f"the text has {len(row)} tokens, fewer than one block of {block_tokens}",
            hint="give more text, or a smaller block length",
        )
    blocks = torch.from_numpy(row[: num_blocks * block_tokens].reshape(num_blocks, block_tokens))
    if max_blocks is not None and max_blocks < num_blocks:
        chosen = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed))[:max_blocks]
        blocks = blocks[chosen.sort().values]
    return TokenBlocks(blocks, num_bytes / num_document_tokens)


def _tokenized(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, list[int]]]:
    texts = (document.text for document in documents)
    while batch := list(itertools.islice(texts, _DOCUMENTS_PER_BATCH)):
        # verbose=False: a document longer than the model's context is no mistake here, it will be cut.
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        yield from zip(batch, encoded["input_ids"], strict=True)
