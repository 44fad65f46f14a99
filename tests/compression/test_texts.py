"""Calibration, refinement and check text: apart from each other, the same for the same seed, and told by hash."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lowrank_kit.compression.texts import Texts, draw_texts, refuse_overlap
from lowrank_kit.data.blocks import TokenBlocks, token_blocks
from lowrank_kit.data.corpus import load_corpus
from lowrank_kit.data.sources import Document
from lowrank_kit.errors import UsageError

SETS = ("calibration", "check", "refinement")


def write_rows(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def contents(blocks: TokenBlocks | None) -> list[tuple[int, ...]]:
    return [] if blocks is None else [tuple(block) for block in blocks.ids.tolist()]


def every(texts: Texts) -> list[tuple[int, ...]]:
    return [block for blocks in texts.sets.values() for block in contents(blocks)]


def draw(source: str, tokenizer: PreTrainedTokenizerFast, **given: Any) -> Texts:
    return draw_texts(source, tokenizer, **({"block_tokens": 32, "calibration": 20, "check": 8} | given))


# Few letters, so that many blocks are alike and many are of one token.
ROWS = st.lists(st.text("ab", min_size=1, max_size=30), min_size=3, max_size=20)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    rows=ROWS,
    block_tokens=st.integers(2, 5),
    wanted=st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(0, 30)),
    seed=st.integers(0, 3),
)
def test_no_block_is_in_two_sets_and_none_is_left_over(
    tiny_tokenizer: PreTrainedTokenizerFast,
    rows: list[str],
    block_tokens: int,
    wanted: tuple[int, int, int],
    seed: int,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = write_rows(Path(folder) / "rows.jsonl", rows)
        try:
            train = load_corpus(source).train
            there = {b for b in contents(token_blocks(train, tiny_tokenizer, block_tokens)) if len(set(b)) > 1}
        except UsageError:
            return  # too small to hold out part of, or for one block
        numbers = dict(zip(SETS, wanted, strict=True))
        given = {"block_tokens": block_tokens, "seed": seed, **numbers}
        if len(there) < sum(number > 0 for number in wanted):
            with pytest.raises(UsageError, match=r"\d+ different among|is one token"):
                draw(source, tiny_tokenizer, **given)
            return
        texts = draw(source, tiny_tokenizer, **given)
    drawn = every(texts)
    assert max(Counter(drawn).values()) == 1
    assert set(drawn) <= there
    assert len(drawn) == min(len(there), sum(wanted))
    for name, number in numbers.items():
        blocks = getattr(texts, name)
        assert (blocks is None) == (number == 0)
        share = number * min(1, len(there) / sum(wanted))
        assert number == 0 or (1 <= len(blocks) <= number and abs(len(blocks) - share) < 2)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(calibration=st.integers(1, 30), check=st.integers(1, 20), refinement=st.integers(1, 20), seed=st.integers(0, 9))
def test_no_set_changes_with_the_number_of_another(
    tiny_tokenizer: PreTrainedTokenizerFast, text_file: str, calibration: int, check: int, refinement: int, seed: int
) -> None:
    # 70 blocks are there, enough for all.
    alone = draw(text_file, tiny_tokenizer, calibration=calibration, check=check, seed=seed)
    refined = draw(text_file, tiny_tokenizer, calibration=calibration, check=check, refinement=refinement, seed=seed)
    other = draw(text_file, tiny_tokenizer, calibration=31 - calibration, check=check, seed=seed)
    assert alone.calibration.sha256 == refined.calibration.sha256
    assert alone.check.sha256 == refined.check.sha256 == other.check.sha256
    assert refined.refinement is not None
    assert len(refined.refinement) == refinement
    # As token_blocks would have it, where no two blocks are alike.
    plain = token_blocks(load_corpus(text_file).train, tiny_tokenizer, 32, max_blocks=calibration, seed=seed)
    assert alone.calibration.sha256 == plain.sha256
    assert alone.calibration.bytes_per_token == plain.bytes_per_token


def test_the_seed_draws(tiny_tokenizer: PreTrainedTokenizerFast, text_file: str) -> None:
    first, again, other = (draw(text_file, tiny_tokenizer, refinement=8, seed=seed) for seed in (0, 0, 1))
    assert first.record() == again.record()
    for name in SETS:
        assert first.sets[name].sha256 != other.sets[name].sha256


def test_the_documents_are_those_with_tokens_in_a_block(
    tiny_tokenizer: PreTrainedTokenizerFast, text_file: str
) -> None:
    texts = draw(text_file, tiny_tokenizer, calibration=5, check=2, refinement=3)
    assert {len(blocks) for blocks in texts.sets.values()} == {5, 2, 3}
    drawn = set(every(texts))
    expected: list[tuple[str, int, int]] = []
    row: list[int] = []
    train = load_corpus(text_file).train
    for document in train:
        begin = len(row)
        row += [*tiny_tokenizer.encode(document.text), tiny_tokenizer.eos_token_id]
        expected.append((document.digest, begin // 32, (len(row) - 1) // 32))
    blocks = [tuple(row[32 * index : 32 * index + 32]) in drawn for index in range(len(row) // 32 + 1)]
    assert sum(blocks) == 10
    found = [digest for digest, first, last in expected if any(blocks[first : last + 1])]
    assert list(texts.documents) == found
    assert 10 <= len(found) < len(train)
    assert all(len(digest) == 16 for digest in found)


def test_the_record(tiny_tokenizer: PreTrainedTokenizerFast, text_file: str) -> None:
    texts = draw(text_file, tiny_tokenizer, refinement=3)
    assert texts.refinement is not None
    assert texts.record() == {
        "source": text_file,
        "sha256": texts.calibration.sha256,
        "tokens": 20 * 32,
        "check": {"sha256": texts.check.sha256, "tokens": 8 * 32},
        "refinement": {"sha256": texts.refinement.sha256, "tokens": 3 * 32},
        "corpus_sha256": load_corpus(text_file).sha256,
        "documents": list(texts.documents),
    }
    assert draw(text_file, tiny_tokenizer).record()["refinement"] is None


def test_a_cap_on_the_text(tiny_tokenizer: PreTrainedTokenizerFast, text_file: str) -> None:
    capped = draw(text_file, tiny_tokenizer, max_bytes=2000, calibration=1000)
    assert set(capped.documents) <= {document.digest for document in load_corpus(text_file, max_bytes=2000).train}
    assert len(capped.documents) < 12


def test_a_shortage_is_told_and_shared(
    tiny_tokenizer: PreTrainedTokenizerFast, text_file: str, caplog: pytest.LogCaptureFixture
) -> None:
    there = len(token_blocks(load_corpus(text_file).train, tiny_tokenizer, 32))
    draw(text_file, tiny_tokenizer, calibration=there - 8)
    assert not caplog.records
    texts = draw(text_file, tiny_tokenizer, calibration=10 * there, check=there)
    (record,) = caplog.records
    assert (len(texts.calibration), len(texts.check)) == (there - there // 11, there // 11)
    assert record.getMessage() == (
        f"the text {text_file} is shorter than wanted: {there - there // 11} of {10 * there} calibration blocks, "
        f"{there // 11} of {there} check blocks"
    )


def test_fewer_blocks_than_sets(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    # Blocks of 4, two of them alike and one of one token; what is held out is the short row.
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    source = write_rows(tmp_path / "rows.jsonl", ["zqzqzqzqqzzqzzzz", "z"])
    texts = draw(source, bare, block_tokens=4)
    assert [len(blocks) for blocks in texts.sets.values()] == [1, 1]
    assert {tuple(bare.decode(block)) for block in every(texts)} == {tuple("zqzq"), tuple("qzzq")}
    with pytest.raises(UsageError, match=r"2 different among its 4 blocks of 4 tokens.*, 3 are needed") as caught:
        draw(source, bare, block_tokens=4, refinement=1)
    assert caught.value.hint is not None
    with pytest.raises(UsageError, match=r"1 different among its 2 blocks of 8 .*for calibration, check\n"):
        draw(write_rows(tmp_path / "one.jsonl", ["zqzqzqzq" * 2, "z"]), bare, block_tokens=8)
    with pytest.raises(UsageError, match="has 16 tokens, fewer than one block of 32"):
        draw(source, bare)


def test_text_of_one_token(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    # End-of-text tokens are not of the text.
    source = write_rows(tmp_path / "z.jsonl", ["z" * length for length in range(1, 40)])
    train = load_corpus(source).train
    with pytest.raises(UsageError, match=f"the text is one token, {sum(len(d.text) for d in train)} times"):
        draw(source, tiny_tokenizer, block_tokens=4)


@pytest.mark.parametrize("changes", [{"calibration": 0}, {"check": 0}, {"refinement": -1}, {"block_tokens": 1}])
def test_numbers_out_of_range(changes: dict[str, int], tiny_tokenizer: PreTrainedTokenizerFast, text_file: str) -> None:
    with pytest.raises(UsageError, match=r"too few|at least 2 tokens"):
        draw(text_file, tiny_tokenizer, **changes)


def blocks_of(*rows: list[int], dtype: torch.dtype = torch.int32) -> TokenBlocks:
    return TokenBlocks(torch.tensor(rows, dtype=dtype), 1.0)


def test_an_overlap_of_blocks_is_refused() -> None:
    mine = blocks_of([1, 2], [3, 4], [5, 6])
    refuse_overlap(mine, blocks_of([2, 1], [4, 5]), ("my", "other"))
    # A memory-mapped store has another dtype.
    store = TokenBlocks(torch.from_numpy(np.array([[7, 8], [5, 6], [1, 2]], dtype=np.uint16)), 1.0, largest_id=8)
    with pytest.raises(UsageError, match="2 of 3 blocks of the other text are in the my text too"):
        refuse_overlap(mine, store, ("my", "other"))
    with pytest.raises(UsageError, match=r"in blocks of 2 tokens .* in blocks of 3"):
        refuse_overlap(mine, blocks_of([1, 2, 3]), ("my", "other"))


def test_a_digest_is_of_the_text_alone() -> None:
    assert Document("a", "text").digest == Document("b", "text").digest == "982d9e3eb996f559"
    assert Document("a", "texts").digest != Document("a", "text").digest
