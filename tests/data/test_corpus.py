from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_kit.data.corpus import Corpus, load_corpus
from lowrank_kit.data.sources import Document
from lowrank_kit.errors import UsageError


def num_bytes(documents: Sequence[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def texts(documents: Sequence[Document]) -> set[str]:
    return {document.text for document in documents}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """200 files of 100 bytes; those whose numbers differ by 100 are equal."""
    for number in range(200):
        (tmp_path / f"{number:03}.txt").write_text(f"file {number % 100:03} " * 11 + "\n")
    return tmp_path


def test_a_tenth_of_the_bytes_is_held_out_by_document(folder: Path) -> None:
    corpus = load_corpus(str(folder))
    assert corpus.source == str(folder)
    assert num_bytes(corpus.heldout) == 2000
    assert num_bytes(corpus.train) == 18000
    # Equal documents are on the same side: no text is on both.
    assert not texts(corpus.train) & texts(corpus.heldout)
    assert [document.name for document in corpus.train] == sorted(document.name for document in corpus.train)


def test_the_split_depends_on_the_seed_and_the_contents_only(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    corpus = load_corpus(str(folder))
    assert load_corpus(str(folder)) == corpus
    assert texts(load_corpus(str(folder), seed=1).heldout) != texts(corpus.heldout)
    # The same texts under names that sort the other way.
    renamed = tmp_path_factory.mktemp("renamed")
    for number in range(200):
        (renamed / f"{999 - number}.txt").write_bytes((folder / f"{number:03}.txt").read_bytes())
    other = load_corpus(str(renamed))
    assert texts(other.heldout) == texts(corpus.heldout)
    assert other.sha256 != corpus.sha256


def test_another_document_moves_few(folder: Path) -> None:
    before = texts(load_corpus(str(folder)).heldout)
    (folder / "new.txt").write_text("a new one\n")
    after = texts(load_corpus(str(folder)).heldout)
    assert len(before ^ after) <= 2


def test_the_hash_covers_names_texts_and_the_split(folder: Path) -> None:
    hashes = {load_corpus(str(folder), seed=seed).sha256 for seed in (0, 1)}
    (folder / "000.txt").rename(folder / "renamed.txt")
    hashes.add(load_corpus(str(folder)).sha256)
    (folder / "renamed.txt").write_text("changed")
    hashes.add(load_corpus(str(folder)).sha256)
    assert len(hashes) == 4


def test_the_hash_tells_where_the_training_part_ends(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    # Rename so that the names and texts of both sides, one after the other, are the same for both fractions.
    one, two = (load_corpus(str(tmp_path), heldout_fraction=fraction).heldout for fraction in (0.1, 0.2))
    (last,), (second_last,) = one, set(two) - set(one)
    (tmp_path / second_last.name).rename(tmp_path / "y.txt")
    (tmp_path / last.name).rename(tmp_path / "z.txt")
    corpora = [load_corpus(str(tmp_path), heldout_fraction=fraction) for fraction in (0.1, 0.2)]
    assert corpora[0].train + corpora[0].heldout == corpora[1].train + corpora[1].heldout
    assert corpora[0].sha256 != corpora[1].sha256


@pytest.mark.parametrize("separator", ["\n\n", "\n", " "])
def test_a_single_document_is_cut_near_the_mark(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "one.txt"
    text = separator.join(f"piece{number:03}" for number in range(200))
    path.write_text(text)
    corpus = load_corpus(str(path), heldout_fraction=0.25)
    (train,), (heldout,) = corpus.train, corpus.heldout
    assert train.text + heldout.text == text
    assert train.text.endswith(separator)
    assert 0.24 < len(heldout.text) / len(text) < 0.28


def test_a_line_is_preferred_to_a_word_and_a_paragraph_to_a_line(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("x" * 830 + "\n\n" + "y" * 20 + "\n" + "z " * 74)
    assert load_corpus(str(path)).train[0].text.endswith("x\n\n")
    path.write_text("x" * 850 + "\n" + "z " * 74)
    assert load_corpus(str(path)).train[0].text.endswith("x\n")


def test_few_large_documents_are_each_cut(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} line {number}\n" for number in range(100)))
    corpus = load_corpus(str(tmp_path))
    assert [document.name for document in corpus.train] == [document.name for document in corpus.heldout]
    assert 0.08 < num_bytes(corpus.heldout) / (num_bytes(corpus.train) + num_bytes(corpus.heldout)) < 0.13
    assert not texts(corpus.train) & texts(corpus.heldout)


def test_an_end_that_is_the_beginning_of_another_is_trained_on_only(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 83 + "\n" + "b" * 16)
    (tmp_path / "b.txt").write_text("b" * 16 + "cc")
    corpus = load_corpus(str(tmp_path))
    assert texts(corpus.train) == {"a" * 83 + "\n", "b" * 16}
    assert texts(corpus.heldout) == {"cc"}


def test_a_cap_takes_part_of_each_side(folder: Path) -> None:
    whole, capped = load_corpus(str(folder)), load_corpus(str(folder), max_bytes=5000)
    assert (num_bytes(capped.train), num_bytes(capped.heldout)) == (4400, 400)  # texts of 200 bytes below 4500 and 500
    assert texts(capped.train) < texts(whole.train)
    assert texts(capped.heldout) < texts(whole.heldout)
    assert load_corpus(str(folder), max_bytes=10**9) == whole


def test_a_cap_below_the_only_document_cuts_it_at_a_line(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("".join(f"líne {number:04}\n" for number in range(1000)))
    corpus = load_corpus(str(path), max_bytes=1001)
    assert num_bytes(corpus.train) == 900 // 11 * 11
    assert num_bytes(corpus.heldout) == 100 // 11 * 11
    assert corpus.train[0].text.startswith("líne 0000\n")


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    contents=st.lists(st.text(alphabet="ab \n", min_size=1, max_size=60), min_size=1, max_size=12),
    fraction=st.floats(0.05, 0.6),
    seed=st.integers(0, 3),
)
def test_no_text_is_on_both_sides(
    tmp_path_factory: pytest.TempPathFactory, contents: list[str], fraction: float, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    for number, text in enumerate(contents):
        (folder / f"{number}.txt").write_text(text)
    try:
        corpus: Corpus = load_corpus(str(folder), heldout_fraction=fraction, seed=seed)
    except UsageError:
        return  # too small to split, which is said
    assert any(document.text.strip() for document in corpus.train)
    assert any(document.text.strip() for document in corpus.heldout)
    assert not texts(corpus.train) & texts(corpus.heldout)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_that_is_none(folder: Path, fraction: float) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        load_corpus(str(folder), heldout_fraction=fraction)


def test_too_little_text(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("x")
    with pytest.raises(UsageError, match=r"too small to hold out 0\.1 of it: 1 bytes in 1 documents"):
        load_corpus(str(path))
    path.write_text("")
    with pytest.raises(UsageError, match="0 bytes in 0 documents"):
        load_corpus(str(path))
    with pytest.raises(UsageError, match="documents, capped at 3"):
        load_corpus(str(folder), max_bytes=3)
    with pytest.raises(UsageError, match="max_bytes is at least 1, got 0"):
        load_corpus(str(folder), max_bytes=0)
