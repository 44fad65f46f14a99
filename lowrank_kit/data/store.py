"""Tokens on disk: written once, checked when opened, read as memory-mapped blocks of any length."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lowrank_kit.data.blocks import TokenBlocks, check_blocks_wanted, cut_blocks, end_of_text
from lowrank_kit.errors import LowRankError
from lowrank_kit.report.files import write_json

STORE_FILE = "store.json"
STORE_VERSION = 1
_HASH_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """What store.json says of a store.

    Args:
        dtype: of the ids, little-endian: "<u2" where the vocabulary allows, else "<i4".
        tokens: ids in the file, end-of-text tokens included.
        documents: documents that have tokens.
        document_tokens: tokens without the end-of-text tokens.
        document_bytes: UTF-8 bytes of the documents.
        largest_id: of the ids.
        sha256: of the ids as little-endian int32, so that it stands for the tokens, not for the file.
        text_sha256: of the documents, one after another.
    """

    dtype: str
    tokens: int
    documents: int
    document_tokens: int
    document_bytes: int
    largest_id: int
    sha256: str
    text_sha256: str


class TokenStore:
    """A folder of `tokens.bin`, the ids of all documents in a row, `ends.bin`, where each ends, and store.json.

    Opening looks at the files' sizes and reads store.json; `verify` reads it all.

    Raises:
        LowRankError: the folder is no store, or a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts = _read_counts(folder)
        self.ids = _mapped(folder / "tokens.bin", self.counts.dtype, self.counts.tokens)
        self.ends: NDArray[np.int64] = _mapped(folder / "ends.bin", "<i8", self.counts.documents)

    def verify(self) -> None:
        """Read all ids and compare their hash.

        Raises:
            LowRankError: they are not what was written.
        """
        digest = hashlib.sha256()
        for start in range(0, len(self.ids), _HASH_BYTES // 4):
            digest.update(self.ids[start : start + _HASH_BYTES // 4].astype("<i4").tobytes())
        if digest.hexdigest() != self.counts.sha256:
            raise _damaged(self.folder, f"the ids have the sha256 {digest.hexdigest()}, not {self.counts.sha256}")

    def blocks(
        self, block_tokens: int, *, packing: str = "blocks", max_blocks: int | None = None, seed: int = 0
    ) -> TokenBlocks:
        """The blocks that `token_blocks` makes of the same documents; memory-mapped unless a choice is taken.

        Args:
            block_tokens, packing, max_blocks, seed: as in `token_blocks`.

        Raises:
            UsageError: there are fewer tokens than one block, or an argument is out of range.
        """
        check_blocks_wanted(block_tokens, packing, max_blocks)
        rows, starts = cut_blocks(self.ids, self.ends, block_tokens, max_blocks=max_blocks, seed=seed)
        bytes_per_token = self.counts.document_bytes / self.counts.document_tokens
        document_starts = starts if packing == "documents" else None
        if len(rows) < len(self.ids) // block_tokens:
            chosen = torch.from_numpy(rows.astype(np.int32))
            return TokenBlocks(chosen, bytes_per_token, document_starts=document_starts)
        return TokenBlocks(
            _read_only(rows),
            bytes_per_token,
            document_starts=document_starts,
            # Of the hash that is known: a run need not read all of the text to start.
            sha256=hashlib.sha256(f"{len(rows)}x{block_tokens}:{self.counts.sha256}".encode()).hexdigest(),
            largest_id=self.counts.largest_id,
        )


class StoreWriter:
    """Writes a store into an empty folder: `with StoreWriter(folder, tokenizer) as writer: writer.add(text, ids)`.

    store.json comes last, when everything else is on the disk: a folder without it is not whole.
    """

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.folder, self.end_of_text = folder, end_of_text(tokenizer)
        vocabulary = 1 + max(tokenizer.get_vocab().values())
        self.dtype = "<u2" if vocabulary <= 1 << 16 else "<i4"
        self.digest, self.text_digest = hashlib.sha256(), hashlib.sha256()
        self.end = self.documents = self.document_bytes = 0
        self.largest_id = -1

    def __enter__(self) -> StoreWriter:
        self.folder.mkdir(exist_ok=True)
        with ExitStack() as files:
            self.tokens_file: BinaryIO = files.enter_context((self.folder / "tokens.bin").open("wb"))
            self.ends_file: BinaryIO = files.enter_context((self.folder / "ends.bin").open("wb"))
            self.files = files.pop_all()
        return self

    def add(self, text: bytes, token_ids: list[int]) -> None:
        """Write down a document.

        Args:
            text: in UTF-8; only its size and hash are kept.
            token_ids: at least one, without the end-of-text token.
        """
        ids = np.array(token_ids + self.end_of_text, dtype="<i4")
        self.digest.update(ids.tobytes())
        self.text_digest.update(hashlib.sha256(text).digest())
        self.tokens_file.write(ids.astype(self.dtype).tobytes())
        self.end += len(ids)
        self.ends_file.write(np.array(self.end, dtype="<i8").tobytes())
        self.documents += 1
        self.document_bytes += len(text)
        self.largest_id = max(self.largest_id, int(ids.max()))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self.files:
            if kind is not None:
                return
            for file in (self.tokens_file, self.ends_file):
                file.flush()
                os.fsync(file.fileno())
        counts = TokenCounts(
            dtype=self.dtype,
            tokens=self.end,
            documents=self.documents,
            document_tokens=self.end - self.documents * len(self.end_of_text),
            document_bytes=self.document_bytes,
            largest_id=self.largest_id,
            sha256=self.digest.hexdigest(),
            text_sha256=self.text_digest.hexdigest(),
        )
        write_json(self.folder / STORE_FILE, asdict(counts), schema_version=STORE_VERSION)


def _read_counts(folder: Path) -> TokenCounts:
    try:
        stored = json.loads((folder / STORE_FILE).read_text())
        version = stored.pop("schema_version")
        if version != STORE_VERSION:
            raise _damaged(folder, f"it has the version {version}, this one reads {STORE_VERSION}")
        return TokenCounts(**stored)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(folder, f"{STORE_FILE} cannot be read: {error}") from error


def _mapped(path: Path, dtype: str, count: int) -> NDArray[Any]:
    wanted = count * np.dtype(dtype).itemsize
    found = path.stat().st_size if path.is_file() else 0
    if found != wanted:
        raise _damaged(path.parent, f"{path.name} has {found} bytes, {wanted} are expected")
    return np.memmap(path, dtype, mode="r") if count else np.empty(0, dtype)


def _read_only(rows: NDArray[Any]) -> Tensor:
    """A tensor on the mapped file. Mapped so that it could be written to, it would have to fit into memory."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(rows)


def _damaged(folder: Path, what: str) -> LowRankError:
    return LowRankError(f"the token store {folder} is damaged: {what}", hint="delete it; it will be made again")
