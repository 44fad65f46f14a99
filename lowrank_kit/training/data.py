"""What a run reads: text, tokenizer and token blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lowrank_kit.checkpoint.folder import resolve_model
from lowrank_kit.checkpoint.loading import load_tokenizer
from lowrank_kit.data.blocks import TokenBlocks, token_blocks
from lowrank_kit.data.corpus import Corpus, load_corpus
from lowrank_kit.data.tokenizer import train_tokenizer
from lowrank_kit.training.settings import TrainSettings


@dataclass(frozen=True)
class RunData:
    """What a run reads: the corpus, its tokenizer and the token blocks of both sides."""

    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    train: TokenBlocks
    heldout: TokenBlocks


def load_data(settings: TrainSettings, *, saved_tokenizer: Path | None = None) -> RunData:
    """Read, split and tokenize the text of a run."""
    # The split has a seed of its own: a run with another seed must not train on what another is scored on.
    corpus = load_corpus(settings.text, max_bytes=settings.max_bytes)
    given = saved_tokenizer or settings.tokenizer or settings.model
    if given is None:
        tokenizer: PreTrainedTokenizerBase = train_tokenizer(
            (d.text for d in corpus.train), vocab_size=settings.vocab_size, model_max_length=settings.block_tokens
        )
    else:
        tokenizer = load_tokenizer(resolve_model(str(given)))
    return RunData(
        corpus=corpus,
        tokenizer=tokenizer,
        train=token_blocks(corpus.train, tokenizer, settings.block_tokens),
        heldout=token_blocks(
            corpus.heldout, tokenizer, settings.block_tokens, max_blocks=settings.eval_blocks, seed=settings.seed
        ),
    )
