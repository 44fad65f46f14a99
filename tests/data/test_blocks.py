from __future__ import annotations

import copy
import hashlib
import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, default_data_collator

from lowrank_kit.data.blocks import TokenBlocks, token_blocks
from lowrank_kit.data.sources import Document
from lowrank_kit.data.tokenizer import END_OF_TEXT, train_tokenizer
from lowrank_kit.errors import UsageError


@pytest.fixture
def documents(tiny_texts: list[str]) -> list[Document]:
    return [Document(str(index), text) for index, text in enumerate(tiny_texts)]


def test_documents_are_joined_with_the_end_of_text_and_cut(
    documents: list[Document], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    blocks = token_blocks(documents, tiny_tokenizer, 16)
    tokens = [tiny_tokenizer.encode(document.text) for document in documents]
    row = [token for ids in tokens for token in [*ids, tiny_tokenizer.eos_token_id]]
    assert blocks.ids.dtype == torch.int32
    assert blocks.ids.flatten().tolist() == row[: len(row) // 16 * 16]
    assert (len(blocks), blocks.block_tokens, blocks.num_tokens) == (len(row) // 16, 16, len(row) // 16 * 16)
    num_bytes = sum(len(document.text.encode()) for document in documents)
    assert blocks.bytes_per_token == num_bytes / sum(map(len, tokens))


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    texts=st.lists(st.text(max_size=40), min_size=1, max_size=8),
    block_tokens=st.integers(2, 7),
)
def test_no_token_is_lost_but_the_last_few(
    tiny_tokenizer: PreTrainedTokenizerFast, texts: list[str], block_tokens: int
) -> None:
    row = "".join(text + tiny_tokenizer.eos_token for text in texts if text)
    try:
        blocks = token_blocks([Document("", text) for text in texts], tiny_tokenizer, block_tokens)
    except UsageError:
        assert len(tiny_tokenizer.encode(row)) < block_tokens
        return
    ids = blocks.ids.flatten().tolist()
    assert tiny_tokenizer.encode(row)[: len(ids)] == ids
    assert 0 <= len(tiny_tokenizer.encode(row)) - len(ids) < block_tokens
    assert math.isfinite(blocks.bytes_per_token)


def test_items_go_through_the_collator_of_transformers(
    documents: list[Document], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    blocks = token_blocks(documents, tiny_tokenizer, 16)
    batch = default_data_collator([blocks[0], blocks[1]])
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], blocks.ids[:2].long())
    assert torch.equal(batch["labels"], batch["input_ids"])


def test_a_seeded_choice_of_blocks_keeps_their_order(
    documents: list[Document], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    whole = token_blocks(documents, tiny_tokenizer, 8)
    some = token_blocks(documents, tiny_tokenizer, 8, max_blocks=9)
    rows = [tuple(block) for block in whole.ids.tolist()]
    places = [rows.index(tuple(block)) for block in some.ids.tolist()]
    assert len(places) == 9
    assert places == sorted(places)
    assert places != list(range(9))
    assert token_blocks(documents, tiny_tokenizer, 8, max_blocks=9).sha256 == some.sha256
    assert token_blocks(documents, tiny_tokenizer, 8, max_blocks=9, seed=1).sha256 != some.sha256
    assert some.bytes_per_token == whole.bytes_per_token
    assert token_blocks(documents, tiny_tokenizer, 8, max_blocks=10**6).sha256 == whole.sha256


def test_the_hash_is_of_shape_and_ids() -> None:
    ids = torch.arange(6, dtype=torch.int32)
    blocks = TokenBlocks(ids.view(2, 3), 1.0)
    assert blocks.sha256 == hashlib.sha256(b"2x3:" + np.arange(6, dtype="<i4").tobytes()).hexdigest()
    assert TokenBlocks(ids.view(3, 2), 1.0).sha256 != blocks.sha256


def test_a_tokenizer_that_begins_every_text_with_a_token_does_not_here(
    documents: list[Document], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    eager = copy.deepcopy(tiny_tokenizer)
    eager.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    assert eager.encode("text")[0] == 0
    assert token_blocks(documents, eager, 16).sha256 == token_blocks(documents, tiny_tokenizer, 16).sha256


def test_a_tokenizer_without_an_end_of_text_joins_with_nothing(
    documents: list[Document], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    blocks = token_blocks(documents, bare, 16)
    row = [token for document in documents for token in tiny_tokenizer.encode(document.text)]
    assert blocks.ids.flatten().tolist() == row[: len(row) // 16 * 16]


def test_documents_longer_than_the_context_give_no_warning(
    documents: list[Document], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers warns once per tokenizer, and keeps its log from the root logger.
    fresh = train_tokenizer([documents[0].text], 300, model_max_length=16)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, "transformers")  # other tests may have quietened it
    token_blocks(documents, fresh, 16)
    assert not caplog.records
    fresh(documents[0].text)
    assert "longer than the specified maximum" in caplog.text


def test_fewer_tokens_than_one_block(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UsageError, match="the text has 3 tokens, fewer than one block of 16") as caught:
        token_blocks([Document("a", "zq")], tiny_tokenizer, 16)
    assert caught.value.hint is not None
    with pytest.raises(UsageError, match="the text has 0 tokens"):
        token_blocks([], tiny_tokenizer, 16)
    with pytest.raises(UsageError, match="the text has 0 tokens"):
        token_blocks([Document("empty", "")] * 40, tiny_tokenizer, 16)


def test_arguments_out_of_range(documents: list[Document], tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UsageError, match="at least 2 tokens, got 1"):
        token_blocks(documents, tiny_tokenizer, 1)
    with pytest.raises(UsageError, match="max_blocks is at least 1, got 0"):
        token_blocks(documents, tiny_tokenizer, 8, max_blocks=0)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=4, max_size=12),
    block_tokens=st.integers(2, 9),
    max_blocks=st.none() | st.integers(1, 4),
)
def test_positions_begin_anew_with_each_document(
    tiny_tokenizer: PreTrainedTokenizerFast, lengths: list[int], block_tokens: int, max_blocks: int | None
) -> None:
    # "z" is a token of its own; so each document has its length in tokens, and the end-of-text token.
    documents = [Document("", "z" * length) for length in lengths]
    plain, packed = (
        token_blocks(documents, tiny_tokenizer, block_tokens, packing=packing, max_blocks=max_blocks)
        for packing in ("blocks", "documents")
    )
    assert plain.sha256 == packed.sha256
    for before, after in ((plain[index], packed[index]) for index in range(len(plain))):
        assert set(before) == {"input_ids", "labels"}
        assert torch.equal(before["input_ids"], after["input_ids"])
        position, positions, labels = 0, [], []
        for index, token in enumerate(before["input_ids"].tolist()):
            begins = position == 0 and index > 0
            positions.append(position)
            labels.append(-100 if begins else token)
            position = 0 if token == tiny_tokenizer.eos_token_id else position + 1
        assert after["position_ids"].tolist() == positions
        # Whether a document begins at the start of a block cannot be seen in it, and its label is not used.
        assert after["labels"].tolist()[1:] == labels[1:]


def test_an_unknown_packing(tiny_tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> None:
    with pytest.raises(UsageError, match='unknown packing "document"'):
        token_blocks(documents, tiny_tokenizer, 8, packing="document")
