"""Tokens of a text source from the cache; made first where they are not in it, or no longer what they were."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lowrank_kit.data.blocks import tokenized
from lowrank_kit.data.sources import STDLIB, source_files
from lowrank_kit.data.store import STORE_VERSION, StoreWriter, TokenStore
from lowrank_kit.data.stream import PIECE_BYTES, SIDES, StreamedCorpus
from lowrank_kit.data.tokenizer import train_tokenizer
from lowrank_kit.errors import LowRankError
from lowrank_kit.report.files import new_folder

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "LOWRANK_CACHE"
# A byte-level BPE hardly changes with more, and training it takes some ten times the text in memory.
SAMPLE_BYTES = 64_000_000

Cached = TypeVar("Cached")


@dataclass(frozen=True)
class StoredCorpus:
    """A text source as tokens on disk; `sha256` stands for the texts of both sides and their order."""

    source: str
    tokenizer: PreTrainedTokenizerBase
    train: TokenStore
    heldout: TokenStore
    sha256: str


def cache_folder() -> Path:
    """$LOWRANK_CACHE, or lowrank-kit in the user's cache folder."""
    given = os.environ.get(CACHE_VARIABLE)
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return (Path(given) if given else home / "lowrank-kit").expanduser().absolute()


def stored_corpus(
    source: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocab_size: int,
    model_max_length: int,
    max_bytes: int | None = None,
) -> StoredCorpus:
    """The tokens of a text source, split as in `StreamedCorpus`.

    They are taken from the cache where a run before made them of the same files (names, sizes, times of change) with
    the same tokenizer. Of processes that want the same at once, ranks of one run or runs of their own, one makes it
    and the others wait.

    Args:
        source: as in `read_source`.
        tokenizer: None trains one on a sample of 64 MB of the train side.
        vocab_size, model_max_length: of a tokenizer trained here.
        max_bytes: cap on both sides together.

    Raises:
        UsageError: the source is empty or cannot be split.
        LowRankError: the source is damaged, or the cache cannot be written to, as on a full disk.
    """
    corpus = StreamedCorpus(source, max_bytes=max_bytes)
    text = {**_files_key(source), "split": [corpus.heldout_fraction, corpus.seed, max_bytes, PIECE_BYTES]}
    if tokenizer is None:
        key = {**text, "tokenizer": [vocab_size, model_max_length, SAMPLE_BYTES, tokenizers.__version__]}
        tokenizer = _cached(
            "tokenizers",
            key,
            PreTrainedTokenizerFast.from_pretrained,
            lambda folder: _train_tokenizer(corpus, folder, vocab_size, model_max_length),
        )
    chosen = tokenizer
    key = {**text, "tokenizer": tokenizer_sha256(chosen), "versions": [STORE_VERSION, tokenizers.__version__]}
    train, heldout = _cached("tokens", key, _open_stores, lambda folder: _write_stores(corpus, chosen, folder))
    sha256 = hashlib.sha256(f"{train.counts.text_sha256}:{heldout.counts.text_sha256}".encode()).hexdigest()
    return StoredCorpus(corpus.source, chosen, train, heldout, sha256)


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of what decides which ids a text becomes; the same before saving and after loading."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: dict[str, Any] = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        rules = json.loads(backend.to_str())
        # Set anew by each call.
        rules |= {"padding": None, "truncation": None}
    return _sha256_of({**rules, "end_of_text": tokenizer.eos_token_id})


def _files_key(source: str | None) -> dict[str, Any]:
    stats = {name: path.stat() for name, path in source_files(source).items()}
    return {
        "source": source or STDLIB,
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in sorted(stats.items())],
    }


def _train_tokenizer(corpus: StreamedCorpus, folder: Path, vocab_size: int, model_max_length: int) -> None:
    logger.info("training a tokenizer on a sample of %s", corpus.source)
    train_tokenizer(corpus.sample(SAMPLE_BYTES), vocab_size, model_max_length).save_pretrained(folder)


def _write_stores(corpus: StreamedCorpus, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    with (
        StoreWriter(folder / SIDES[0], tokenizer) as train,
        StoreWriter(folder / SIDES[1], tokenizer) as heldout,
        tqdm(total=corpus.num_bytes, desc="tokenize", unit="B", unit_scale=True, disable=None) as bar,
    ):
        writers = dict(zip(SIDES, (train, heldout), strict=True))
        for document, ids in tokenized(corpus.documents(), tokenizer):
            text = document.text.encode()
            writers[document.side].add(text, ids)
            bar.update(len(text))


def _open_stores(folder: Path) -> tuple[TokenStore, TokenStore]:
    return TokenStore(folder / SIDES[0]), TokenStore(folder / SIDES[1])


def _cached(kind: str, key: dict[str, Any], load: Callable[[Path], Cached], make: Callable[[Path], None]) -> Cached:
    """What `load` reads from the folder of a key; `make` fills the folder where there is none, or a damaged one."""
    folder = cache_folder() / kind / _sha256_of(key)[:32]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if folder.exists():
                try:
                    return load(folder)
                except Exception as error:  # what a damaged file makes a library raise can be anything
                    logger.warning("%s is made again: %s", folder, str(error).partition("\n")[0])
                    shutil.rmtree(folder)
            with new_folder(folder) as unfinished:
                make(unfinished)
            return load(folder)
    except OSError as error:
        raise LowRankError(
            f"the cache {folder} could not be written: {error}",
            hint=f"make room there, or set {CACHE_VARIABLE} to a folder on another disk",
        ) from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else makes this folder; what a process left of it that was killed is removed.

    A lock and no barrier: it also holds between runs that know nothing of each other, it does not time out while a
    large text is tokenized, and the system lets go of it when a process dies.
    """
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        logger.info("waiting for the process that makes %s", folder)
        lock.acquire()
    try:
        for left in folder.parent.glob(f".{folder.name}.*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        lock.release()


def _sha256_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
