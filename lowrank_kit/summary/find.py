"""Finds, in folders, the documents that lowrank wrote: by their schema, their name and what they hold."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_kit.errors import LowRankError, UsageError

SCHEMA_VERSION = 1
EXPERIMENT = "lowrank-experiment"
EXPERIMENT_VERSION = 1
MOST_LEVELS = 6
MOST_FILES = 2000
MOST_BYTES = 512 * 2**20
# Kind -> what each of its documents holds at the top.
SIGNS: Mapping[str, frozenset[str]] = {
    "run": frozenset({"settings", "finished", "num_steps", "parameters"}),
    "compression": frozenset({"totals", "matrices", "settings"}),
    "spectra": frozenset({"models", "singular_values"}),
    "check": frozenset({"checks", "passed", "settings"}),
    "sweep": frozenset({"cells", "settings"}),
    "quickstart": frozenset({"models", "size", "corpus_sha256"}),
    "bench": frozenset({"models", "rows", "memory_measured", "threads"}),
    "eval": frozenset({"models", "settings"}),
}
NAMES = {f"{kind}.json": kind for kind in ("run", "compression", "spectra", "check", "sweep")}
# Of a checkpoint, and large.
_OTHERS = {
    f"{name}.json" for name in ("config", "generation_config", "tokenizer", "tokenizer_config", "vocab", "export")
}
_WHAT = (
    "what lowrank train, analyze, compress and scale write, lowrank eval or bench --json > FILE.json, or an "
    "experiment's results"
)


@dataclass(frozen=True)
class Found:
    """One document.

    Args:
        kind: a key of `SIGNS`, or "experiment".
        path: of the file.
        shown: its path below the folder that was named, after that folder's name.
        document: what it holds.
        sha256: of the file.
    """

    kind: str
    path: Path
    shown: str
    document: Mapping[str, Any]
    sha256: str

    @property
    def folder(self) -> Path:
        """It is in, without links."""
        return self.path.parent.resolve()

    @property
    def name(self) -> str:
        """Of the folder as shown, which is the name of the model or result; of the file, of an evaluation."""
        place = Path(self.shown)
        return str(place) if self.kind == "eval" or str(place.parent) == "." else str(place.parent)


def find_documents(places: Sequence[Path | str]) -> list[Found]:
    """All documents below folders, or in files; each once, in order of their paths.

    Raises:
        UsageError: a place that is not there or has nothing that lowrank wrote; results of another version.
        LowRankError: a file of lowrank's that is damaged.
    """
    found: dict[Path, Found] = {}
    for place in map(Path, places):
        if not place.exists():
            raise UsageError(f"no folder {place}", hint="give a folder with results")
        files = [place] if place.is_file() else list(_files(place))
        here = [one for file in files if (one := _read(file, place)) is not None]
        if not here:
            raise UsageError(f"nothing that lowrank wrote in {place} ({len(files)} JSON files read)", hint=_WHAT)
        for one in here:
            found.setdefault(one.path.resolve(), one)
    return list(found.values())


@contextmanager
def reading(one: Found) -> Iterator[None]:
    """Inside, what a document lacks is told in one error that names its file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        told = f"{type(error).__name__}: {error}"
        raise LowRankError(f"{one.path} is damaged ({told})", hint="make it again, or remove it") from error


def _files(top: Path) -> Iterator[Path]:
    """JSON files below a folder; hidden folders, checkpoints and what is not finished are passed over.

    So is the compression.json that a run or an export took over from a compressed model: its errors are of before the
    training, or its bytes not those of the folder.
    """
    count = 0
    for folder, below, listed in os.walk(top):
        depth = len(Path(folder).relative_to(top).parts)
        passed = {name for name in below if name.startswith(".") or name.endswith(".partial") or name == "checkpoints"}
        below[:] = sorted(set(below) - passed) if depth < MOST_LEVELS else []
        names = set(listed)
        for name in sorted(names):
            taken_over = name == "compression.json" and not names.isdisjoint(("run.json", "export.json"))
            if name.endswith(".json") and not name.startswith(".") and name not in _OTHERS and not taken_over:
                count += 1
                if count > MOST_FILES:
                    raise UsageError(f"{top}: more than {MOST_FILES:,} JSON files", hint="give folders further down")
                yield Path(folder, name)


def _read(path: Path, top: Path) -> Found | None:
    """The document of a file, None where lowrank wrote none."""
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise UsageError(f"{path}: {size:,} bytes, more than {MOST_BYTES:,}", hint="leave out its folder")
    data = path.read_bytes()
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        if path.name in NAMES:
            raise LowRankError(f"{path} is damaged: {error}", hint="make it again, or remove it") from error
        return None
    if not isinstance(document, dict) or (kind := _kind(document, path)) is None:
        return None
    start = top.absolute()
    shown = path.name if top.is_file() else str(Path(start.name, path.absolute().relative_to(start)))
    return Found(kind, path, shown, document, hashlib.sha256(data).hexdigest())


def _kind(document: Mapping[str, Any], path: Path) -> str | None:
    schema = document.get("schema")
    if isinstance(schema, str) and schema.partition("/")[0] == EXPERIMENT:
        _same_version(path, schema.partition("/")[2], EXPERIMENT_VERSION)
        return "experiment"
    version = document.get("schema_version")
    if version is None:
        return None
    kind = NAMES.get(path.name) or next((kind for kind, keys in SIGNS.items() if keys <= document.keys()), None)
    if kind == "eval" and not _is_eval(document["models"]):
        return None
    if kind is None:
        return None
    _same_version(path, version, SCHEMA_VERSION)
    if missing := sorted(SIGNS[kind] - document.keys()):
        raise LowRankError(f"{path} is damaged: it has no {', '.join(missing)}", hint="make it again, or remove it")
    return kind


def _is_eval(models: Any) -> bool:
    return isinstance(models, list) and all(
        isinstance(row, dict) and {"model", "bytes"} <= row.keys() for row in models
    )


def _same_version(path: Path, version: Any, known: int) -> None:
    if str(version) != str(known):
        raise UsageError(
            f"{path}: results of version {version}; this lowrank-kit reads version {known}",
            hint="use the lowrank-kit that wrote them, or make them again",
        )
