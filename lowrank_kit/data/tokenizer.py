"""A byte-level BPE tokenizer trained on the corpus, for models that start from nothing."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lowrank_kit.errors import UsageError

END_OF_TEXT = "<|endoftext|>"
# Every byte is a token of its own, so that any text can be encoded; and END_OF_TEXT.
SMALLEST_VOCABULARY = 256 + 1


def train_tokenizer(texts: Iterable[str], vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: lossless on any text, and the same tokenizer for the same texts in the same order.

    One special token, `<|endoftext|>`, with id 0, is beginning, end and padding at once.

    Args:
        texts: the training texts; they are read once.
        vocab_size: how many tokens at most. A small corpus yields fewer: build the model for `len(tokenizer)`.
        model_max_length: context length of the model it is for, in tokens.

    Returns:
        A tokenizer that `save_pretrained` writes and `AutoTokenizer.from_pretrained` reads.

    Raises:
        UsageError: `vocab_size` is below 257 (256 bytes and the special token).
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UsageError(
            f"a byte-level vocabulary needs at least {SMALLEST_VOCABULARY} tokens, got {vocab_size}",
            hint="4096 is a good size for 10 MB of text",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=model_max_length,
    )
