"""Where text comes from: the standard library, files and folders, or a dataset. Documents out, one by one."""

from __future__ import annotations

import gzip
import json
import logging
import lzma
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lowrank_kit.errors import LowRankError, UsageError

logger = logging.getLogger(__name__)

STDLIB = "stdlib"
HUB_PREFIX = "hub:"
TEXT_FIELD = "text"

# Tests and the editor are not the library; the rest is not the standard library, or not source.
_STDLIB_EXCLUDED = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"}
# CPython 3.10 to 3.13 have 650 to 700 such files; a distribution that ships a core without the library has a few dozen.
_STDLIB_FEWEST_FILES = 200

_WHAT_A_SOURCE_CAN_BE = (
    'a text source is a file or folder (.txt .text .md .rst .py, or .jsonl with a "text" field, each also .xz or .gz), '
    "hub:NAME[:split] through datasets, or stdlib"
)


@dataclass(frozen=True)
class Document:
    """One text and where it is from: a path below the source, with a line number for one row of a jsonl file."""

    name: str
    text: str


def read_source(source: str | None = None) -> Iterator[Document]:
    """Read the documents of a text source, in the order of their names; documents of white space only are left out.

    Files are UTF-8. Bytes that are not become U+FFFD, with a warning that names the file: one stray byte in a folder
    of thousands of files shall not stop a run.

    Args:
        source: None or "stdlib" (the running interpreter's own library, without its tests), a file, a folder
            (read recursively, hidden files and unknown file types left out), or "hub:NAME[:split]".

    Raises:
        UsageError: there is no such source, it holds no text, or its rows have no "text".
        LowRankError: a file is damaged, or a line of a jsonl file does not parse (file and line named).
    """
    if source is None or source == STDLIB:
        documents = _read_stdlib(Path(sysconfig.get_path("stdlib")))
    elif source.startswith(HUB_PREFIX):
        documents = _read_hub(source)
    else:
        documents = _read_path(Path(source).expanduser())
    return (document for document in documents if document.text.strip())


def _read_stdlib(root: Path) -> Iterator[Document]:
    paths = [
        path
        for path in sorted(_python_files(root))
        # `_sysconfigdata*` is written when Python is built: paths and flags of the machine it was built on.
        if not path.name.startswith("_sysconfigdata")
    ]
    if len(paths) < _STDLIB_FEWEST_FILES:
        raise UsageError(
            f"the standard library's sources are not installed: {len(paths)} .py files in {root}, "
            f"expected at least {_STDLIB_FEWEST_FILES}",
            hint=f"name another source: {_WHAT_A_SOURCE_CAN_BE}",
        )
    for path in paths:
        yield from _read_plain(path, path.relative_to(root).as_posix())


def _read_path(path: Path) -> Iterator[Document]:
    if path.is_file():
        yield from _reader_of(path)(path, path.name)
    elif path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if _is_text_file(file, path)]
        if not files:
            raise UsageError(f"no text files in the folder {path}", hint=_WHAT_A_SOURCE_CAN_BE)
        for file in files:
            yield from _reader_of(file)(file, file.relative_to(path).as_posix())
    else:
        raise UsageError(f"no such text source: {path}", hint=_WHAT_A_SOURCE_CAN_BE)


def _python_files(root: Path) -> Iterator[Path]:
    """The .py files below `root`; excluded folders are not entered, site-packages may hold a hundred times more."""
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in _STDLIB_EXCLUDED]
        yield from (Path(folder, file) for file in files if file.endswith(".py"))


def _read_hub(source: str) -> Iterator[Document]:
    # Imported here: it takes a second, and only this kind of source needs it.
    from datasets import load_dataset

    name, _, split = source.removeprefix(HUB_PREFIX).partition(":")
    split = split or "train"
    if not name:
        raise UsageError(f'"{source}" names no dataset', hint=_WHAT_A_SOURCE_CAN_BE)
    try:
        dataset = load_dataset(name, split=split)
    # What datasets raises for: no such dataset or no network; no such split, or no configuration named.
    except (OSError, ValueError) as error:
        raise UsageError(
            f'the dataset "{name}" (split "{split}") could not be loaded: {error}', hint=_WHAT_A_SOURCE_CAN_BE
        ) from error
    if TEXT_FIELD not in dataset.column_names:
        raise UsageError(
            f'the dataset "{name}" has no column "{TEXT_FIELD}"; its columns: {", ".join(dataset.column_names)}',
            hint=f'write the column to read into a .jsonl file, one {{"{TEXT_FIELD}": ...}} a line',
        )
    for row, text in enumerate(dataset.select_columns([TEXT_FIELD])[TEXT_FIELD]):
        yield _checked_document(f"{name}:{split}:{row}", text)


def _read_plain(path: Path, name: str) -> Iterator[Document]:
    with _opened(path) as file:
        yield Document(name, _decoded(file.read(), path))


def _read_jsonl(path: Path, name: str) -> Iterator[Document]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(_decoded(line, path))
            except json.JSONDecodeError as error:
                raise LowRankError(
                    f"{path}, line {number}: not a JSON value: {error}", hint="each line of a .jsonl file is one object"
                ) from error
            yield _checked_document(f"{name}:{number}", row.get(TEXT_FIELD) if isinstance(row, dict) else None)


_Reader = Callable[[Path, str], Iterator[Document]]

_READERS: dict[str, _Reader] = {
    ".txt": _read_plain,
    ".text": _read_plain,
    ".md": _read_plain,
    ".rst": _read_plain,
    ".py": _read_plain,
    ".jsonl": _read_jsonl,
}
_OPENERS: dict[str, Callable[..., Any]] = {"": open, ".xz": lzma.open, ".gz": gzip.open}


def _file_type(path: Path) -> tuple[str, str]:
    """corpus.jsonl.xz -> (".jsonl", ".xz"); the second is "" where nothing is compressed."""
    compression = path.suffix if path.suffix in _OPENERS else ""
    return Path(path.name.removesuffix(compression)).suffix, compression


def _is_text_file(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return path.is_file() and not hidden and _file_type(path)[0] in _READERS


def _reader_of(path: Path) -> _Reader:
    kind, _ = _file_type(path)
    if kind not in _READERS:
        raise UsageError(f'{path} has the unknown file type "{kind}"', hint=_WHAT_A_SOURCE_CAN_BE)
    return _READERS[kind]


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes, decompressed; damage found while reading names the file."""
    try:
        with _OPENERS[_file_type(path)[1]](path, "rb") as file:
            yield file
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise LowRankError(
            f"{path} could not be read: {error}", hint="is the file complete, and yours to read?"
        ) from error


def _decoded(content: bytes, path: Path) -> str:
    """UTF-8 to text: no byte order mark, line ends as \\n."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        logger.warning("%s is not UTF-8 (byte %d): such bytes are read as U+FFFD", path, error.start)
        text = content.decode(errors="replace")
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _checked_document(name: str, text: object) -> Document:
    if not isinstance(text, str):
        raise LowRankError(
            f'{name}: no string in the field "{TEXT_FIELD}"', hint=f'each row is an object {{"{TEXT_FIELD}": "..."}}'
        )
    # JSON can spell half a surrogate pair, which no UTF-8 text holds: it becomes "?".
    return Document(name, text.encode(errors="replace").decode())
