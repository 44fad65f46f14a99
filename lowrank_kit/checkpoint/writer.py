"""Write a checkpoint shard by shard, with every byte known beforehand."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lowrank_kit.checkpoint.headers import DTYPE_BITS, INDEX_FILE, SINGLE_FILE, TensorHeader

METADATA = {"format": "pt"}
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
    """

    file: str
    headers: tuple[TensorHeader, ...]

    @property
    def nbytes(self) -> int:
        """Size of the file, header and all."""
        return shard_bytes(self.headers)


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
    return [
        Shard(file, tuple(TensorHeader(n, d, shape, file, tensor_bytes(d, shape)) for n, d, shape in specs))
        for file, specs in zip(names, files, strict=True)
    ]


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def shard_bytes(headers: Iterable[TensorHeader]) -> int:
    """Size of the safetensors file that `save_file` makes of these tensors.

    Eight bytes of length, a compact JSON header padded with spaces to a multiple of eight, the tensors. Their order
    counts, for the number of digits of the offsets in the header.
    """
    ordered = sorted(headers, key=lambda h: (-DTYPE_ORDER.index(h.dtype), h.name))
    document: dict[str, object] = {"__metadata__": METADATA}
    offset = 0
    for header in ordered:
        document[header.name] = {
            "dtype": header.dtype,
            "shape": list(header.shape),
            "data_offsets": [offset, offset + header.nbytes],
        }
        offset += header.nbytes
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False)
    return 8 + -(-len(text.encode()) // 8) * 8 + offset


def write_shards(folder: Path, shards: list[Shard], fill: Callable[[Shard], dict[str, Tensor]]) -> None:
    """Write the shards one after the other, then the index if there are several.

    Args:
        folder: an existing folder.
        shards: from `plan_shards`.
        fill: gives the tensors of a shard by name; they are dropped once written.
    """
    for shard in shards:
        tensors = {name: tensor.contiguous() for name, tensor in fill(shard).items()}
        save_file(tensors, folder / shard.file, metadata=METADATA)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(h.nbytes for shard in shards for h in shard.headers)},
            "weight_map": {h.name: shard.file for shard in shards for h in shard.headers},
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file that is there whole, also after a crash of the machine, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({k: t.contiguous() for k, t in tensors.items()}, temporary, metadata={**METADATA, **(metadata or {})})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
