"""Where text comes from: the standard library, files and folders, or a dataset. Documents out, one by one."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import logging
import lzma
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lowrank_kit.errors import LowRankError, UsageError

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

STDLIB = "stdlib"
HUB_PREFIX = "hub:"
TEXT_FIELD = "text"

# Tests and the editor are not the library; the rest is not the standard library, or not source.
_STDLIB_EXCLUDED = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"}
# CPython 3.10 to 3.13 have 650 to 700 such files; a distribution that ships a core without the library has a few dozen.
_STDLIB_FEWEST_FILES = 200

_WHAT_A_SOURCE_CAN_BE = (
    'a text source is a file or folder (.txt .text .raw .md .rst .py, or .jsonl with a "text" field, each also .xz or '
    '.gz, or .parquet with a "text" column), hub:NAME[:split] through datasets, or stdlib'
)
# How much larger text is than what holds it on disk, roughly; only a guess at what fits into memory is made of it.
_TIMES_COMPRESSED = 4
_PARQUET_ROWS_PER_BATCH = 256


@dataclass(frozen=True)
class Document:
    """One text and where it is from: a path below the source, with a number for one row of a jsonl or parquet file."""

    name: str
    text: str

    @property
    def digest(self) -> str:
        """What a text is known by in a record: the first 16 hex digits of its sha256, of the text alone."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def read_source(source: str | None = None, *, piece_bytes: int | None = None) -> Iterator[Document]:
    """Read the documents of a text source, in the order of their names; documents of white space only are left out.

    Files are UTF-8. Bytes that are not become U+FFFD, with a warning that names the file: one stray byte in a folder
    of thousands of files shall not stop a run. Rows of jsonl and parquet files and of datasets are read one by one.

    Args:
        source: None or "stdlib" (the running interpreter's own library, without its tests), a file, a folder
            (read recursively, hidden files and unknown file types left out), or "hub:NAME[:split]".
        piece_bytes: a plain file of that size or more becomes several documents, cut at the ends of paragraphs or
            lines; None: one document, whatever its size.

    Raises:
        UsageError: there is no such source, it holds no text, or its rows have no "text".
        LowRankError: a file is damaged or cut off, or a line of a jsonl file does not parse (file and line named).
    """
    if source is not None and source.startswith(HUB_PREFIX):
        documents = _read_hub(source)
    else:
        documents = _read_files(_files(source), piece_bytes)
    return (document for document in documents if document.text.strip())


def source_files(source: str | None = None) -> dict[str, Path]:
    """Name -> path of the files behind a text source, without reading them: for a dataset those in its cache.

    Raises:
        UsageError: there is no such source, or it has no files.
    """
    if source is not None and source.startswith(HUB_PREFIX):
        paths = [Path(file["filename"]) for file in open_hub(source)[1].cache_files]
        return {f"{number}/{path.name}": path for number, path in enumerate(paths)}
    return {name: path for path, name in _files(source)}


def text_bytes(source: str | None = None) -> int:
    """About how many bytes of text a source holds, told from the sizes of its files, compressed ones counted 4 times.

    Raises:
        UsageError: there is no such source, or it has no files.
    """
    return sum(
        path.stat().st_size * (_TIMES_COMPRESSED if _is_compressed(path) else 1)
        for path in source_files(source).values()
    )


def _files(source: str | None) -> list[tuple[Path, str]]:
    """Path and name of each file, in the order of the paths."""
    if source is None or source == STDLIB:
        return _stdlib_files(Path(sysconfig.get_path("stdlib")))
    path = Path(source).expanduser()
    if path.is_file():
        _reader_of(path)  # refuses other types
        return [(path, path.name)]
    if not path.is_dir():
        raise UsageError(f"no such text source: {path}", hint=_WHAT_A_SOURCE_CAN_BE)
    files = [file for file in sorted(path.rglob("*")) if _is_text_file(file, path)]
    if not files:
        raise UsageError(f"no text files in the folder {path}", hint=_WHAT_A_SOURCE_CAN_BE)
    return [(file, file.relative_to(path).as_posix()) for file in files]


def _read_files(files: Iterable[tuple[Path, str]], piece_bytes: int | None) -> Iterator[Document]:
    for path, name in files:
        reader = _reader_of(path)
        if piece_bytes is not None and reader is _read_plain:
            yield from _read_pieces(path, name, piece_bytes)
        else:
            yield from reader(path, name)


def _stdlib_files(root: Path) -> list[tuple[Path, str]]:
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
    return [(path, path.relative_to(root).as_posix()) for path in paths]


def _python_files(root: Path) -> Iterator[Path]:
    """The .py files below `root`; excluded folders are not entered, site-packages may hold a hundred times more."""
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in _STDLIB_EXCLUDED]
        yield from (Path(folder, file) for file in files if file.endswith(".py"))


def open_hub(source: str) -> tuple[str, Dataset]:
    """The dataset that "hub:NAME[:split]" names, memory-mapped, and what to call it in a message: "NAME:split".

    Raises:
        UsageError: no name, or a dataset that cannot be had.
    """
    # Imported here: it takes a second, and only this kind of source needs it.
    from datasets import load_dataset

    name, _, split = source.removeprefix(HUB_PREFIX).partition(":")
    split = split or "train"
    if not name:
        raise UsageError(f'"{source}" names no dataset', hint=_WHAT_A_SOURCE_CAN_BE)
    try:
        return f"{name}:{split}", load_dataset(name, split=split)
    # What datasets raises for: no such dataset or no network; no such split, or no configuration named.
    except (OSError, ValueError) as error:
        raise UsageError(
            f'the dataset "{name}" (split "{split}") could not be loaded: {error}', hint=_WHAT_A_SOURCE_CAN_BE
        ) from error


def _hub_texts(source: str) -> tuple[str, Dataset]:
    """The texts of a dataset, memory-mapped, and what to call it."""
    name, dataset = open_hub(source)
    if TEXT_FIELD not in dataset.column_names:
        raise UsageError(
            f'the dataset "{name}" has no column "{TEXT_FIELD}"; its columns: {", ".join(dataset.column_names)}',
            hint=f'write the column to read into a .jsonl file, one {{"{TEXT_FIELD}": ...}} a line',
        )
    return name, dataset.select_columns([TEXT_FIELD])


def _read_hub(source: str) -> Iterator[Document]:
    name, dataset = _hub_texts(source)
    for row, text in enumerate(dataset[TEXT_FIELD]):
        yield _checked_document(f"{name}:{row}", text)


def _read_plain(path: Path, name: str) -> Iterator[Document]:
    with _opened(path) as file:
        yield Document(name, _decoded(file.read(), path))


def _read_pieces(path: Path, name: str, piece_bytes: int) -> Iterator[Document]:
    """A plain file as documents below `piece_bytes`, its name without a number where one is enough."""
    with _opened(path) as file:
        rest = b""
        for number in itertools.count(1):
            content = rest + file.read(piece_bytes - len(rest))
            if len(content) < piece_bytes:
                yield Document(name if number == 1 else f"{name}:{number}", _decoded(content, path))
                return
            end = _last_end(content)
            yield Document(f"{name}:{number}", _decoded(content[:end], path))
            rest = content[end:]


def _last_end(content: bytes) -> int:
    """Where the last paragraph, line or word in the second half ends; else the last character that is whole."""
    for separator in (b"\n\n", b"\n", b" "):
        found = content.rfind(separator, len(content) // 2)
        if found >= 0:
            return found + len(separator)
    end = len(content)
    while end > len(content) - 4 and content[end - 1] & 0b1100_0000 == 0b1000_0000:  # inside a character
        end -= 1
    return end - 1 if content[end - 1] >= 0b1100_0000 else len(content)


def _read_jsonl(path: Path, name: str) -> Iterator[Document]:
    for place, row in jsonl_rows(path, name):
        yield _checked_document(place, row.get(TEXT_FIELD) if isinstance(row, dict) else None)


def jsonl_rows(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """The values of a .jsonl file (.xz, .gz) and where each is from, `name:line`; empty lines are left out.

    Raises:
        LowRankError: the file is damaged, or a line does not parse.
    """
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(_decoded(line, path))
            except json.JSONDecodeError as error:
                raise _bad_line(path, number, line, error) from error
            yield f"{name}:{number}", row


def _bad_line(path: Path, number: int, line: bytes, error: json.JSONDecodeError) -> LowRankError:
    if line.endswith(b"\n"):
        return LowRankError(
            f"{path}, line {number}: not a JSON value: {error}", hint="each line of a .jsonl file is one object"
        )
    return LowRankError(
        f"{path}, line {number}: the last line is cut off after {len(line)} bytes: {error}",
        hint="the file is not complete: copy it again, or delete its last line",
    )


def _read_parquet(path: Path, name: str) -> Iterator[Document]:
    for number, row in enumerate(parquet_rows(path, TEXT_FIELD)):
        yield _checked_document(f"{name}:{number}", row[TEXT_FIELD])


def parquet_rows(path: Path, column: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a .parquet file, with all columns or with one.

    Raises:
        UsageError: it has no such column.
        LowRankError: the file is damaged.
    """
    # Imported here: only this kind of file needs it.
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    with _opened(path) as file:
        try:
            table = ParquetFile(file)
            if column is not None and column not in table.schema_arrow.names:
                raise UsageError(
                    f'{path} has no column "{column}"; its columns: {", ".join(table.schema_arrow.names)}',
                    hint=f'name the column to read "{column}"',
                )
            for batch in table.iter_batches(_PARQUET_ROWS_PER_BATCH, columns=None if column is None else [column]):
                yield from batch.to_pylist()
        except ArrowException as error:
            raise OSError(str(error)) from error  # said as of any other file


_Reader = Callable[[Path, str], Iterator[Document]]

_READERS: dict[str, _Reader] = {
    ".txt": _read_plain,
    ".text": _read_plain,
    ".md": _read_plain,
    ".raw": _read_plain,  # as WikiText has it
    ".rst": _read_plain,
    ".py": _read_plain,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
_OPENERS: dict[str, Callable[..., Any]] = {"": open, ".xz": lzma.open, ".gz": gzip.open}


def file_type(path: Path) -> tuple[str, str]:
    """corpus.jsonl.xz -> (".jsonl", ".xz"); the second is "" where nothing is compressed."""
    compression = path.suffix if path.suffix in _OPENERS else ""
    return Path(path.name.removesuffix(compression)).suffix, compression


def _is_compressed(path: Path) -> bool:
    kind, compression = file_type(path)
    return bool(compression) or _READERS.get(kind) is _read_parquet


def _is_text_file(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return path.is_file() and not hidden and file_type(path)[0] in _READERS


def _reader_of(path: Path) -> _Reader:
    kind, _ = file_type(path)
    if kind not in _READERS:
        raise UsageError(f'{path} has the unknown file type "{kind}"', hint=_WHAT_A_SOURCE_CAN_BE)
    return _READERS[kind]


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes, decompressed; damage found while reading names the file."""
    try:
        with _OPENERS[file_type(path)[1]](path, "rb") as file:
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
            f'{name}: no string in the field "{TEXT_FIELD}"',
            hint=f'each row is an object {{"{TEXT_FIELD}": "..."}}; conversations are for lowrank train and compress',
        )
    # JSON can spell half a surrogate pair, which no UTF-8 text holds: it becomes "?".
    return Document(name, text.encode(errors="replace").decode())
