from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lowrank_kit.data.tokenizer import END_OF_TEXT, SMALLEST_VOCABULARY, train_tokenizer
from lowrank_kit.errors import UsageError


def test_end_of_text_is_beginning_end_and_padding(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert tiny_tokenizer.bos_token == tiny_tokenizer.eos_token == tiny_tokenizer.pad_token == END_OF_TEXT
    assert tiny_tokenizer.eos_token_id == 0
    assert tiny_tokenizer.model_max_length == 128


@settings(deadline=None, derandomize=True)
@given(text=st.text(max_size=200))
def test_any_text_comes_back_unchanged(tiny_tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tiny_tokenizer.decode(tiny_tokenizer.encode(text), clean_up_tokenization_spaces=False) == text


def test_training_is_deterministic_and_merges_are_learned(tiny_texts: list[str]) -> None:
    first = train_tokenizer(iter(tiny_texts), 384, 64)
    second = train_tokenizer(tiny_texts, 384, 64)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert len(first) == 384
    text = tiny_texts[0]
    assert len(first.encode(text)) < 0.7 * len(text.encode())


def test_a_small_corpus_yields_fewer_tokens_than_asked() -> None:
    # 256 bytes, the special token, and the only merges there are: "ab", then "abab".
    assert len(train_tokenizer(["abab abab"], 1000, 64)) < 270


def test_saved_and_loaded_it_is_the_same(
    tiny_tokenizer: PreTrainedTokenizerFast, tiny_texts: list[str], tmp_path: Path
) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(tiny_texts)["input_ids"] == tiny_tokenizer(tiny_texts)["input_ids"]
    assert loaded.eos_token_id == tiny_tokenizer.eos_token_id


def test_training_prints_nothing(capfd: pytest.CaptureFixture[str], tiny_texts: list[str]) -> None:
    train_tokenizer(tiny_texts, 300, 64)
    assert capfd.readouterr() == ("", "")


def test_a_vocabulary_without_room_for_every_byte_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 257 tokens, got 256"):
        train_tokenizer(["text"], SMALLEST_VOCABULARY - 1, 64)
