from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowrank_kit.data import stream
from lowrank_kit.data.corpus import load_corpus
from lowrank_kit.data.sources import read_source
from lowrank_kit.data.stream import StreamedCorpus
from lowrank_kit.errors import LowRankError, UsageError
from tests.pages import write_pages


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """60 pages, the first of them three times."""
    path = write_pages(tmp_path / "pages.jsonl")
    first = path.read_text().partition("\n")[0] + "\n"
    path.write_text(first + path.read_text() + first)
    return path


def sides_of(corpus: StreamedCorpus) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"train": [], "heldout": []}
    for document in corpus.documents():
        found[document.side].append(document.text)
    return found


@pytest.mark.parametrize("max_bytes", [None, 5000, 10**9])
@pytest.mark.parametrize("seed", [0, 3])
def test_a_text_is_on_the_side_where_load_corpus_has_it(pages: Path, max_bytes: int | None, seed: int) -> None:
    whole = load_corpus(str(pages), max_bytes=max_bytes, seed=seed)
    streamed = StreamedCorpus(str(pages), max_bytes=max_bytes, seed=seed)
    found = sides_of(streamed)
    assert sorted(found["train"]) == sorted(document.text for document in whole.train)
    assert sorted(found["heldout"]) == sorted(document.text for document in whole.heldout)
    assert streamed.num_bytes == sum(len(text.encode()) for text in found["train"] + found["heldout"])


def test_documents_come_in_the_order_they_are_read(pages: Path) -> None:
    assert [d.name for d in StreamedCorpus(str(pages)).documents()] == [d.name for d in read_source(str(pages))]


def test_a_sample_is_of_the_train_side(pages: Path) -> None:
    corpus = StreamedCorpus(str(pages))
    train = sides_of(corpus)["train"]
    assert list(corpus.sample(10**9)) == train
    sample = list(corpus.sample(3000))
    assert 2500 < sum(len(text.encode()) for text in sample) <= 3000
    assert [text for text in train if text in sample] == sample
    assert sample != train[: len(sample)]  # drawn from all of it


def test_a_large_plain_file_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PIECE_BYTES", 200)
    path = tmp_path / "one.txt"
    path.write_text("".join(f"line {number}\n" for number in range(1000)))
    found = sides_of(StreamedCorpus(str(path)))
    assert 0.05 < sum(map(len, found["heldout"])) / path.stat().st_size <= 0.1
    assert sum(map(len, found["train"] + found["heldout"])) == path.stat().st_size


def test_a_source_that_changes_while_it_is_read(pages: Path) -> None:
    corpus = StreamedCorpus(str(pages))
    text = pages.read_text()
    sides_of(corpus)
    pages.write_text(text.replace("Page 30.", "Page XX."))
    with pytest.raises(LowRankError, match=r"pages\.jsonl changed while it was read, at pages\.jsonl:32\n"):
        sides_of(corpus)
    pages.write_text(text + json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(LowRankError, match=r"changed while it was read, at pages\.jsonl:63\n"):
        list(corpus.sample(100))
    pages.write_text("".join(text.splitlines(keepends=True)[:-1]))
    with pytest.raises(LowRankError, match="changed while it was read, at its end"):
        sides_of(corpus)


def test_what_cannot_be_split(tmp_path: Path, pages: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("x " * 50)
    with pytest.raises(UsageError, match=r"100 bytes in 1 documents\nhint: .*--no-stream"):
        sides_of(StreamedCorpus(str(path)))
    with pytest.raises(UsageError, match="documents, capped at 3"):
        sides_of(StreamedCorpus(str(pages), max_bytes=3))
    with pytest.raises(UsageError, match="max_bytes is at least 1"):
        StreamedCorpus(str(pages), max_bytes=0)
    path.write_text("")
    with pytest.raises(UsageError, match="0 bytes in 0 documents"):
        sides_of(StreamedCorpus(str(path)))
