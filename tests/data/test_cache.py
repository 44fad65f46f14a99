from __future__ import annotations

import gzip
import json
import logging
import multiprocessing
import os
import resource
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerFast as Tokenizer

from lowrank_kit.data import cache as cache_module
from lowrank_kit.data.cache import StoredCorpus, cache_folder, stored_corpus, tokenizer_sha256
from lowrank_kit.data.stream import StreamedCorpus
from lowrank_kit.data.tokenizer import train_tokenizer
from lowrank_kit.errors import LowRankError, UsageError
from tests.pages import write_pages


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    return write_pages(tmp_path / "pages.jsonl")


def stored(source: Path, tokenizer: Tokenizer | None, max_bytes: int | None = None) -> StoredCorpus:
    return stored_corpus(str(source), tokenizer, vocab_size=300, model_max_length=32, max_bytes=max_bytes)


def made(cache: Path) -> dict[Path, int]:
    """When each file of the cache was written."""
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert cache_folder() == cache
    monkeypatch.setenv("LOWRANK_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/lowrank-kit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "lowrank-kit"


def test_a_text_is_tokenized_once(pages: Path, tiny_tokenizer: Tokenizer, cache: Path) -> None:
    first = stored(pages, tiny_tokenizer)
    written = made(cache)
    assert {path.name for path in written} == {"tokens.bin", "ends.bin", "store.json"}
    assert len(written) == 6
    again = stored(pages, tiny_tokenizer)
    assert made(cache) == written
    assert again.sha256 == first.sha256
    assert (again.train.counts, again.heldout.counts) == (first.train.counts, first.heldout.counts)
    texts = [document for document in StreamedCorpus(str(pages)).documents() if document.side == "heldout"]
    assert first.heldout.counts.documents == len(texts) == 6
    assert tiny_tokenizer.decode(first.heldout.ids[: first.heldout.ends[0] - 1]) == texts[0].text


def test_what_differs_is_made_anew(pages: Path, tiny_tokenizer: Tokenizer) -> None:
    other = train_tokenizer(["other text"], 300, 32)
    first = stored(pages, tiny_tokenizer)
    assert stored(pages, other).train.counts.sha256 != first.train.counts.sha256
    assert stored(pages, tiny_tokenizer, max_bytes=5000).train.counts.documents < first.train.counts.documents
    pages.write_text(pages.read_text().replace("Page 7.", "Page X."))  # of the same size
    os.utime(pages, ns=(0, 0))
    changed = stored(pages, tiny_tokenizer)
    assert changed.sha256 != first.sha256
    assert changed.train.folder != first.train.folder


def test_a_copy_of_the_text_is_the_same_text(pages: Path, tiny_tokenizer: Tokenizer) -> None:
    first = stored(pages, tiny_tokenizer)
    os.utime(pages, ns=(0, 0))
    again = stored(pages, tiny_tokenizer)
    assert again.train.folder != first.train.folder
    assert again.sha256 == first.sha256


@pytest.mark.parametrize("name", ["train/tokens.bin", "heldout/ends.bin", "train/store.json"])
def test_a_damaged_store_is_made_again(
    pages: Path, tiny_tokenizer: Tokenizer, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = stored(pages, tiny_tokenizer)
    damaged = first.train.folder.parent / name
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-4])
    with caplog.at_level(logging.WARNING):
        again = stored(pages, tiny_tokenizer)
    assert "is made again: the token store" in caplog.text
    assert damaged.read_bytes() == content
    assert again.sha256 == first.sha256


def test_a_tokenizer_is_trained_once(pages: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = stored(pages, None)
    train = [document.text for document in StreamedCorpus(str(pages)).documents() if document.side == "train"]
    assert tokenizer_sha256(first.tokenizer) == tokenizer_sha256(train_tokenizer(train, 300, 32))
    written = made(cache)
    again = stored(pages, None)
    assert made(cache) == written
    assert again.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    # Given as one that was saved with a run, it finds the same tokens.
    assert stored(pages, first.tokenizer).train.folder == first.train.folder
    (file,) = cache.rglob("tokenizer.json")
    file.write_text("{")
    with caplog.at_level(logging.WARNING):
        assert stored(pages, None).sha256 == first.sha256
    assert "is made again" in caplog.text


def test_the_hash_of_a_tokenizer(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    before = tokenizer_sha256(tiny_tokenizer)
    tiny_tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_sha256(loaded) == before
    loaded(["a", "b c"], padding=True, truncation=True, max_length=1)
    assert tokenizer_sha256(loaded) == before
    loaded.eos_token = None
    assert tokenizer_sha256(loaded) != before
    assert tokenizer_sha256(train_tokenizer(["other text"], 384, 128)) != before


def test_bad_text_leaves_nothing(tmp_path: Path, tiny_tokenizer: Tokenizer, cache: Path) -> None:
    pages = write_pages(tmp_path / "pages.jsonl")
    pages.write_bytes(pages.read_bytes()[:-9])
    with pytest.raises(LowRankError, match=r"line 60: the last line is cut off"):
        stored(pages, tiny_tokenizer)
    (tmp_path / "pages.jsonl.gz").write_bytes(gzip.compress(b"{}" * 1000)[:-9])
    with pytest.raises(LowRankError, match=r"pages\.jsonl\.gz could not be read"):
        stored(tmp_path / "pages.jsonl.gz", tiny_tokenizer)
    with pytest.raises(UsageError, match="no such text source"):
        stored(tmp_path / "absent", tiny_tokenizer)
    assert made(cache) == {}
    assert not list(cache.rglob("*.tmp"))


# In processes of their own

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


class Fork:
    """A process that makes the store of a text and tells: "writes" when it begins to, then the hash or the error."""

    def __init__(self, source: Path, tokenizer: Tokenizer, largest_file: int | None = None) -> None:
        context = multiprocessing.get_context("fork")
        self.told, teller = context.Pipe(duplex=False)
        self.process = context.Process(target=self._run, args=(source, tokenizer, largest_file, teller))
        self.process.start()
        teller.close()

    @staticmethod
    def _run(source: Path, tokenizer: Tokenizer, largest_file: int | None, teller: Connection) -> None:
        write = cache_module._write_stores

        def telling(*arguments: Any) -> None:
            teller.send("writes")
            write(*arguments)

        cache_module._write_stores = telling  # type: ignore[assignment]
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        try:
            teller.send(stored(source, tokenizer).sha256)
        except LowRankError as error:
            teller.send(str(error))

    def everything(self) -> list[str]:
        """What it told, once it has ended."""
        told = []
        with suppress(EOFError):
            while self.told.poll(60):
                told.append(self.told.recv())
        self.process.join(60)
        return told


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A text that takes a while."""
    return write_pages(tmp_path / "large.jsonl", num_pages=2000)


@needs_fork
def test_two_processes_at_once_make_one_store(large: Path, tiny_tokenizer: Tokenizer, cache: Path) -> None:
    forks = [Fork(large, tiny_tokenizer) for _ in range(2)]
    one, other = sorted((fork.everything() for fork in forks), key=len)
    assert [fork.process.exitcode for fork in forks] == [0, 0]
    assert other == ["writes", *one]  # the one that came later waited
    assert one == [stored(large, tiny_tokenizer).sha256]
    assert len(made(cache)) == 6


@needs_fork
def test_what_a_killed_process_left_is_cleared_away(large: Path, tiny_tokenizer: Tokenizer, cache: Path) -> None:
    fork = Fork(large, tiny_tokenizer)
    assert fork.told.recv() == "writes"
    while not list(cache.rglob("tokens.bin")):
        time.sleep(0.01)
    fork.process.kill()
    fork.process.join()
    (left,) = (path for path in (cache / "tokens").iterdir() if path.is_dir())
    assert left.suffix == ".tmp"
    corpus = stored(large, tiny_tokenizer)
    corpus.train.verify()
    assert [path for path in (cache / "tokens").iterdir() if path.is_dir()] == [corpus.train.folder.parent]


@needs_fork
def test_a_full_disk(large: Path, tiny_tokenizer: Tokenizer, cache: Path) -> None:
    writes, error = Fork(large, tiny_tokenizer, largest_file=50_000).everything()
    assert writes == "writes"
    assert "could not be written: [Errno 27] File too large\nhint: make room there, or set LOWRANK_CACHE" in error
    assert [path for path in cache.rglob("*") if path.suffix != ".lock"] == [cache / "tokens"]


def test_a_cache_that_cannot_be_made(pages: Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_CACHE", str(pages))
    with pytest.raises(LowRankError, match=r"the cache .*/tokens/.* could not be written: .*Not a directory"):
        stored(pages, tiny_tokenizer)
    assert json.loads(pages.read_text().splitlines()[0])["text"].startswith("Page 0.")
