"""Conversations to fine-tune on: rows of messages, split into a part to train on and a part held out.

A conversation is a `Document` whose text is JSON, `{"messages": [{"role", "content"}, ...]}`: split, cap and hash are
those of any text, and a conversation is never cut.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowrank_kit.data.corpus import Corpus, split_documents
from lowrank_kit.data.sources import (
    HUB_PREFIX,
    STDLIB,
    TEXT_FIELD,
    Document,
    file_type,
    jsonl_rows,
    open_hub,
    parquet_rows,
)
from lowrank_kit.errors import LowRankError

ANSWERING = "assistant"
# What a row with a question and an answer calls them.
_PAIRS = (("prompt", "completion"), ("prompt", "response"))
_LISTS = ("messages", "conversations")
# Who speaks, in rows with "from" and "value".
_SPEAKERS = {"human": "user", "gpt": ANSWERING, "model": ANSWERING}
_FORMS = (
    'a row holds {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, '
    '{"conversations": [{"from": "human", "value": "..."}, ...]} or {"prompt": "...", "completion": "..."}'
)


def is_chat(source: str | None) -> bool:
    """Whether a source holds conversations, by its first row; a row with a "text" is text.

    Args:
        source: as in `read_source`, and files of the type .parquet.

    Raises:
        UsageError, LowRankError: a dataset that cannot be had, a damaged file.
    """
    _, first = next(_rows(source), ("", None))
    return isinstance(first, dict) and TEXT_FIELD not in first and _form(first) is not None


def load_chat(source: str, *, max_bytes: int | None = None) -> Corpus:
    """Read the conversations of a source and hold out a tenth, as `load_corpus` does, but never part of one.

    Args:
        source: .jsonl (.xz, .gz) or .parquet file, folder of such files, or "hub:NAME[:split]"; a row has "messages",
            "conversations" (role and content, or from and value), or a "prompt" and "completion" or "response".
        max_bytes: cap on the JSON of both sides together.

    Raises:
        UsageError: too few conversations.
        LowRankError: a damaged file, or a row that is no conversation (row and what is missing named).
    """
    conversations = (Document(place, _json(place, row)) for place, row in _rows(source))
    return split_documents(conversations, source, max_bytes=max_bytes, cut=False)


def contents(document: Document) -> str:
    """What is said in a conversation, as text: for a tokenizer to be trained on."""
    return "\n".join(message.get("content", "") for message in json.loads(document.text)["messages"])


def _rows(source: str | None) -> Iterator[tuple[str, Any]]:
    """Rows and where each is from; nothing of a source that has no rows."""
    if source is None or source == STDLIB:
        return
    if source.startswith(HUB_PREFIX):
        name, dataset = open_hub(source)
        yield from ((f"{name}:{number}", row) for number, row in enumerate(dataset))
        return
    path = Path(source).expanduser()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        inside = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in inside.parts):
            name = inside.as_posix() if path.is_dir() else file.name
            match file_type(file):
                case ".jsonl", _:
                    yield from jsonl_rows(file, name)
                case ".parquet", "":
                    yield from ((f"{name}:{number}", row) for number, row in enumerate(parquet_rows(file), start=1))


def _form(row: dict[str, Any]) -> tuple[str, ...] | None:
    """The fields of a row that make a conversation."""
    # A table has all columns in all rows: what is missing is null there.
    return next((form for form in (*zip(_LISTS), *_PAIRS) if all(row.get(f) is not None for f in form)), None)


def _json(place: str, row: Any) -> str:
    form = _form(row) if isinstance(row, dict) else None
    if form is None:
        found = f"its fields: {', '.join(row)}" if isinstance(row, dict) else f"it is a {type(row).__name__}"
        raise LowRankError(f"{place}: no conversation in this row; {found}", hint=_FORMS)
    if len(form) == 2:
        said = [{"role": role, "content": row[field]} for role, field in zip(("user", ANSWERING), form, strict=True)]
    else:
        said = row[form[0]]
        if not isinstance(said, list):
            raise LowRankError(f'{place}: "{form[0]}" is no list of messages', hint=_FORMS)
    messages = [_message(f"{place}, message {number}", message) for number, message in enumerate(said, start=1)]
    roles = [message["role"] for message in messages]
    if ANSWERING not in roles or roles[0] == ANSWERING:
        missing = "answers nothing: it begins with" if ANSWERING in roles else "has no message of"
        raise LowRankError(
            f'{place}: the conversation {missing} the role "{ANSWERING}"',
            hint="answers are what is learned, from what is said before them; leave the row out",
        )
    conversation = {"messages": messages} | ({"tools": row["tools"]} if row.get("tools") else {})
    # JSON can spell half a surrogate pair, which no UTF-8 text holds: it becomes "?".
    return json.dumps(conversation, ensure_ascii=False).encode(errors="replace").decode()


def _message(place: str, message: Any) -> dict[str, Any]:
    """A message as chat templates read it: role and content, and what else it holds (tool calls), without nulls."""
    if not isinstance(message, dict):
        raise LowRankError(f"{place}: not an object with role and content", hint=_FORMS)
    message = {key: value for key, value in message.items() if value is not None}
    if "role" not in message and "from" in message:
        speaker = message.pop("from")
        message["role"] = _SPEAKERS.get(speaker, speaker)
        if "value" in message:
            message["content"] = message.pop("value")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str) and not (key == "content" and message.get("tool_calls")):
            what = f'"{key}" is no string' if key in message else f'no "{key}"'
            raise LowRankError(f"{place}: {what}", hint=_FORMS)
    return message
