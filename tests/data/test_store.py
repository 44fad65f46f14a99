from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lowrank_kit.data.blocks import token_blocks, tokenized
from lowrank_kit.data.sources import Document, read_source
from lowrank_kit.data.store import StoreWriter, TokenStore
from lowrank_kit.errors import LowRankError, UsageError
from tests.pages import write_pages

Write = Callable[..., TokenStore]


@pytest.fixture
def documents(tmp_path: Path) -> list[Document]:
    return [Document("empty", ""), *read_source(str(write_pages(tmp_path / "pages.jsonl", num_pages=30)))]


@pytest.fixture
def write(tmp_path: Path, documents: list[Document], tiny_tokenizer: PreTrainedTokenizerFast) -> Write:
    """`write(tokenizer)`: the documents as a store in tmp_path/store."""

    def written(tokenizer: PreTrainedTokenizerFast = tiny_tokenizer) -> TokenStore:
        with StoreWriter(tmp_path / "store", tokenizer) as writer:
            for document, ids in tokenized(documents, tokenizer):
                writer.add(document.text.encode(), ids)
        return TokenStore(tmp_path / "store")

    return written


@pytest.mark.parametrize("packing", ["blocks", "documents"])
@pytest.mark.parametrize("max_blocks", [None, 7])
def test_its_blocks_are_those_in_memory(
    write: Write,
    documents: list[Document],
    tiny_tokenizer: PreTrainedTokenizerFast,
    packing: str,
    max_blocks: int | None,
) -> None:
    wanted = token_blocks(documents, tiny_tokenizer, 16, packing=packing, max_blocks=max_blocks, seed=5)
    found = write().blocks(16, packing=packing, max_blocks=max_blocks, seed=5)
    assert (len(found), found.num_tokens, found.block_tokens) == (len(wanted), wanted.num_tokens, 16)
    assert (found.bytes_per_token, found.largest_id) == (wanted.bytes_per_token, wanted.largest_id)
    for one, other in zip(map(found.__getitem__, range(len(found))), map(wanted.__getitem__, range(99)), strict=False):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) and one[name].dtype == torch.int64 for name in other)
    # A choice is small enough to be hashed as any blocks are.
    assert (found.sha256 == wanted.sha256) == (max_blocks is not None)


def test_the_hash_of_mapped_blocks_is_of_ids_and_shape(write: Write) -> None:
    store = write()
    assert len({store.blocks(16).sha256, store.blocks(8).sha256}) == 2
    assert TokenStore(store.folder).blocks(16).sha256 == store.blocks(16).sha256
    ids = np.fromfile(store.folder / "tokens.bin", "<u2").astype("<i4")
    assert store.counts.sha256 == hashlib.sha256(ids.tobytes()).hexdigest()


def test_all_blocks_are_mapped_not_read(write: Write) -> None:
    store = write()
    assert isinstance(store.ids, np.memmap)
    assert store.blocks(16).ids.data_ptr() == store.ids.ctypes.data
    assert not store.ids.flags.writeable


def test_the_files(write: Write, documents: list[Document], tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    store = write()
    assert {path.name for path in store.folder.iterdir()} == {"tokens.bin", "ends.bin", "store.json"}
    encoded = [tiny_tokenizer(document.text)["input_ids"] for document in documents[1:]]
    assert store.counts.tokens == sum(map(len, encoded)) + 30
    assert store.counts.document_tokens == sum(map(len, encoded))
    assert store.counts.document_bytes == sum(len(document.text.encode()) for document in documents)
    assert store.ends.tolist() == np.cumsum([len(ids) + 1 for ids in encoded]).tolist()
    assert store.ids[: store.ends[0]].tolist() == [*encoded[0], tiny_tokenizer.eos_token_id]


def test_a_large_vocabulary_takes_four_bytes(write: Write, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    assert write().counts.dtype == "<u2"
    tokenizer.add_tokens([f"[{number}]" for number in range(2**16 - len(tokenizer))] + ["Page"])
    store = write(tokenizer)
    assert store.counts.dtype == "<i4"
    assert store.counts.largest_id == store.ids[0] == store.blocks(16).largest_id == 2**16
    assert store.blocks(16)[0]["input_ids"][0] == 2**16


def test_without_an_end_of_text(write: Write, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = None
    store = write(tokenizer)
    assert store.counts.tokens == store.counts.document_tokens == store.ends[-1]
    assert tiny_tokenizer.eos_token_id not in store.ids


def test_damage(write: Write) -> None:
    store = write()
    store.verify()
    content = (store.folder / "tokens.bin").read_bytes()

    (store.folder / "tokens.bin").write_bytes(content[:-1])
    with pytest.raises(LowRankError, match=rf"tokens\.bin has {len(content) - 1} bytes, {len(content)} are expected"):
        TokenStore(store.folder)

    (store.folder / "tokens.bin").write_bytes(content[:9] + bytes([content[9] ^ 1]) + content[10:])
    with pytest.raises(LowRankError, match=r"the ids have the sha256 .*\nhint: delete it"):
        TokenStore(store.folder).verify()

    (store.folder / "ends.bin").unlink()
    with pytest.raises(LowRankError, match=r"ends\.bin has 0 bytes, 240 are expected"):
        TokenStore(store.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 2'), "it has the version 2, this one r"),
        (lambda text: text[:50], r"store\.json cannot be read"),
        (lambda text: json.dumps({**json.loads(text), "more": 1}), r"store\.json cannot be read"),
        (lambda text: "[]", r"store\.json cannot be read"),
    ],
)
def test_a_damaged_header(write: Write, change: Callable[[str], str], message: str) -> None:
    file = write().folder / "store.json"
    file.write_text(change(file.read_text()))
    with pytest.raises(LowRankError, match=f"is damaged: {message}"):
        TokenStore(file.parent)


def test_an_interrupted_writer_leaves_no_header(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    writer = StoreWriter(tmp_path / "store", tiny_tokenizer)
    with suppress(KeyboardInterrupt), writer:
        writer.add(b"text", [1, 2])
        raise KeyboardInterrupt
    with pytest.raises(LowRankError, match=r"store\.json cannot be read"):
        TokenStore(tmp_path / "store")


def test_arguments_out_of_range(write: Write) -> None:
    store = write()
    with pytest.raises(UsageError, match=f"has {store.counts.tokens} tokens, fewer than one block of 100000"):
        store.blocks(100000)
    with pytest.raises(UsageError, match="at least 2 tokens"):
        store.blocks(1)
    with pytest.raises(UsageError, match='unknown packing "document"\nhint: did you mean "documents"'):
        store.blocks(16, packing="document")
