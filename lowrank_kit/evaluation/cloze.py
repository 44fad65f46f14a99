"""A four-choice cloze task made of held-out text, for lm-eval: no download, and new text for every corpus."""

from __future__ import annotations

import json
import math
import os
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_kit.data.sources import Document
from lowrank_kit.errors import UsageError

NUM_CHOICES = 4
# Characters in a choice, indentation not counted in the first: one line of code that says something, or one sentence.
# Shorter ones (`else:`) fit anywhere.
SHORTEST_CHOICE, LONGEST_CHOICE = 24, 160
# Lengths in one class differ by less than this factor.
_LENGTH_CLASS = 1.2
_SENTENCE_END = re.compile(r"(?<=[.!?])[ \t]+")
_LINE = re.compile(r"[^\n]+")


@dataclass(frozen=True)
class _Passage:
    """A place where a question can be asked: the context ends at `start`, the true choice is text[start:end]."""

    document: int
    start: int
    end: int
    look: tuple[int, int, int]


def make_cloze(
    documents: Iterable[Document], *, num_items: int, seed: int = 0, context_chars: int = 320
) -> list[dict[str, Any]]:
    """Make questions "which of these four texts comes next?" out of documents.

    The unit of text is the line; a line longer than `LONGEST_CHOICE`, as in prose with one line per paragraph, is
    taken apart at its sentences. A question's context ends at the beginning of a unit; the true choice is that unit,
    with the units that follow it while it is too short, up to the next blank line.

    The other three are such passages from elsewhere in the documents (more than `context_chars` away), which look like
    the true one: same indentation, same number of blank lines before it, both or neither inside a line, and a length
    within 20 %. True and false choices are drawn from one pool, so that a guesser who does not read the context is
    right one time in four.

    Args:
        documents: texts that no scored model was trained on.
        num_items: how many questions.
        seed: draws passages and the order of the choices.
        context_chars: characters of context at most; it begins at a line where there is one.

    Returns:
        Rows `{"context": str, "choices": [str] * 4, "label": index of the true one}`. Context and true choice are
        consecutive slices of a document, so that a row is scored with no delimiter in between.

    Raises:
        UsageError: an argument is below 1, or the documents have fewer such passages than `num_items`.
    """
    if num_items < 1 or context_chars < 1:
        raise UsageError(f"num_items and context_chars are at least 1, got {num_items} and {context_chars}")
    texts = [document.text for document in documents]
    passages = [
        passage
        for index, text in enumerate(texts)
        for passage in _passages(index, text)
        if passage.start >= context_chars
    ]
    alike: dict[tuple[int, int, int], list[_Passage]] = defaultdict(list)
    for passage in passages:
        alike[passage.look].append(passage)
    draw = random.Random(seed)
    draw.shuffle(passages)
    rows: list[dict[str, Any]] = []
    for passage in passages:
        choices = _draw_choices(passage, alike[passage.look], texts, context_chars, draw)
        if choices is not None:
            rows.append({"context": _context(texts, passage, context_chars), **choices})
        if len(rows) == num_items:
            return rows
    raise UsageError(
        f"only {len(rows)} of {num_items} questions could be made from {len(texts)} documents with "
        f"{sum(map(len, texts))} characters",
        hint="ask for fewer, or give more text",
    )


def _passages(document: int, text: str) -> Iterator[_Passage]:
    units = list(_units(text))
    for first, (start, _) in enumerate(units):
        end = start
        for unit_start, unit_end in units[first:]:
            if len(text[start:end].strip()) >= SHORTEST_CHOICE or text[end:unit_start].count("\n") > 1:
                break
            end = unit_end
        if end - start > LONGEST_CHOICE:
            # At the end of a word; a word of that length is no text, and leaves nothing.
            end = max(start, text.rfind(" ", start, start + LONGEST_CHOICE))
        choice = text[start:end].rstrip()
        if len(choice.lstrip()) >= SHORTEST_CHOICE:
            before = text[:start].rstrip()
            yield _Passage(document, start, start + len(choice), _look(choice, text[len(before) : start]))


def _units(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each line that is not blank, or of each sentence of a line too long to be a choice."""
    for line in _LINE.finditer(text):
        if not line.group().strip():
            continue
        start, end = line.span()
        if end - start > LONGEST_CHOICE:
            for gap in _SENTENCE_END.finditer(text, start, end):
                yield start, gap.start()
                start = gap.end()
        if start < end:
            yield start, end


def _look(choice: str, gap: str) -> tuple[int, int, int]:
    """What gives a choice away without reading: indentation, line ends before it (0: inside a line), length."""
    indentation = len(choice) - len(choice.lstrip())
    return indentation, gap.count("\n"), round(math.log(len(choice), _LENGTH_CLASS))


def _context(texts: Sequence[str], passage: _Passage, context_chars: int) -> str:
    text = texts[passage.document]
    earliest = passage.start - context_chars
    # From the next line on, unless that leaves less than half.
    line = text.find("\n", earliest, earliest + context_chars // 2)
    return text[earliest if line < 0 else line + 1 : passage.start]


def _draw_choices(
    passage: _Passage, alike: Sequence[_Passage], texts: Sequence[str], context_chars: int, draw: random.Random
) -> dict[str, Any] | None:
    """The four choices and the label, or None when too few distinct passages look like this one."""

    def text_of(one: _Passage) -> str:
        return texts[one.document][one.start : one.end]

    truth = text_of(passage)
    choices = [truth]
    # A few dozen candidates find three unless nearly all are equal or near by.
    for other in draw.sample(alike, min(len(alike), 64)):
        elsewhere = other.document != passage.document or abs(other.start - passage.start) > context_chars
        if elsewhere and text_of(other) not in choices:
            choices.append(text_of(other))
        if len(choices) == NUM_CHOICES:
            draw.shuffle(choices)
            return {"choices": choices, "label": choices.index(truth)}
    return None


_TASK_YAML = """\
# Which of four texts comes next? Made by lowrank-kit of held-out text.
# Run it with: lm_eval --model hf --model_args pretrained=MODEL --tasks {name} --include_path THIS_FOLDER
task: {name}
custom_dataset: !function {name}.load
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: label
# Context and choice are consecutive text.
target_delimiter: ""
num_fewshot: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""

_TASK_LOADER = '''\
"""Reads the rows from beside this file: lm-eval takes relative data paths from the working directory instead."""

import json
from pathlib import Path

from datasets import Dataset


def load(**_):
    lines = Path(__file__).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
'''


def write_cloze_task(folder: str | Path, rows: Sequence[dict[str, Any]], name: str = "stdlib_cloze") -> None:
    """Write an lm-eval task: `NAME.yaml`, `NAME.jsonl` with the rows, and `NAME.py`, which reads them.

    lm-eval finds it with `--include_path FOLDER --tasks NAME`, also after the folder has been moved. Files of these
    names are replaced, the YAML last: a task that lm-eval finds is whole.

    Args:
        rows: from `make_cloze`.
        name: a Python identifier, for `NAME.py`.

    Raises:
        UsageError: the name is not an identifier.
    """
    if not name.isidentifier():
        raise UsageError(f'"{name}" cannot be a task name', hint="use letters, digits and _, such as stdlib_cloze")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # ASCII: splitlines also splits at characters such as U+2028, which JSON may hold as they are.
    _write(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    _write(folder / f"{name}.py", _TASK_LOADER)
    _write(folder / f"{name}.yaml", _TASK_YAML.format(name=name))


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
