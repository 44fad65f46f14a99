"""Conversations as tokens: which of them are answers, by whatever template, and how they go into a batch."""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from lowrank_kit.data.answers import DEFAULT_TEMPLATE, IGNORED, AnswerTokens, answer_tokens, padded, with_chat_template
from lowrank_kit.data.sources import Document
from lowrank_kit.errors import UsageError

Message = dict[str, str]
SYSTEM = {"role": "system", "content": "be short"}
TALK = [
    *({"role": "user", "content": "who is it?"}, {"role": "assistant", "content": " the miller"}),
    *({"role": "user", "content": "and then?"}, {"role": "assistant", "content": "the boy sang"}),
]
# The same, with and without marks.
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def document(messages: list[Message], **more: Any) -> Document:
    return Document("chat.jsonl:1", json.dumps({"messages": messages, **more}))


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def learned(tokens: AnswerTokens, tokenizer: PreTrainedTokenizerFast, index: int = 0) -> list[str]:
    """Runs of answer tokens, as text."""
    runs: list[list[int]] = [[]]
    for label in tokens[index]["labels"].tolist():
        if label != IGNORED:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def test_the_default_template(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_chat_template(with_template(tiny_tokenizer, None))
    assert tokenizer.chat_template == DEFAULT_TEMPLATE
    tokens = answer_tokens([document([SYSTEM, *TALK])], tokenizer, 128)
    end = "<|endoftext|>"
    expected = (
        f"### System:\nbe short\n\n### User:\nwho is it?\n\n### Assistant:\n the miller{end}\n\n"
        f"### User:\nand then?\n\n### Assistant:\nthe boy sang{end}\n\n"
    )
    assert tokenizer.decode(tokens[0]["input_ids"]) == expected
    assert learned(tokens, tokenizer) == [f" the miller{end}", f"the boy sang{end}"]
    # The end is the one token that ends a text, and what is asked before an answer begins as it was learned.
    assert tokens.ids[tokens.answers].tolist().count(tokenizer.eos_token_id) == 2
    prompt = tokenizer.apply_chat_template([SYSTEM, *TALK[:3]], add_generation_prompt=True, tokenize=False)
    assert expected.startswith(prompt)
    assert expected[len(prompt) :].startswith("the boy")


@pytest.mark.parametrize("template", [MARKED, UNMARKED], ids=["marked", "compared"])
@pytest.mark.parametrize("trimmed", [False, True])
def test_answers_by_either_way(template: str, trimmed: bool, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tiny_tokenizer, template)
    if trimmed:  # the space of " the" then lies in no token
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokens = answer_tokens([document(TALK)], tokenizer, 128)
    assert learned(tokens, tokenizer) == [" the miller</s>", "the boy sang</s>"]
    assert tokenizer.decode(tokens[0]["input_ids"]) == tokenizer.apply_chat_template(TALK, tokenize=False)
    marked = with_template(tiny_tokenizer, MARKED)
    whole = marked.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    assert tokens.ids.tolist() == whole["input_ids"]
    assert tokens.answers.int().tolist() == whole["assistant_masks"]
    # Where nothing is merged across, an answer is what the tokens have more than those of the prompt.
    prompt = tokenizer.apply_chat_template(TALK[:3], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert whole["input_ids"][: len(prompt)] == prompt
    assert tokens.answers[len(prompt) :].all()
    assert not tokens.answers[len(prompt) - 1]


def test_tools_reach_the_template(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tiny_tokenizer, "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}" + UNMARKED)
    tokens = answer_tokens([document(TALK, tools=[{"name": "mill"}])], tokenizer, 128)
    assert tokenizer.decode(tokens[0]["input_ids"]).startswith("[mill]<user>who")
    assert learned(tokens, tokenizer)[0] == " the miller</s>"


LAST_ONLY = "{% for m in messages %}<{{ m.role }}>{{ '(thinks)' if loop.last and m.role == 'assistant' }}"
LAST_ONLY += "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def test_templates_whose_answers_cannot_be_told(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tiny_tokenizer, LAST_ONLY)
    tokens = answer_tokens([document(TALK[:2])], tokenizer, 128)
    assert learned(tokens, tokenizer) == ["(thinks) the miller"]
    with pytest.raises(UsageError, match=r"chat\.jsonl:1, message 2: the chat template writes what comes") as caught:
        answer_tokens([document(TALK)], tokenizer, 128)
    assert "{% generation %}" in str(caught.value.hint)
    # A prompt for an answer that the answer does not begin with.
    other = with_template(tiny_tokenizer, UNMARKED.replace("%}<assistant>{%", "%}<answer>{%"))
    with pytest.raises(UsageError, match="message 2: the chat template"):
        answer_tokens([document(TALK[:2])], other, 128)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system here') }}", "no system here"),
        ("{{ messages[9].content + 'x' }}", "has no element 9"),
        ("{{ messages[0]['role'] + 1 }}", "concatenate str"),
        ("{% for %}", "Expected"),
    ],
)
def test_a_template_that_refuses(template: str, reason: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    for marks in ("", "{% generation %}{% endgeneration %}"):
        tokenizer = with_template(tiny_tokenizer, template + marks)
        with pytest.raises(UsageError, match=rf"chat\.jsonl:1: .*template refuses.*{reason}"):
            answer_tokens([document(TALK)], tokenizer, 128)


def test_long_conversations_are_cut_and_counted(
    tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = with_template(tiny_tokenizer, UNMARKED)
    late = [{"role": "user", "content": "river " * 40}, TALK[1]]
    found = [document(TALK[:2]), document(late), document([*TALK[:2], {"role": "user", "content": "mill " * 40}])]
    with caplog.at_level(logging.WARNING):
        tokens = answer_tokens(found, tokenizer, 32)
    assert (
        "2 of 3 conversations are longer than 32 tokens and cut; 1 have no answer left and are left out" in caplog.text
    )
    assert len(tokens) == 2
    assert [learned(tokens, tokenizer, index) for index in range(2)] == [[" the miller</s>"]] * 2
    assert (tokens.block_tokens, len(tokens[1]["input_ids"]), len(tokens[-1]["input_ids"])) == (32, 32, 32)
    assert tokens.num_tokens == len(tokens[0]["input_ids"]) + 32
    with pytest.raises(UsageError, match="none of 1 conversations has an answer within its first 32 tokens") as caught:
        answer_tokens([document(late)], tokenizer, 32)
    assert "--block-tokens" in str(caught.value.hint)
    with pytest.raises(UsageError, match="at least 2 tokens, got 1"):
        answer_tokens([document(TALK)], tokenizer, 1)


def test_nothing_predicts_the_first_token(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tiny_tokenizer, "{% generation %}{{ messages[1].content }}{% endgeneration %}")
    tokens = answer_tokens([document(TALK)], tokenizer, 32)
    assert tokens.answers.tolist() == [False] + [True] * (tokens.num_tokens - 1)


def test_a_seeded_choice_and_the_hash(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tiny_tokenizer, UNMARKED)
    found = [
        document([{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "x" * i}]) for i in range(9)
    ]
    whole, some = (answer_tokens(found, tokenizer, 64, max_conversations=count) for count in (None, 4))
    rows = [whole[index]["input_ids"].tolist() for index in range(9)]
    places = [rows.index(some[index]["input_ids"].tolist()) for index in range(4)]
    assert places == sorted(places) != list(range(4))
    again = answer_tokens(found, tokenizer, 64, max_conversations=4)
    other = answer_tokens(found, tokenizer, 64, max_conversations=4, seed=1)
    assert some.sha256 == again.sha256 != other.sha256
    # What is learned counts as well, and where one ends.
    ids, answers, ends = whole.ids, whole.answers, whole.ends
    assert AnswerTokens(ids, answers, ends, 1.0).sha256 == whole.sha256
    assert AnswerTokens(ids, ~answers, ends, 1.0).sha256 != whole.sha256
    assert AnswerTokens(ids, answers, ends - 1, 1.0).sha256 != whole.sha256


def test_bytes_are_those_of_the_answers(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = answer_tokens([document(TALK)], with_template(tiny_tokenizer, UNMARKED), 128)
    assert tokens.bytes_per_token == len(" the miller</s>the boy sang</s>") / tokens.num_answer_tokens


def test_a_batch_is_filled_up_at_the_end() -> None:
    ids = torch.arange(5, dtype=torch.int32)
    tokens = AnswerTokens(ids, torch.tensor([False, True, False, False, True]), torch.tensor([2, 5]), 1.0)
    batch = padded([tokens[0], tokens[1]])
    assert batch["input_ids"].tolist() == [[0, 1, 0], [2, 3, 4]]
    assert batch["labels"].tolist() == [[IGNORED, 1, IGNORED], [IGNORED, IGNORED, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_a_tokenizer_that_does_not_know_where_its_tokens_are() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UsageError, match="Slow does not tell where in the text its tokens are"):
        with_chat_template(Slow())  # type: ignore[arg-type, unused-ignore]
