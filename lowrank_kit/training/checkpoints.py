"""Checkpoints of a run: safetensors and JSON, whole or absent, and good for another number of processes.

A checkpoint is a folder `checkpoint-STEP`: the tensors as torch's distributed checkpoint writes them in safetensors,
each process its own part; what is no tensor in JSON; and `checkpoint.json`, written last, with the size of every file.
It is written beside its name and renamed when all of it is on the disk. Tensors go by the names of the parameters, so
that a model sharded differently, or not at all, finds its own. Nothing in it is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lowrank_kit.checkpoint.headers import read_shard
from lowrank_kit.errors import LowRankError
from lowrank_kit.processes import are_connected, is_first, num_processes, on_first
from lowrank_kit.report.files import json_text, sync_folder

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
SCHEMA_VERSION = 1
_PREFIX, _SAVING = "checkpoint-", ".saving-"
# A file is put together in memory before it is written.
_FILE_BYTES = 2**30


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], documents: Mapping[str, Mapping[str, Any]], *, keep: int
) -> Path:
    """Write a checkpoint; called on every process at once.

    A process that is killed, or a disk that fills up, leaves the checkpoints before it as they were.

    Args:
        folder: of the checkpoints of a run.
        step: optimizer steps made.
        tensors: name -> tensor, the same on all processes, or a DTensor.
        documents: file name -> JSON object; those of the first process are written.
        keep: how many checkpoints stay, this one among them.

    Returns:
        The checkpoint.

    Raises:
        LowRankError: it could not be written; what was written of it is gone.
    """
    staging, final = folder / f"{_SAVING}{step}", folder / f"{_PREFIX}{step}"
    try:
        on_first(lambda: _make_staging(staging))
        with _quiet():
            writer = dcp.HuggingFaceStorageWriter(str(staging), _file_of(tensors), save_distributed=True)
            dcp.save({name: tensor.detach() for name, tensor in tensors.items()}, storage_writer=writer)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        on_first(lambda: _finish(staging, final, step, shapes, documents))
    except (CheckpointException, OSError) as error:
        if is_first():
            shutil.rmtree(staging, ignore_errors=True)
        raise LowRankError(
            f"the checkpoint of step {step} could not be written to {folder}: {_reason(error)}",
            hint="the checkpoints before it are as they were; make room, and resume the run",
        ) from error
    on_first(lambda: rotate(folder, keep))
    return final


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that has all its files; None where there is no checkpoint at all.

    A damaged one that is newer is passed over, with a warning that names it and what is wrong with it.

    Raises:
        LowRankError: there are checkpoints, and all are damaged.
    """
    damaged: list[str] = []
    for checkpoint in _checkpoints(folder):
        fault = what_is_wrong(checkpoint)
        if fault is None:
            for line in damaged:
                logger.warning("%s; going on from %s", line, checkpoint.name)
            return checkpoint
        damaged.append(f"{checkpoint.name} is damaged: {fault}")
    if damaged:
        raise LowRankError(
            f"{folder} holds no whole checkpoint; {'; '.join(damaged)}",
            hint="restore the files, or start again in a new folder",
        )
    return None


def what_is_wrong(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be read: a file that is missing or damaged; numbers of tensors are not looked at."""
    try:
        manifest = read_manifest(checkpoint)
    except LowRankError as error:
        return error.message
    for name, size in manifest["files"].items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if (known := manifest["sha256"].get(name)) is not None and _sha256(file) != known:
            return f"{name} has other bytes than were written"
        if file.suffix == ".safetensors":
            try:
                read_shard(file, name)
            except LowRankError as error:
                return error.message
    return None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """`checkpoint.json`: step, processes, file name -> bytes, and of what is no tensor -> SHA-256.

    Raises:
        LowRankError: it is missing, damaged, or of a later version.
    """
    if not (checkpoint / MANIFEST).is_file():
        by_trainer = (checkpoint / "optimizer.pt").is_file()
        what = "an earlier version of lowrank-kit wrote it" if by_trainer else "it was not written to its end"
        raise LowRankError(f"{MANIFEST} is missing: {what}")
    manifest = read_document(checkpoint, MANIFEST)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise LowRankError(f"its format is version {manifest.get('schema_version')}, known is {SCHEMA_VERSION}")
    match manifest:
        case {"step": int(), "processes": int(), "files": {} as files} if all(map(_is_size, files.values())):
            pass
        case _:
            raise LowRankError(f"{MANIFEST} has no proper step, processes and files")
    if not isinstance(manifest.setdefault("sha256", {}), dict):  # older ones have none
        raise LowRankError(f"{MANIFEST}: sha256 is {manifest['sha256']!r:.40}")
    return manifest


def _is_size(value: Any) -> bool:
    return type(value) is int


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def read_document(checkpoint: Path, name: str) -> dict[str, Any]:
    """One of the JSON objects of a checkpoint.

    Raises:
        LowRankError: it is none.
    """
    try:
        document = json.loads((checkpoint / name).read_bytes())
    except (ValueError, RecursionError) as error:
        raise LowRankError(f"{name} is no JSON: {error}") from None
    if not isinstance(document, dict):
        raise LowRankError(f"{name} holds a {type(document).__name__}")
    return document


def whole_checkpoints(folder: Path) -> list[Path]:
    """Those that have all their files, the newest first."""
    return [checkpoint for checkpoint in _checkpoints(folder) if what_is_wrong(checkpoint) is None]


def rotate(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` whole checkpoints, and what is damaged and older than the newest whole one."""
    kept = whole_checkpoints(folder)[:keep]
    for checkpoint in _checkpoints(folder):
        if kept and checkpoint not in kept and step_of(checkpoint) < step_of(kept[0]):
            shutil.rmtree(checkpoint, ignore_errors=True)


def saved_shapes(checkpoint: Path) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Name -> shape and dtype of every tensor of a checkpoint, from the headers of its files.

    Raises:
        LowRankError: a header is damaged, or parts of a tensor are missing.
    """
    found = {}
    try:
        entries = dcp.HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # in what torch writes beside the tensors
        raise LowRankError(
            f"{checkpoint} is damaged: {type(error).__name__}: {error}", hint=f"rm -r {checkpoint}, and resume"
        ) from error
    for name, entry in entries.items():
        assert isinstance(entry, TensorStorageMetadata)
        there = sum(chunk.sizes.numel() for chunk in entry.chunks)
        if there != entry.size.numel():
            raise LowRankError(f"{checkpoint}: {there} of {entry.size.numel()} numbers of {name} are there")
        found[name] = (tuple(entry.size), entry.properties.dtype)
    return found


def load_tensors(checkpoint: Path, targets: dict[str, Tensor]) -> None:
    """Read tensors into place, each process what it holds of them; called on every process at once.

    Args:
        checkpoint: a whole one.
        targets: name -> tensor of the saved shape.

    Raises:
        LowRankError: a file cannot be read.
    """
    try:
        with _quiet():
            dcp.load(targets, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint)))
    except CheckpointException as error:
        raise LowRankError(f"{checkpoint} cannot be read: {_reason(error)}") from error


def _make_staging(staging: Path) -> None:
    for left in staging.parent.glob(f"{_SAVING}*"):  # of a save that was killed
        shutil.rmtree(left)
    staging.mkdir(parents=True)


def _finish(
    staging: Path,
    final: Path,
    step: int,
    shapes: Mapping[str, tuple[int, ...]],
    documents: Mapping[str, Mapping[str, Any]],
) -> None:
    """Add what the first process writes, see that the parts of all are there, and give the folder its name."""
    found = {name: shape for name, (shape, _) in saved_shapes(staging).items()}
    if found != shapes:
        raise OSError(f"{len(shapes)} tensors were written, {len(found)} are there: do all processes see {staging}?")
    for name, document in documents.items():
        _write_synced(staging / name, json.dumps(document))
    files = {file.name: file.stat().st_size for file in sorted(staging.iterdir())}
    digests = {name: _sha256(staging / name) for name in documents}
    manifest = {"step": step, "processes": num_processes(), "files": files, "sha256": digests}
    _write_synced(staging / MANIFEST, json_text(manifest, schema_version=SCHEMA_VERSION))
    sync_folder(staging)
    if final.exists():  # the run went on from an earlier one, because this is damaged
        shutil.rmtree(final)
    staging.rename(final)
    sync_folder(final.parent)


def _file_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """In which of the files of each process a tensor goes, numbered from 1: none grows without bound."""
    places, size = {}, 0
    for name, tensor in tensors.items():
        places[name] = size // (_FILE_BYTES * num_processes()) + 1
        size += tensor.numel() * tensor.element_size()
    return places


def _checkpoints(folder: Path) -> list[Path]:
    """The newest first."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps made before a checkpoint, by its name."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns where there is one process only."""
    with warnings.catch_warnings():
        if not are_connected():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _reason(error: BaseException) -> str:
    """What went wrong, of the first process where something did."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items())
        return f"{cause}" + (f" (process {rank})" if are_connected() else "")
    return str(error)
