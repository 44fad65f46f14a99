"""What a run reads: text or conversations, the tokenizer, and the tokens of both sides."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lowrank_kit.checkpoint.hub import resolve_model
from lowrank_kit.checkpoint.loading import load_tokenizer
from lowrank_kit.data.answers import AnswerTokens, answer_tokens, with_chat_template
from lowrank_kit.data.blocks import TokenBlocks, token_blocks
from lowrank_kit.data.cache import StoredCorpus, stored_corpus
from lowrank_kit.data.chat import contents, is_chat, load_chat
from lowrank_kit.data.corpus import Corpus, load_corpus
from lowrank_kit.data.sources import text_bytes
from lowrank_kit.data.store import TokenStore
from lowrank_kit.data.tokenizer import train_tokenizer
from lowrank_kit.errors import UsageError
from lowrank_kit.training.settings import TrainSettings

logger = logging.getLogger(__name__)

# Above it a text is read from the cache, unless the settings say otherwise: below, all of it fits into any memory.
STREAM_ABOVE_BYTES = 256_000_000


@dataclass(frozen=True)
class RunData:
    """What a run reads: the corpus, its tokenizer and the tokens of both sides."""

    corpus: Corpus | StoredCorpus
    tokenizer: PreTrainedTokenizerBase
    train: TokenBlocks | AnswerTokens
    heldout: TokenBlocks | AnswerTokens

    def step_tokens(self, settings: TrainSettings) -> int:
        """Tokens in an optimizer step; of conversations, in the mean."""
        return round(settings.batch_size * settings.accumulate * self.train.num_tokens / len(self.train))


def load_data(settings: TrainSettings, *, saved_tokenizer: Path | None = None) -> RunData:
    """Read, split and tokenize the text of a run or its conversations, or take its tokens from the cache.

    Raises:
        UsageError: text that cannot be trained on; settings that are not for conversations where it holds these.
        LowRankError: a source that is damaged, or a row that is no conversation.
    """
    given = saved_tokenizer or settings.tokenizer or settings.model
    tokenizer = None if given is None else load_tokenizer(resolve_model(str(given)))
    if settings.text is not None and is_chat(settings.text):
        return _chat(settings, settings.text, tokenizer)
    return _streamed(settings, tokenizer) if _streams(settings) else _in_memory(settings, tokenizer)


def _streams(settings: TrainSettings) -> bool:
    if settings.stream is not None:
        return settings.stream
    return text_bytes(settings.text) > STREAM_ABOVE_BYTES


# The split has a seed of its own: a run with another seed must not train on what another is scored on.


def _in_memory(settings: TrainSettings, tokenizer: PreTrainedTokenizerBase | None) -> RunData:
    corpus = load_corpus(settings.text, max_bytes=settings.max_bytes)
    tokenizer = tokenizer or _new_tokenizer(settings, (d.text for d in corpus.train))
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


def _chat(settings: TrainSettings, source: str, tokenizer: PreTrainedTokenizerBase | None) -> RunData:
    if settings.tokens is not None:
        raise UsageError(
            f"{source} holds conversations, which differ in length: --tokens cannot say how many steps to train",
            hint="--steps 1000",
        )
    if settings.stream or settings.packing != "blocks":
        raise UsageError(
            f"{source} holds conversations, each a sequence of its own, in memory: --stream and --packing are for text",
            hint="leave them out",
        )
    corpus = load_chat(source, max_bytes=settings.max_bytes)
    tokenizer = with_chat_template(tokenizer or _new_tokenizer(settings, map(contents, corpus.train)))
    train = answer_tokens(corpus.train, tokenizer, settings.block_tokens)
    heldout = answer_tokens(
        corpus.heldout, tokenizer, settings.block_tokens, max_conversations=settings.eval_blocks, seed=settings.seed
    )
    logger.info(
        "%d conversations to train on, %d of their %d tokens in answers; once through them is %d steps",
        *(len(train), train.num_answer_tokens, train.num_tokens),
        -(-len(train) // (settings.batch_size * settings.accumulate)),
    )
    return RunData(corpus, tokenizer, train, heldout)


def _new_tokenizer(settings: TrainSettings, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    return train_tokenizer(texts, vocab_size=settings.vocab_size, model_max_length=settings.block_tokens)
