from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowrank_kit.data.corpus import load_corpus
from lowrank_kit.data.sources import Document
from lowrank_kit.errors import UsageError
from lowrank_kit.evaluation.cloze import LONGEST_CHOICE, SHORTEST_CHOICE, make_cloze, write_cloze_task

WORDS = ["river", "mill", "wheel", "stone", "gate", "water", "flour", "basket", "hedge", "window", "road", "day", "boy"]


def prose(seed: int, num_paragraphs: int = 40) -> str:
    """One line per paragraph, three to eight sentences of five to fifteen words."""
    draw = random.Random(seed)

    def sentence() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(5, 15))).capitalize() + draw.choice(".?!")

    return "\n\n".join(" ".join(sentence() for _ in range(draw.randint(3, 8))) for _ in range(num_paragraphs)) + "\n"


@pytest.fixture(scope="module")
def code() -> list[Document]:
    """A part of the standard library's own sources."""
    return list(load_corpus(max_bytes=2_000_000).heldout)


@pytest.fixture(scope="module")
def code_rows(code: list[Document]) -> list[dict[str, Any]]:
    return make_cloze(code, num_items=800)


@pytest.fixture(scope="module")
def prose_documents() -> list[Document]:
    return [Document(str(seed), prose(seed)) for seed in range(4)]


def indentation(text: str) -> int:
    return len(text) - len(text.lstrip())


def test_the_true_choice_is_what_follows_and_the_others_are_real(
    code: list[Document], code_rows: list[dict[str, Any]]
) -> None:
    for row in code_rows[:100]:
        assert len(row["choices"]) == len(set(row["choices"])) == 4
        assert any(row["context"] + row["choices"][row["label"]] in document.text for document in code)
        assert all(any(choice in document.text for document in code) for choice in row["choices"])


def test_a_context_of_code_begins_and_ends_at_a_line_and_is_bounded(
    code: list[Document], code_rows: list[dict[str, Any]]
) -> None:
    in_lines = [row for row in code_rows if row["context"].endswith("\n")]
    assert len(in_lines) > 0.95 * len(code_rows)  # the rest is inside a line too long to be a choice
    for row in code_rows:
        assert 0 < len(row["context"]) <= 320
    begins_at_line = sum(any("\n" + row["context"] in document.text for document in code) for row in code_rows[:100])
    assert begins_at_line > 95


def test_choices_look_alike(code_rows: list[dict[str, Any]]) -> None:
    for row in code_rows:
        assert len({indentation(choice) for choice in row["choices"]}) == 1
        lengths = [len(choice) for choice in row["choices"]]
        assert max(lengths) < 1.2 * min(lengths) + 2  # 20 %, and rounding to whole characters
        assert all(
            len(choice.strip()) >= SHORTEST_CHOICE and len(choice) <= LONGEST_CHOICE for choice in row["choices"]
        )


@pytest.mark.parametrize("kind", ["code", "prose"])
def test_a_guesser_that_does_not_read_the_context_is_at_chance(kind: str, request: pytest.FixtureRequest) -> None:
    if kind == "code":
        rows = request.getfixturevalue("code_rows")
    else:
        rows = make_cloze(request.getfixturevalue("prose_documents"), num_items=400)
    frequency = Counter(word for row in rows for choice in row["choices"] for word in choice.split())
    cues: dict[str, Callable[[str], Any]] = {
        "longest": len,
        "first in the alphabet": lambda choice: [-ord(letter) for letter in choice.strip()],
        "most punctuation": lambda choice: len(re.findall(r"[^\w\s]", choice)),
        "most frequent words": lambda choice: sum(frequency[word] for word in choice.split()) / len(choice.split()),
    }
    four_sigma = 4 * math.sqrt(0.25 * 0.75 / len(rows))
    for cue, value in cues.items():
        for sign in (max, min):
            right = sum(row["choices"].index(sign(row["choices"], key=value)) == row["label"] for row in rows)
            assert abs(right / len(rows) - 0.25) < four_sigma, (cue, sign.__name__)


def test_the_context_does_help(code_rows: list[dict[str, Any]]) -> None:
    """Negative control of the test above: the choice with most words of the context is right far more often."""

    def shared(row: dict[str, Any], choice: str) -> float:
        known = set(re.findall(r"\w+", row["context"]))
        words = re.findall(r"\w+", choice)
        return sum(word in known for word in words) / max(1, len(words))

    right = sum(
        max(range(4), key=lambda index: shared(row, row["choices"][index])) == row["label"] for row in code_rows
    )
    assert right / len(code_rows) > 0.5


def test_long_lines_are_taken_apart_at_sentences(prose_documents: list[Document]) -> None:
    rows = make_cloze(prose_documents, num_items=100, context_chars=200)
    for row in rows:
        truth = row["choices"][row["label"]]
        assert any(row["context"] + truth in document.text for document in prose_documents)
        # A sentence begins here, and the context ended with one.
        assert truth[0].isupper()
        assert row["context"].rstrip()[-1] in ".?!"
    assert any(row["context"].endswith(" ") for row in rows)
    assert any(row["context"].endswith("\n") for row in rows)


def test_the_seed_decides(prose_documents: list[Document]) -> None:
    rows = make_cloze(prose_documents, num_items=50)
    assert make_cloze(prose_documents, num_items=50) == rows
    assert make_cloze(prose_documents, num_items=50, seed=1) != rows
    assert make_cloze(prose_documents, num_items=20) == rows[:20]


def test_a_single_document_is_enough_and_its_false_choices_are_not_near() -> None:
    text = prose(0, num_paragraphs=15)
    for row in make_cloze([Document("one", text)], num_items=40, context_chars=150):
        place = text.index(row["context"] + row["choices"][row["label"]]) + len(row["context"])
        for choice in set(row["choices"]) - {row["choices"][row["label"]]}:
            found = [match.start() for match in re.finditer(re.escape(choice), text)]
            assert any(abs(one - place) > 150 for one in found)


def test_lines_with_no_end_of_a_word_are_no_choices(prose_documents: list[Document]) -> None:
    data = Document("data", "\n".join("0123456789abcdef" * 40 for _ in range(50)) + "\n" + "0123456789abcdef" * 40)
    rows = make_cloze([*prose_documents, data], num_items=100)
    assert all(len(choice) <= LONGEST_CHOICE for row in rows for choice in row["choices"])
    assert not any("0123456789abcdef" in choice for row in rows for choice in row["choices"])


def test_too_little_text_for_so_many_questions(prose_documents: list[Document]) -> None:
    with pytest.raises(
        UsageError, match=r"only \d+ of 100000 questions could be made from 4 documents with \d+ characters"
    ):
        make_cloze(prose_documents, num_items=100_000)
    with pytest.raises(UsageError, match="only 0 of 1 questions could be made from 0 documents"):
        make_cloze([], num_items=1)
    # One line over and over: no four distinct choices.
    with pytest.raises(UsageError, match="only 0 of 1"):
        make_cloze([Document("same", "the same line again and again\n" * 200)], num_items=1)
    with pytest.raises(UsageError, match="at least 1, got 0 and 320"):
        make_cloze(prose_documents, num_items=0)


def test_a_task_is_three_files_and_can_be_written_again(tmp_path: Path, prose_documents: list[Document]) -> None:
    # U+2028 is a line end to str.splitlines and none in JSON.
    rows = [row | {"context": row["context"] + "\u2028"} for row in make_cloze(prose_documents, num_items=9)]
    for number in (9, 5):
        write_cloze_task(tmp_path / "a" / "b", rows[:number], "prose")
        assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [
            "prose.jsonl",
            "prose.py",
            "prose.yaml",
        ]
        lines = (tmp_path / "a" / "b" / "prose.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == rows[:number]


@pytest.mark.parametrize("name", ["", "two words", "../up", "9lives"])
def test_a_name_that_is_no_identifier(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be a task name"):
        write_cloze_task(tmp_path, [], name)
    assert not list(tmp_path.iterdir())
