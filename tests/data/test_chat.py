"""Rows of conversations: their forms and sources, how they are split, and what is refused."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lowrank_kit.data.chat import contents, is_chat, load_chat
from lowrank_kit.data.sources import Document
from lowrank_kit.errors import LowRankError, UsageError

USER, ANSWER = {"role": "user", "content": "who?"}, {"role": "assistant", "content": "the miller"}


def rows(count: int = 20) -> list[dict[str, Any]]:
    return [{"messages": [{**USER, "content": f"who is {i:02}?"}, ANSWER]} for i in range(count)]


def write(path: Path, found: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def messages(document: Document) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(document.text)["messages"]
    return found


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, ANSWER]}, [USER, ANSWER]),
        ({"conversations": [USER, ANSWER]}, [USER, ANSWER]),
        (
            {"conversations": [{"from": "human", "value": "who?"}, {"from": "gpt", "value": "the miller"}]},
            [USER, ANSWER],
        ),
        (
            {"conversations": [{"from": "system", "value": "be"}, {"from": "human", "value": "who?"}, ANSWER]},
            [{"role": "system", "content": "be"}, USER, ANSWER],
        ),
        ({"prompt": "who?", "completion": "the miller"}, [USER, ANSWER]),
        ({"prompt": "who?", "response": "the miller"}, [USER, ANSWER]),
        # A table has all columns in all rows, and all keys in all messages.
        (
            {"messages": [{**USER, "tool_calls": None}, ANSWER], "prompt": "?", "completion": None},
            [USER, ANSWER],
        ),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f"}]}]}, None),
    ],
)
def test_forms_of_a_row(row: dict[str, Any], expected: list[dict[str, Any]] | None, tmp_path: Path) -> None:
    source = write(tmp_path / "chat.jsonl", [row, *rows()])
    assert is_chat(str(source))
    corpus = load_chat(str(source))
    (found,) = (document for document in (*corpus.train, *corpus.heldout) if document.name == "chat.jsonl:1")
    assert messages(found) == (row["messages"] if expected is None else expected)


def test_sources_of_the_same_conversations(tmp_path: Path) -> None:
    found = rows()
    lines = write(tmp_path / "chat.jsonl", found).read_bytes()
    (tmp_path / "chat.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "chat.jsonl.xz").write_bytes(lzma.compress(lines))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), tmp_path / "chat.parquet")
    (tmp_path / "folder" / ".hidden").mkdir(parents=True)
    (tmp_path / "folder" / "chat.jsonl").write_bytes(lines)
    (tmp_path / "folder" / "README.md").write_text("Twenty conversations.\n")
    (tmp_path / "folder" / ".hidden" / "more.jsonl").write_bytes(lines)
    sources = ["chat.jsonl", "chat.jsonl.gz", "chat.jsonl.xz", "chat.parquet", "folder"]
    corpora = {name: load_chat(str(tmp_path / name)) for name in sources}
    corpora["hub"] = load_chat(f"hub:{tmp_path / 'folder'}")
    assert all(is_chat(str(tmp_path / name)) for name in sources)
    assert is_chat(f"hub:{tmp_path / 'folder'}")
    expected = {document.text for document in corpora["chat.jsonl"].heldout}
    assert len(expected) == 2
    for corpus in corpora.values():
        assert (len(corpus.train), len(corpus.heldout)) == (18, 2)
        assert {document.text for document in corpus.heldout} == expected
    assert corpora["chat.jsonl"].train[3].name.startswith("chat.jsonl:")


def test_text_is_not_taken_for_conversations(tmp_path: Path) -> None:
    both = write(tmp_path / "both.jsonl", [{"text": "x", **rows()[0]}])
    other = write(tmp_path / "other.jsonl", [{"question": "x"}])
    values = write(tmp_path / "values.jsonl", [["messages"]])
    empty = write(tmp_path / "empty.jsonl", [])
    (tmp_path / "messages.txt").write_text('{"messages": []}')
    sources = [None, "stdlib", str(tmp_path / "absent"), str(tmp_path / "messages.txt")]
    assert not any(map(is_chat, [*sources, *map(str, (both, other, values, empty))]))


def test_a_conversation_is_on_one_side_and_whole(tmp_path: Path) -> None:
    # Every one twice; by what is said, not by the line.
    corpus = load_chat(str(write(tmp_path / "chat.jsonl", rows() * 2)))
    train, heldout = ({document.text for document in side} for side in (corpus.train, corpus.heldout))
    assert not train & heldout
    assert len(train | heldout) == 20
    assert len(corpus.train) + len(corpus.heldout) == 40
    assert all(len(messages(document)) == 2 for document in (*corpus.train, *corpus.heldout))
    other = load_chat(str(write(tmp_path / "chat.jsonl", rows(21) * 2)))
    assert other.sha256 != corpus.sha256


def test_a_cap_takes_whole_conversations(tmp_path: Path) -> None:
    source = str(write(tmp_path / "chat.jsonl", rows(100)))
    whole, capped = load_chat(source), load_chat(source, max_bytes=4000)
    assert 20 < len(capped.train) < 50
    assert set(capped.train) < set(whole.train)
    assert set(capped.heldout) < set(whole.heldout)
    with pytest.raises(UsageError, match=r"too small to hold out 0.1 of it: .* in 100 documents, capped at 50"):
        load_chat(source, max_bytes=50)
    with pytest.raises(UsageError, match=r"too small to hold out 0.1 of it: .* in 3 documents"):
        load_chat(str(write(tmp_path / "few.jsonl", rows(3))))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "who?"}, "chat.jsonl:3: no conversation in this row; its fields: question"),
        ({"prompt": "who?"}, "no conversation in this row; its fields: prompt"),
        (["messages"], "no conversation in this row; it is a list"),
        ({"messages": "who?"}, '"messages" is no list of messages'),
        ({"messages": [USER, "the miller"]}, "chat.jsonl:3, message 2: not an object with role and content"),
        ({"messages": [{"content": "who?"}, ANSWER]}, 'message 1: no "role"'),
        ({"messages": [USER, {"role": "assistant"}]}, 'message 2: no "content"'),
        ({"messages": [USER, {**ANSWER, "content": ["the miller"]}]}, 'message 2: "content" is no string'),
        ({"conversations": [{"from": "human"}, ANSWER]}, 'message 1: no "content"'),
        ({"prompt": "who?", "completion": 7}, 'message 2: "content" is no string'),
        ({"messages": [USER]}, 'chat.jsonl:3: the conversation has no message of the role "assistant"'),
        ({"messages": []}, 'has no message of the role "assistant"'),
        ({"messages": [ANSWER, USER]}, 'answers nothing: it begins with the role "assistant"'),
    ],
)
def test_a_row_that_is_no_conversation(row: Any, message: str, tmp_path: Path) -> None:
    source = write(tmp_path / "chat.jsonl", [*rows(2), row, *rows()])
    with pytest.raises(LowRankError) as caught:
        load_chat(str(source))
    assert message in str(caught.value)
    assert caught.value.hint


def test_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text('{"messages": [')
    with pytest.raises(LowRankError, match=r"chat\.jsonl, line 1: the last line is cut off"):
        is_chat(str(tmp_path / "chat.jsonl"))
    (tmp_path / "chat.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(LowRankError, match=r"chat\.parquet could not be read") as caught:
        load_chat(str(tmp_path / "chat.parquet"))
    assert caught.value.hint


def test_half_a_surrogate_pair_is_read(tmp_path: Path) -> None:
    strange = {"messages": [{**USER, "content": "\ud83d"}, ANSWER]}
    corpus = load_chat(str(write(tmp_path / "chat.jsonl", [strange, *rows()])))
    (found,) = (document for document in (*corpus.train, *corpus.heldout) if document.name == "chat.jsonl:1")
    assert contents(found) == "?\nthe miller"
