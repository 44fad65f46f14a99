"""Reads the benchmark files under $LOWRANK_EVAL_DATA into rows of the form that lm-eval's own tasks read.

The task files beside this name the functions with `custom_dataset: !function utils.NAME`, their files as
`dataset_kwargs`. Needs lm-eval and datasets alone.
"""

from __future__ import annotations

import bz2
import csv
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.tasks.hellaswag.utils import preprocess

FOLDER_VARIABLE = "LOWRANK_EVAL_DATA"
LETTERS = "ABCDE"
_Row = dict[str, Any]


def blimp(*, file: str, **_: Any) -> dict[str, Dataset]:
    """Minimal pairs, `{"sentence_good", "sentence_bad"}` a line."""
    return _dataset(
        "train", file, _json_lines, lambda row: {key: row[key] for key in ("sentence_good", "sentence_bad")}
    )


def lambada_openai(*, file: str, **_: Any) -> dict[str, Dataset]:
    """Passages as they were printed, `{"text"}` a line."""
    return _dataset("test", file, _json_lines, lambda row: {"text": row["text"]})


def lambada_standard(*, file: str, **_: Any) -> dict[str, Dataset]:
    """Passages tokenized and in lower case, one a line."""
    return _dataset("test", file, lambda path: _lines(_text(path)), lambda line: {"text": line})


def hellaswag(*, file: str, **_: Any) -> dict[str, Dataset]:
    """Six lines a question: activity and context, label, four endings. Rows as lm-eval's process_docs leaves them."""

    def records(path: Path) -> Iterable[list[str]]:
        lines = _lines(bz2.decompress(path.read_bytes()).decode("utf-8"))
        return (lines[start : start + 6] for start in range(0, len(lines), 6))

    def convert(lines: list[str]) -> _Row:
        context, label, *endings = lines
        if len(endings) != 4 or label not in ("0", "1", "2", "3"):
            raise ValueError("expected a context, a label from 0 to 3 and four endings")
        return {"query": _clean(_with_capital(context)), "choices": list(map(_clean, endings)), "label": label}

    return _dataset("validation", file, records, convert)


def _with_capital(context: str) -> str:
    """Begin the unfinished sentence at the end of a context as lm-eval does, with a capital.

    The file has no mark there, but what is unfinished follows a whole sentence and has no mark of its own at its end.
    """
    if re.search(r"""[.!?]["')]*$""", context):
        return context
    whole, begun = re.fullmatch(r"((?:.*[.!?] +)?)(.*)", context, re.DOTALL).groups()  # type: ignore[union-attr]
    return whole + begun.capitalize() if whole else context


def _clean(text: str) -> str:
    """The file has been through lm-eval's cleaning, but for brackets of an unusual kind."""
    return preprocess(text) if "[" in text else text


def piqa(*, file: str, labels: str, **_: Any) -> dict[str, Dataset]:
    """`{"goal", "sol1", "sol2"}` a line, the labels in a file of their own."""

    def records(path: Path) -> Iterable[tuple[_Row, str]]:
        return zip(_json_lines(path), _lines(_text(_path(labels))), strict=True)

    def convert(record: tuple[_Row, str]) -> _Row:
        return {**{key: record[0][key] for key in ("goal", "sol1", "sol2")}, "label": int(record[1])}

    return _dataset("validation", file, records, convert)


_ARC = re.compile(r".*?question: (?P<question>.*)\n\nAnswer1: (?P<answers>.*)\n\nAnswer format: .*", re.DOTALL)


def arc(*, file: str, **_: Any) -> dict[str, Dataset]:
    """A JSON list of instructions "question, Answer1: .. Answer2: .." with "answer": "answerN"."""

    def convert(row: _Row) -> _Row:
        found = _ARC.fullmatch(row["instruction"])
        if not found:
            raise ValueError("the instruction has another form")
        answers = re.split(r" Answer\d: ", found["answers"])
        return {
            "question": found["question"],
            "choices": _choices(answers),
            "answerKey": LETTERS[: len(answers)][int(row["answer"].removeprefix("answer")) - 1],
        }

    return _dataset("test", file, lambda path: json.loads(_text(path)), convert)


def openbookqa(*, file: str, **_: Any) -> dict[str, Dataset]:
    """`{"query", "choices", "gold"}` a line."""

    def convert(row: _Row) -> _Row:
        return {
            "question_stem": row["query"],
            "choices": _choices(row["choices"]),
            "answerKey": LETTERS[: len(row["choices"])][row["gold"]],
        }

    return _dataset("test", file, _json_lines, convert)


def copa(*, file: str, **_: Any) -> dict[str, Dataset]:
    """`{"query": "premise, because", "choices", "gold"}` a line; the premise has lost its period."""

    def convert(row: _Row) -> _Row:
        premise, connector = row["query"].rsplit(", ", 1)
        question = {"because": "cause", "therefore": "effect"}[connector]
        first, second = row["choices"]
        return {
            "premise": premise + ".",
            "question": question,
            "choice1": first,
            "choice2": second,
            "label": row["gold"],
        }

    return _dataset("validation", file, _json_lines, convert)


def boolq(*, file: str, **_: Any) -> dict[str, Dataset]:
    """`{"query": "Passage: ..\\nQuestion: ..?", "choices": ["no", "yes"], "gold"}` a line."""

    def convert(row: _Row) -> _Row:
        found = re.fullmatch(r"Passage: (.*)\nQuestion: (.*)\?", row["query"], re.DOTALL)
        if not found or row["choices"] != ["no", "yes"]:
            raise ValueError("expected a passage, a question, no and yes")
        return {"passage": found[1], "question": found[2], "label": row["gold"]}

    return _dataset("validation", file, _json_lines, convert)


def winogrande(*, file: str, **_: Any) -> dict[str, Dataset]:
    """`{"context_options", "continuation", "gold"}` a line: each option with all that comes before it."""

    def convert(row: _Row) -> _Row:
        first, second = row["context_options"]
        sentence = f"_ {row['continuation']}"
        return {"sentence": sentence, "option1": first, "option2": second, "answer": "12"[row["gold"]]}

    return _dataset("validation", file, _json_lines, convert)


def wsc273(*, file: str, **_: Any) -> dict[str, Dataset]:
    """As for WinoGrande; the options are spelled as lm-eval's process_docs spells them."""

    def convert(row: _Row) -> _Row:
        after = row["continuation"]
        text = f"_{after if after.startswith('.') else ' ' + after}"
        options = [*row["context_options"]]
        return {"text": text, "pronoun": "_", "pronoun_loc": 0, "options": options, "label": row["gold"]}

    return _dataset("test", file, _json_lines, convert)


def mmlu(*, file: str, **_: Any) -> dict[str, Dataset]:
    """CSV with a header: question, four choices, number of the answer."""

    def records(path: Path) -> Iterable[_Row]:
        with path.open(encoding="utf-8", newline="") as lines:
            yield from csv.DictReader(lines)

    def convert(row: _Row) -> _Row:
        answer = int(row["answer"])
        if answer not in range(4):
            raise ValueError(f"the answer is 0 to 3, not {answer}")
        return {
            "question": row["question"],
            "choices": [row[f"choice{number}"] for number in range(4)],
            "answer": answer,
        }

    return _dataset("test", file, records, convert)


def wikitext(*, file: str, **_: Any) -> dict[str, Dataset]:
    """Raw WikiText, one row `{"page"}` per article."""

    def pages(path: Path) -> Iterable[str]:
        page: list[str] = []
        for line in _text(path).split("\n"):
            heading = line.replace("= = =", "===").replace("= =", "==").strip()
            # One of the first level opens an article.
            if heading.startswith("= ") and heading.endswith(" ="):
                if "".join(page).strip():
                    yield "\n".join(page)
                page = []
            page.append(line)
        yield "\n".join(page)

    return _dataset("test", file, pages, lambda page: {"page": page})


def _choices(texts: list[str]) -> dict[str, list[str]]:
    return {"text": texts, "label": list(LETTERS[: len(texts)])}


def _dataset(
    split: str, file: str, read: Callable[[Path], Iterable[Any]], convert: Callable[[Any], _Row]
) -> dict[str, Dataset]:
    path = _path(file)
    rows: list[_Row] = []
    try:
        for record in read(path):
            rows.append(convert(record))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not as expected after {len(rows)} rows: {error!r}") from error
    if not rows:
        raise ValueError(f"{path} has no rows")
    return {split: Dataset.from_list(rows)}


def _path(file: str) -> Path:
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        raise _missing(f"the environment variable {FOLDER_VARIABLE} is not set")
    if not Path(folder).is_dir():
        raise _missing(f"there is no folder {folder}, which {FOLDER_VARIABLE} names")
    path = Path(folder, file)
    if not path.is_file():
        raise _missing(f"there is no file {path}")
    return path


def _missing(message: str) -> FileNotFoundError:
    error = FileNotFoundError(message)
    error.add_note(
        f"set {FOLDER_VARIABLE} to the folder with the benchmark files; {Path(__file__).with_name('README.md')} tells "
        "which they are and where they come from"
    )
    return error


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8").replace("\r\n", "\n")


def _lines(text: str) -> list[str]:
    """Not str.splitlines, which also splits at characters such as U+2028."""
    return text.removesuffix("\n").split("\n") if text else []


def _json_lines(path: Path) -> Iterable[_Row]:
    return (json.loads(line) for line in _lines(_text(path)))
