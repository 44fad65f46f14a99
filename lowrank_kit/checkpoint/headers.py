"""Safetensors headers: what a checkpoint holds, without reading a single weight.

A safetensors file is an 8-byte little-endian header length, a JSON header, then the bytes of all tensors without holes.
Everything is checked here, so that a broken download is found before any work and not half-way through it.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lowrank_kit.errors import LowRankError, UsageError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# The limit of the safetensors library itself (`MAX_HEADER_SIZE` in safetensors/src/tensor.rs).
MAX_HEADER_BYTES = 100_000_000

# Bits of one number for each dtype of the format (`Dtype::bitsize` in safetensors/src/tensor.rs).
DTYPE_BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}

_COPY_AGAIN = "the file is damaged or incomplete: download or copy it again"
_BOTH_AGAIN = "index and shards come from different versions: download or copy both again"


@dataclass(frozen=True)
class TensorHeader:
    """One tensor on disk.

    Args:
        name: its name.
        dtype: safetensors' word, e.g. "BF16".
        shape: its shape.
        file: the shard.
        nbytes: its size.
        offset: of its first byte in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    nbytes: int
    offset: int


@dataclass(frozen=True)
class ShardFile:
    """A shard as it was when its header was read.

    Args:
        file: its name.
        nbytes: its size.
        mtime_ns: when it was last changed; None if only its header is here, and the file on the hub.
        headers: its tensors, in the order of their bytes.
    """

    file: str
    nbytes: int
    mtime_ns: int | None
    headers: tuple[TensorHeader, ...]


def headers_by_name(shards: Iterable[ShardFile]) -> dict[str, TensorHeader]:
    """Tensor name -> header, shard by shard."""
    return {header.name: header for shard in shards for header in shard.headers}


def read_shards(folder: Path | str) -> dict[str, ShardFile]:
    """Read and check the headers of every shard of a checkpoint.

    Args:
        folder: a model folder with `model.safetensors`, or with `model.safetensors.index.json` and its shards.

    Returns:
        File -> shard, in the order of the file names.

    Raises:
        UsageError: the folder holds no safetensors model.
        LowRankError: a file is missing, truncated or damaged, or index and shards disagree.
    """
    folder = Path(folder)
    # `model.safetensors` first: the order in which transformers looks.
    if (folder / SINGLE_FILE).is_file():
        return {SINGLE_FILE: _read_shard(folder, SINGLE_FILE)}
    if (folder / INDEX_FILE).is_file():
        weight_map = read_index(folder)
        files = shard_files(folder, weight_map, lambda file: os.path.isfile(folder / file))
        shards = {file: _read_shard(folder, file) for file in files}
        check_against_index(folder, shards.values(), weight_map)
        return shards
    raise UsageError(
        f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE} in this folder", hint=_no_safetensors_hint(folder)
    )


def _no_safetensors_hint(folder: Path) -> str:
    if any(folder.glob("pytorch_model*.bin*")):
        convert = f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')"
        return (
            "pytorch_model.bin is a pickle; convert it once: "
            f'python -c "from transformers import AutoModelForCausalLM as M; {convert}"'
        )
    if (folder / "adapter_model.safetensors").is_file():
        return "this is an adapter: merge it into its base model first (peft: merge_and_unload, then save_pretrained)"
    if folder.parent.name == "snapshots":
        return "only a part of this model is in the cache: once again with a network"
    return "give the folder that save_pretrained wrote"


def refuse_link_out(folder: Path, file: str) -> None:
    """Refuse a file that is a symbolic link out of the model's folder, but for those the cache of the hub is made of.

    Raises:
        LowRankError: it is one, with where it leads.
    """
    home, target = (Path(os.path.realpath(path)) for path in (folder, folder / file))
    roots = [home]
    if home.parent.name == "snapshots" and home.parents[1].name.startswith("models--"):
        # snapshots/COMMIT/FILE -> ../../blobs/SHA, which may itself lead to a store that all repositories share.
        roots += [Path(os.path.realpath(above / "blobs")) for above in home.parents[1:3]]
    if not any(target.is_relative_to(root) for root in roots):
        raise LowRankError(
            f"{folder / file}: a symbolic link out of the model's folder, to {target}",
            hint="copy the file into the folder, if you know who made the link",
        )


def read_index(folder: Path) -> dict[str, str]:
    """`weight_map` of the index: tensor name -> shard file, every name checked to stay inside the folder.

    Raises:
        LowRankError: damaged, or a name that leads out of the folder.
    """
    path = folder / INDEX_FILE
    refuse_link_out(folder, INDEX_FILE)
    try:
        weight_map = _parse_json(path.read_bytes(), str(path)).get("weight_map")
    except OSError as error:
        raise LowRankError(f"{path}: cannot be read: {error}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise LowRankError(f"{path}: no weight_map in the index", hint=_COPY_AGAIN)
    for name, file in weight_map.items():
        parts = PurePosixPath(file.replace("\\", "/")) if isinstance(file, str) else None
        if parts is None or not parts.parts or parts.is_absolute() or ".." in parts.parts or ":" in str(parts):
            raise LowRankError(
                f"{path}: tensor {name} is said to be in {file!r}, which is not a file inside the folder",
                hint="do not use this checkpoint unless you know who made it",
            )
    return weight_map


def shard_files(where: object, weight_map: Mapping[str, str], exists: Callable[[str], bool]) -> list[str]:
    """The shards that an index names, in order.

    Raises:
        LowRankError: some are missing.
    """
    files = sorted(set(weight_map.values()))
    if missing := [file for file in files if not exists(file)]:
        raise LowRankError(
            f"{where}: {len(missing)} of the {len(files)} shards named in {INDEX_FILE} are missing: {_some(missing)}",
            hint="download or copy the missing files",
        )
    return files


def check_against_index(where: object, shards: Iterable[ShardFile], weight_map: Mapping[str, str]) -> None:
    """See that each tensor is in one shard, the one that the index says.

    Raises:
        LowRankError: a tensor is in two shards, in another one, or in one of the two only.
    """
    file_of: dict[str, str] = {}
    for shard in shards:
        for header in shard.headers:
            if header.name in file_of:
                raise LowRankError(
                    f"{where}: tensor {header.name} is in two shards, {file_of[header.name]} and {shard.file}",
                    hint=_BOTH_AGAIN,
                )
            file_of[header.name] = shard.file
    absent = [name for name, file in weight_map.items() if file_of.get(name) != file]
    if absent:
        told = f"{absent[0]} is not in {weight_map[absent[0]]}"
        raise LowRankError(
            f"{where}: {len(absent)} of the {len(weight_map)} tensors of {INDEX_FILE} are not where it says: {told}",
            hint=_BOTH_AGAIN,
        )
    unlisted = [name for name in file_of if name not in weight_map]
    if unlisted:
        told = f"{unlisted[0]} in {file_of[unlisted[0]]}"
        raise LowRankError(
            f"{where}: {len(unlisted)} of the {len(file_of)} tensors of the shards are not in {INDEX_FILE}: {told}",
            hint=_BOTH_AGAIN,
        )


def _read_shard(folder: Path, file: str) -> ShardFile:
    refuse_link_out(folder, file)
    return read_shard(folder / file, file)


def read_shard(path: Path, file: str) -> ShardFile:
    """Read and check the header of a safetensors file.

    Args:
        path: of the file.
        file: what it is called in the folder of the model.

    Raises:
        LowRankError: it cannot be read, or is damaged.
    """
    try:
        with path.open("rb") as stream:
            stat = os.fstat(stream.fileno())
            size = stat.st_size
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise LowRankError(f"{path}: {size} bytes, too short for a safetensors file", hint=_COPY_AGAIN)
            (length,) = struct.unpack("<Q", prefix)
            if prefix == b"version ":
                raise LowRankError(f"{path}: a git-lfs pointer, not the weights", hint=f"git -C {path.parent} lfs pull")
            if length > MAX_HEADER_BYTES or 8 + length > size:
                raise LowRankError(
                    f"{path}: says its header is {length} bytes long, the file has {size}", hint=_COPY_AGAIN
                )
            table = _parse_json(stream.read(length), str(path))
    except OSError as error:
        raise LowRankError(f"{path}: cannot be read: {error}") from error
    metadata = table.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise LowRankError(f"{path}: __metadata__ is not text by name, but {metadata!r:.80}", hint=_COPY_AGAIN)
    return checked_shard(path, file, table, begin=8 + length, nbytes=size, mtime_ns=stat.st_mtime_ns)


def checked_shard(
    where: object, file: str, table: Mapping[str, Any], *, begin: int, nbytes: int, mtime_ns: int | None = None
) -> ShardFile:
    """A shard from its header; the file's size must be exactly what its tensors add up to.

    Args:
        where: what errors call it.
        file, nbytes, mtime_ns: as in `ShardFile`.
        table: the header, tensor name -> dtype, shape and data_offsets.
        begin: where the tensors begin in the file.

    Raises:
        LowRankError: an entry that cannot be, a hole, an overlap, another size.
    """
    spans = sorted((_span(where, name, entry), name) for name, entry in table.items())
    end = _check_no_holes(where, spans)
    if begin + end != nbytes:
        raise LowRankError(
            f"{where}: {nbytes} bytes, but its header of {len(table)} tensors asks for {begin + end}",
            hint=_COPY_AGAIN,
        )
    headers = (
        TensorHeader(name, table[name]["dtype"], tuple(table[name]["shape"]), file, stop - start, begin + start)
        for (start, stop), name in spans
    )
    return ShardFile(file, nbytes, mtime_ns, tuple(headers))


def _span(where: object, name: str, entry: Any) -> tuple[int, int]:
    """First and last + 1 byte of a tensor, checked against its dtype and shape."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, stop]} if (
            type(start) is type(stop) is int and 0 <= start <= stop
        ):
            pass
        case _:
            raise LowRankError(f"{where}: tensor {name} has no proper dtype, shape and data_offsets", hint=_COPY_AGAIN)
    if dtype not in DTYPE_BITS:
        raise LowRankError(
            f"{where}: tensor {name} has the unknown dtype {dtype!r}", hint="a newer safetensors may know it"
        )
    # Within 64 bits, as the library counts: a larger number could not even be printed.
    if not all(type(side) is int and 0 <= side < 2**63 for side in shape) or math.prod(shape) >= 2**63:
        raise LowRankError(f"{where}: tensor {name} has the shape {shape}", hint=_COPY_AGAIN)
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if 8 * (stop - start) != bits:
        raise LowRankError(
            f"{where}: tensor {name} ({dtype} {shape}) needs {math.ceil(bits / 8)} bytes, "
            f"its offsets {start}..{stop} hold {stop - start}",
            hint=_COPY_AGAIN,
        )
    return start, stop


def _check_no_holes(where: object, spans: list[tuple[tuple[int, int], str]]) -> int:
    """The last byte of the data; every tensor must start where the one before it stopped."""
    end = 0
    for (start, stop), name in spans:
        if start != end:
            what = "overlaps the tensor before it" if start < end else "leaves a hole before it"
            raise LowRankError(
                f"{where}: tensor {name} starts at byte {start}, expected {end}: it {what}", hint=_COPY_AGAIN
            )
        end = stop
    return end


def _parse_json(raw: bytes, path: str) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise LowRankError(f"{path}: the name {twice!r} occurs twice", hint=_COPY_AGAIN)
        return seen

    try:
        document = json.loads(raw.decode(), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise LowRankError(f"{path}: not valid JSON: {error}", hint=_COPY_AGAIN) from error
    if not isinstance(document, dict):
        raise LowRankError(f"{path}: a JSON object is expected, found {type(document).__name__}", hint=_COPY_AGAIN)
    return document


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
