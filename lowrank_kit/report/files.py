"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import csv
import errno
import glob
import io
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import psutil

from lowrank_kit.errors import LowRankError, UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PNG_DPI = 150
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
# No room on the disk, in the user's share of it, in a file of the largest size allowed: what to do about it.
_NO_ROOM = {
    errno.ENOSPC: "make room, or give an output on another disk",
    errno.EDQUOT: "make room in your quota, or give an output on another disk",
    errno.EFBIG: "ulimit -f unlimited; lowrank compress writes smaller files with --max-shard-bytes",
}


@contextmanager
def new_folder(path: Path | str) -> Iterator[Path]:
    """A folder to fill, which takes its name only when the block ends without an error.

    Args:
        path: a folder that does not exist yet, or is empty.

    Yields:
        A temporary folder beside it; moved to `path` at the end, removed on an error.

    Raises:
        UsageError: the path is taken, or no folder can be made there.
    """
    path = Path(path).absolute()
    temporary = _own_temporary(path)
    with told_if_not_made(path):
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file, a folder is wanted", hint="choose another output folder")
        if path.is_dir() and (count := sum(1 for _ in path.iterdir())):
            raise UsageError(f"{path}: the output folder is not empty ({count} entries)", hint="choose a new folder")
        absent = [parent for parent in path.parents if not parent.exists()]
        _remove_left(path)
        temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.is_dir():  # keep the folder itself: somebody may stand in it
            for entry in temporary.iterdir():
                entry.replace(path / entry.name)
        else:
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in absent:  # innermost first; those in use stay
            with suppress(OSError):
                parent.rmdir()


@contextmanager
def told_if_not_made(path: Path) -> Iterator[None]:
    """Inside, where a folder cannot be made is told in one error."""
    try:
        yield
    except OSError as error:  # a parent that is a file, a folder or a disk that may not be written to
        raise UsageError(
            f"the output folder {path} cannot be made: {error.strerror} ({error.filename})",
            hint="choose an output where you may write",
        ) from error


@contextmanager
def new_file(path: Path, nbytes: int) -> Iterator[BinaryIO]:
    """A file to fill, which takes its name only when the block ends without an error and all is on the disk.

    Args:
        path: its name; a file that has it is replaced.
        nbytes: what will be written, for the error.

    Yields:
        The open temporary file beside it, removed on an error. A killed run leaves it, for the next to overwrite.

    Raises:
        LowRankError: no room for it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with room_for(path, nbytes):
        try:
            with temporary.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def room_for(path: Path, nbytes: int) -> Iterator[None]:
    """Tell in one error that what the block writes to `path`, of `nbytes` bytes, finds no room."""
    try:
        yield
    except Exception as error:  # libraries written in Rust have classes of their own for what the system says
        told = _OS_ERROR.search(str(error))
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        if number is None or number not in _NO_ROOM:
            raise
        free = shutil.disk_usage(path.parent).free
        raise LowRankError(
            f"{path}: {os.strerror(number)}: it takes {nbytes:,} bytes, {free:,} are free", hint=_NO_ROOM[number]
        ) from error


def sync_folder(path: Path) -> None:
    """What is renamed is on the disk only when the folder it is in is."""
    with suppress(OSError):  # not every system opens a folder
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text."""
    _write_bytes(Path(path), text.encode())


def json_text(document: Mapping[str, Any], *, schema_version: int = 1) -> str:
    """A JSON object with its `schema_version` first. NaN and Inf, which JSON does not have, become null."""
    return json.dumps(finite({"schema_version": schema_version, **document}), indent=1, allow_nan=False) + "\n"


def write_json(path: Path | str, document: Mapping[str, Any], *, schema_version: int = 1) -> None:
    """Write what `json_text` makes of a document."""
    write_text(path, json_text(document, schema_version=schema_version))


def write_csv(path: Path | str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Write rows as CSV with a heading; the columns of the first row when none are named; None is an empty cell."""
    if columns is None:
        columns = list(rows[0]) if rows else []
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


def write_png(path: Path | str, figure: Figure) -> None:
    """Draw a figure; no display is needed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=PNG_DPI)
    _write_bytes(Path(path), buffer.getvalue())


def finite(value: Any) -> Any:
    """`value` as JSON can hold it, at any depth: NaN and Inf become None, paths become text."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): finite(item) for key, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
        case Path():
            return str(value)
        case _:
            return value


def _write_bytes(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _own_temporary(path)
    with room_for(path, len(data)):
        _remove_left(path)
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _own_temporary(path: Path) -> Path:
    """What is made under this name until it is whole, by this process."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _remove_left(path: Path) -> None:
    """Remove what processes have left that were killed while they made it; containers use the same few ids again."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        process = left.name.split(".")[-2]
        if process.isdecimal() and (int(process) == os.getpid() or not psutil.pid_exists(int(process))):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
