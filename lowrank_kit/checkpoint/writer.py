"""Write a checkpoint shard by shard, with every byte known beforehand."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowrank_kit.checkpoint.headers import DTYPE_BITS, INDEX_FILE, SINGLE_FILE, TensorHeader
from lowrank_kit.checkpoint.reading import described
from lowrank_kit.report.files import new_file, write_text

METADATA = {"format": "pt"}
_DIGEST = "sha256"  # key of the metadata, in files of a work folder
# What transformers' save_pretrained takes.
MAX_SHARD_BYTES = 5 * 10**9
# From last to first in a file: the order of `Dtype` in safetensors/src/tensor.rs, which sorts by it and then by name.
DTYPE_ORDER = (
    *("BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    *("I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64"),
)


@dataclass(frozen=True)
class Shard:
    """One file of a checkpoint to be written.

    Args:
        file: its name.
        headers: its tensors.
        metadata: of the file.
    """

    file: str
    headers: tuple[TensorHeader, ...]
    metadata: Mapping[str, str] = field(default_factory=lambda: METADATA)

    @property
    def nbytes(self) -> int:
        """Size of the file, header and all."""
        return max((header.offset + header.nbytes for header in self.headers), default=shard_bytes(()))


# (name, dtype as safetensors says it, shape)
TensorSpec = tuple[str, str, tuple[int, ...]]


def plan_shards(groups: Iterable[Sequence[TensorSpec]], *, max_shard_bytes: int = MAX_SHARD_BYTES) -> list[Shard]:
    """Spread tensors over files, in order.

    Args:
        groups: tensors that belong together and go into the same file, as the factors of a matrix.
        max_shard_bytes: most bytes of tensors in a file; a single larger group has a file of its own.

    Returns:
        The files, named as transformers names them.
    """
    files: list[list[TensorSpec]] = [[]]
    filled = 0
    for group in groups:
        nbytes = sum(tensor_bytes(dtype, shape) for _, dtype, shape in group)
        if files[-1] and filled + nbytes > max_shard_bytes:
            files.append([])
            filled = 0
        files[-1] += group
        filled += nbytes
    if len(files) == 1:
        names = [SINGLE_FILE]
    else:
        names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    return [Shard(file, _placed(file, specs)) for file, specs in zip(names, files, strict=True)]


def _placed(file: str, specs: Sequence[TensorSpec], metadata: Mapping[str, str] = METADATA) -> tuple[TensorHeader, ...]:
    """Headers in the order of the specs, at the places in the file that `save_file` would give them."""
    headers = [TensorHeader(name, d, shape, file, tensor_bytes(d, shape), 0) for name, d, shape in specs]
    offset = len(file_header(headers, metadata))
    offsets = {}
    for header in _in_file_order(headers):
        offsets[header.name] = offset
        offset += header.nbytes
    return tuple(replace(header, offset=offsets[header.name]) for header in headers)


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def shard_bytes(headers: Sequence[TensorHeader], metadata: Mapping[str, str] = METADATA) -> int:
    """Size of the safetensors file that `save_file` makes of these tensors."""
    return len(file_header(headers, metadata)) + sum(header.nbytes for header in headers)


def file_header(headers: Iterable[TensorHeader], metadata: Mapping[str, str] = METADATA) -> bytes:
    """What the safetensors file that `save_file` makes of these tensors begins with.

    Eight bytes of length and a compact JSON object padded with spaces to a multiple of eight.
    """
    document: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for header in _in_file_order(headers):
        document[header.name] = {
            "dtype": header.dtype,
            "shape": list(header.shape),
            "data_offsets": [offset, offset + header.nbytes],
        }
        offset += header.nbytes
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _in_file_order(headers: Iterable[TensorHeader]) -> list[TensorHeader]:
    return sorted(headers, key=lambda header: (-DTYPE_ORDER.index(header.dtype), header.name))


def write_shards(folder: Path, shards: Sequence[Shard], fill: Callable[[Shard], Iterable[tuple[str, Tensor]]]) -> None:
    """Write the shards one after the other, then the index if there are several.

    Args:
        folder: an existing folder.
        shards: from `plan_shards`.
        fill: gives the tensors of a shard, see `write_shard`.

    Raises:
        LowRankError: the disk is full.
    """
    for shard in shards:
        write_shard(folder, shard, fill(shard))
    write_index(folder, shards)


def write_shard(folder: Path, shard: Shard, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write one file, byte for byte as `save_file` would; it takes its name when it is whole and on the disk.

    Args:
        folder: an existing folder.
        shard: from `plan_shards`.
        tensors: names and tensors in any order, on any device. Each is written and let go before the next is asked for.

    Raises:
        ValueError: a tensor is missing, given twice, not planned, or of another dtype or shape than planned.
        LowRankError: the disk is full.
    """
    path = folder / shard.file
    planned = {header.name: header for header in shard.headers}
    missing = dict(planned)
    with new_file(path, shard.nbytes) as stream:
        stream.write(file_header(shard.headers, shard.metadata))
        for name, tensor in tensors:
            if name not in missing:
                raise ValueError(f"{path}: tensor {name} {'came twice' if name in planned else 'is not planned'}")
            header = missing.pop(name)
            if described(tensor) != (header.dtype, header.shape):
                raise ValueError(
                    f"{path}: tensor {name} is {described(tensor)}, planned was {(header.dtype, header.shape)}"
                )
            stream.seek(header.offset)
            stream.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del tensor  # before the next one is made
        if missing:
            raise ValueError(f"{path}: {len(missing)} of {len(planned)} tensors are missing, first {min(missing)}")


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Write the index that says which tensor is in which file; none for a single file."""
    if len(shards) < 2:
        return
    index = {
        "metadata": {"total_size": sum(h.nbytes for shard in shards for h in shard.headers)},
        "weight_map": {h.name: shard.file for shard in shards for h in shard.headers},
    }
    write_text(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = METADATA) -> None:
    """Write a safetensors file with what is to be known of its tensors; it takes its name when it is whole.

    Raises:
        LowRankError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    specs = [(name, *described(tensor)) for name, tensor in tensors.items()]
    metadata = {**metadata, _DIGEST: _digest(metadata, tensors.items())}
    shard = Shard(path.name, _placed(path.name, specs, metadata), metadata)
    write_shard(path.parent, shard, tensors.items())


def is_damaged(path: Path) -> bool:
    """Whether a file that `write_tensors` wrote is no longer what was written. All of it is read."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 (no mapping)
            metadata = dict(file.metadata() or {})
            return metadata.pop(_DIGEST, "") != _digest(metadata, tensors)
    except SafetensorError:
        return True


def _digest(metadata: Mapping[str, str], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of all there is, in whatever order it comes."""
    parts = [f"{key} {value}" for key, value in metadata.items()]
    for name, tensor in tensors:
        content = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data
        parts.append(f"{name} {described(tensor)} {hashlib.sha256(content).hexdigest()}")
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()
