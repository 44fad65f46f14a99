"""Conversations to tokens by the tokenizer's chat template, of which the answers alone are learned."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lowrank_kit.data.blocks import IGNORED
from lowrank_kit.data.chat import ANSWERING, is_chat, load_chat
from lowrank_kit.data.corpus import Corpus, load_corpus
from lowrank_kit.data.sources import Document
from lowrank_kit.errors import UsageError

logger = logging.getLogger(__name__)

# For a tokenizer without a chat template, as that of a base model: no token that a vocabulary would have to hold.
DEFAULT_TEMPLATE = """\
{%- for message in messages -%}
{{- '### ' + message['role'] | capitalize + ':\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] -}}{{- eos_token -}}{%- endgeneration -%}
{%- else -%}{{- message['content'] -}}{%- endif -%}
{{- '\\n\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Assistant:\\n' -}}{%- endif -%}
"""
_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PER_BATCH = 256


class AnswerTokens(Dataset[dict[str, Tensor]]):
    """N conversations of different lengths. An item is `{"input_ids", "labels"}`, int64 [t] each; `IGNORED` is the
    label of what is no answer.

    Args:
        ids: int32, those of all conversations, one after the other.
        answers: bool, like `ids`: what is learned. The first token of a conversation never is.
        ends: int64 [N], where each conversation ends in `ids`.
        bytes_per_token: UTF-8 bytes of the answers / tokens of the answers.
    """

    def __init__(self, ids: Tensor, answers: Tensor, ends: Tensor, bytes_per_token: float) -> None:
        self.ids = ids
        self.answers = answers
        self.ends = ends
        self.bytes_per_token = bytes_per_token
        # Of the lengths, the ids and what is learned; little-endian on every machine.
        parts = (ends.numpy().astype("<i8"), ids.numpy().astype("<i4"), answers.numpy())
        self.sha256 = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()

    @property
    def num_tokens(self) -> int:
        return self.ids.numel()

    @property
    def largest_id(self) -> int:
        return int(self.ids.max())

    @property
    def num_answer_tokens(self) -> int:
        return int(self.answers.sum())

    @property
    def block_tokens(self) -> int:
        """Tokens of the longest."""
        return int(self.ends.diff(prepend=torch.zeros(1, dtype=torch.int64)).max())

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        end = int(self.ends[index])
        # From the front, so that -1 is the last here too.
        start = int(self.ends[index - 1]) if index % len(self) else 0
        ids = self.ids[start:end].long()
        return {"input_ids": ids, "labels": ids.masked_fill(~self.answers[start:end], IGNORED)}


def padded(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of the items of `AnswerTokens`, filled up at the end to its longest.

    Returns:
        input_ids, labels and attention_mask, int64 [N, t]. What is filled in is masked, so any token will do.
    """
    ids, labels = ([item[key] for item in items] for key in ("input_ids", "labels"))
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }


def with_chat_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, given `DEFAULT_TEMPLATE` if it has no chat template.

    Raises:
        UsageError: it cannot tell where in the text its tokens are.
    """
    if not tokenizer.is_fast:
        raise UsageError(
            f"{type(tokenizer).__name__} does not tell where in the text its tokens are, so answers cannot be marked",
            hint="take a tokenizer with a tokenizer.json",
        )
    if tokenizer.chat_template is None:
        logger.info("the tokenizer has no chat template: a plain one is taken, and saved with the model")
        tokenizer.chat_template = DEFAULT_TEMPLATE
    return tokenizer


def load_text(source: str | None, tokenizer: PreTrainedTokenizerBase, *, max_bytes: int | None = None) -> Corpus:
    """`load_corpus`; of conversations, what the chat template makes of each.

    Raises:
        UsageError: as `load_corpus`, or a conversation the template refuses.
        LowRankError: the source is damaged, or a row is no conversation.
    """
    if source is None or not is_chat(source):
        return load_corpus(source, max_bytes=max_bytes)
    found = load_chat(source, max_bytes=max_bytes)
    tokenizer = with_chat_template(tokenizer)
    train, heldout = (
        tuple(Document(document.name, _rendered(document, tokenizer)[0]) for document in side)
        for side in (found.train, found.heldout)
    )
    return Corpus(source, train, heldout, found.sha256)


def answer_tokens(
    conversations: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    *,
    max_conversations: int | None = None,
    seed: int = 0,
) -> AnswerTokens:
    """Tokenize conversations by the chat template and mark the answers.

    An answer is what `{% generation %}` encloses in the template; in a template without, what an assistant's message
    adds to the prompt for it (`add_generation_prompt`). What is longer than `max_tokens` is cut, and left out where no
    answer remains; a warning counts both.

    Args:
        conversations: of `load_chat`.
        tokenizer: with a chat template.
        max_tokens: of a conversation, at least 2.
        max_conversations: a seeded choice of that many; None or more than there are: all.
        seed: draws the choice.

    Raises:
        UsageError: a conversation the template refuses, a template whose answers cannot be told from the rest, or no
            answer within `max_tokens`.
    """
    if max_tokens < 2:
        raise UsageError(f"a conversation has at least 2 tokens, got {max_tokens}")
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    num_all = num_long = 0
    for ids, answers in _tokenized(conversations, tokenizer):
        num_all += 1
        num_long += len(ids) > max_tokens
        ids, answers = ids[:max_tokens], answers[:max_tokens]
        answers[:1] = False  # nothing comes before it
        if answers.any():
            kept.append((ids, answers))
    if num_long:
        message = "%d of %d conversations are longer than %d tokens and cut; %d have no answer left and are left out"
        logger.warning(message, num_long, num_all, max_tokens, num_all - len(kept))
    if not kept:
        raise UsageError(
            f"none of {num_all} conversations has an answer within its first {max_tokens} tokens",
            hint="raise --block-tokens",
        )
    if max_conversations is not None and max_conversations < len(kept):
        chosen = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))[:max_conversations]
        kept = [kept[index] for index in sorted(chosen.tolist())]
    num_bytes = sum(len(tokenizer.decode(ids[answers]).encode()) for ids, answers in kept)
    all_ids, all_answers = (np.concatenate(side) for side in zip(*kept, strict=True))
    return AnswerTokens(
        torch.from_numpy(all_ids),
        torch.from_numpy(all_answers),
        torch.tensor([len(ids) for ids, _ in kept]).cumsum(0),
        num_bytes / int(all_answers.sum()),
    )


def _tokenized(
    conversations: Iterable[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Token ids, int32, and which of them are answers, bool, of each conversation."""
    conversations = iter(conversations)
    while batch := list(itertools.islice(conversations, _PER_BATCH)):
        texts, spans = zip(*(_rendered(document, tokenizer) for document in batch), strict=True)
        encoded = tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        for ids, offsets, found in zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True):
            first = np.array([begin for begin, _ in offsets])
            answers = np.zeros(len(ids), dtype=bool)
            for begin, end in found:
                answers |= (begin <= first) & (first < end)
            yield np.array(ids, dtype=np.int32), answers


def _rendered(document: Document, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as text, and where in it the answers are."""
    conversation = json.loads(document.text)
    tools = conversation.get("tools")
    try:
        template = tokenizer.get_chat_template(tools=tools)
        if _MARKS_ANSWERS.search(template):
            return _marked(conversation["messages"], tools, template, tokenizer)
        return _compared(document.name, conversation["messages"], tools, tokenizer)
    # What templates raise on purpose, and what comes of a role or a field they did not expect.
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise UsageError(
            f"{document.name}: the tokenizer's chat template refuses this conversation: {error}"
        ) from error


def _marked(
    messages: list[dict[str, Any]], tools: list[Any] | None, template: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    # The tokenizer's own method gives a mask of tokens, but loses an answer, and all after it, that begins with a
    # character which lies in no token's offsets, as a space may.
    (text,), (spans,) = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return text, spans


def _compared(
    name: str, messages: list[dict[str, Any]], tools: list[Any] | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """An answer is what the text up to it has more than the prompt for it."""
    render = partial(tokenizer.apply_chat_template, tools=tools, tokenize=False)
    text = render(messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == ANSWERING:
            prompt = render(messages[:index], add_generation_prompt=True)
            answered = render(messages[: index + 1])
            if not (answered.startswith(prompt) and text.startswith(answered)):
                raise UsageError(
                    f"{name}, message {index + 1}: the chat template writes what comes before an answer in another "
                    "way once there is more, so the answer cannot be told from the rest",
                    hint="mark the answers with {% generation %} in the template, or give rows with one answer each",
                )
            spans.append((len(prompt), len(answered)))
    return text, spans
