"""What a run reads: text, tokenizer and token blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lowrank_kit.checkpoint.folder import resolve_model
from lowrank_kit.checkpoint.loading import load_tokenizer
from lowrank_kit.data.blocks import TokenBlocks, token_blocks
from lowrank_kit.data.cache import StoredCorpus, stored_corpus
from lowrank_kit.data.corpus import Corpus, load_corpus
from lowrank_kit.data.sources import text_bytes
from lowrank_kit.data.store import TokenStore
from lowrank_kit.data.tokenizer import train_tokenizer
from lowrank_kit.training.settings import TrainSettings

# Above it a text is read from the cache, unless the settings say otherwise: below, all of it fits into any memory.
STREAM_ABOVE_BYTES = 256_000_000


@dataclass(frozen=True)
class RunData:
    """What a run reads: the corpus, its tokenizer and the token blocks of both sides."""

    corpus: Corpus | StoredCorpus
    tokenizer: PreTrainedTokenizerBase
    train: TokenBlocks
    heldout: TokenBlocks


def load_data(settings: TrainSettings, *, saved_tokenizer: Path | None = None) -> RunData:
    """Read, split and tokenize the text of a run, or take its tokens from the cache."""
    given = saved_tokenizer or settings.tokenizer or settings.model
    tokenizer = None if given is None else load_tokenizer(resolve_model(str(given)))
    return _streamed(settings, tokenizer) if _streams(settings) else _in_memory(settings, tokenizer)


def _streams(settings: TrainSettings) -> bool:
    if settings.stream is not None:
        return settings.stream
    return text_bytes(settings.text) > STREAM_ABOVE_BYTES


# The split has a seed of its own: a run with another seed must not train on what another is scored on.


def _in_memory(settings: TrainSettings, tokenizer: PreTrainedTokenizerBase | None) -> RunData:
    corpus = load_corpus(settings.text, max_bytes=settings.max_bytes)
    if tokenizer is None:
        tokenizer = train_tokenizer(
            (d.text for d in corpus.train), vocab_size=settings.vocab_size, model_max_length=settings.block_tokens
        )
    blocks = partial(token_blocks, tokenizer=tokenizer, block_tokens=settings.block_tokens, packing=settings.packing)
    heldout = blocks(corpus.heldout, max_blocks=settings.eval_blocks, seed=settings.seed)
    return RunData(corpus, tokenizer, train=blocks(corpus.train), heldout=heldout)


def _streamed(settings: TrainSettings, tokenizer: PreTrainedTokenizerBase | None) -> RunData:
    corpus = stored_corpus(
        settings.text,
        tokenizer,
        vocab_size=settings.vocab_size,
        model_max_length=settings.block_tokens,
        max_bytes=settings.max_bytes,
    )
    blocks = partial(TokenStore.blocks, block_tokens=settings.block_tokens, packing=settings.packing)
    heldout = blocks(corpus.heldout, max_blocks=settings.eval_blocks, seed=settings.seed)
    return RunData(corpus, corpus.tokenizer, train=blocks(corpus.train), heldout=heldout)
