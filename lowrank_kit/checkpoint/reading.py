"""Tensors by their place in a file, into memory of their own.

A file that is mapped, as safetensors does it, counts as resident memory as far as it has been read: in the end all 5 GB
of a shard, with one matrix in use.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lowrank_kit.checkpoint.headers import ShardFile, TensorHeader
from lowrank_kit.errors import LowRankError

# The words of the format that torch has a dtype for. It has none for six bits, and one for a pair of four.
TORCH_DTYPES = {
    "BOOL": torch.bool,
    "F4": torch.float4_e2m1fn_x2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
# Numbers that are looked at together, and bytes that are read together.
_CHUNK, _PIECE_BYTES = 2**20, 2**24
_WORDS = {dtype: word for word, dtype in TORCH_DTYPES.items()}


def described(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    """A tensor's dtype and shape as the format says them."""
    word, shape = _WORDS[tensor.dtype], tuple(tensor.shape)
    return word, (*shape[:-1], 2 * shape[-1]) if word == "F4" else shape


@contextmanager
def opened(path: Path, shard: ShardFile) -> Iterator[BinaryIO]:
    """The file of a shard, the one that its header was read from.

    Raises:
        LowRankError: it is gone, or has changed since.
    """
    if shard.mtime_ns is None:
        raise LowRankError(
            f"{path}: only its header was read, the weights are on the hub", hint="Checkpoint.open downloads them"
        )
    try:
        stream = path.open("rb", buffering=0)
    except OSError as error:
        raise LowRankError(
            f"{path}: cannot be read any more ({error.strerror})", hint="put the file back, or start again"
        ) from error
    with stream:
        yield stream


def read_tensor(stream: BinaryIO, path: Path, shard: ShardFile, header: TensorHeader) -> Tensor:
    """Read one tensor.

    Args:
        stream: from `opened`.
        path: of the file.
        shard: the file as it was.
        header: of the tensor.

    Raises:
        LowRankError: the file has changed since its header was read, ends too early, or torch has no such dtype.
    """
    if not _has_dtype(header):
        raise LowRankError(
            f"{path}: torch has no dtype for tensor {header.name}, {header.dtype} {list(header.shape)}",
            hint="use the model in a format of at least 8 bits",
        )
    raw = torch.empty(header.nbytes, dtype=torch.uint8)
    for _ in _read_pieces(stream, path, shard, header.offset, raw):
        pass
    return _as_tensor(raw, header)


def read_whole(path: Path, shard: ShardFile, seen: Callable[[str, Tensor], None], told: Callable[[int], object]) -> str:
    """Read a shard once, from beginning to end, one tensor in memory.

    Args:
        path, shard: the file, and as it was.
        seen: called with name and tensor.
        told: called with the number of bytes read since the last time.

    Returns:
        SHA-256 of the file.

    Raises:
        LowRankError: the file has changed since its header was read, or ends too early.
    """
    begin = shard.nbytes - sum(header.nbytes for header in shard.headers)
    # One for all: to have new pages made for each tensor takes as long as to read it.
    memory = torch.empty(max([begin, *(header.nbytes for header in shard.headers)]), dtype=torch.uint8)
    digest = hashlib.sha256()
    # Neither a read nor a digest holds Python's lock, so they go on at the same time.
    with opened(path, shard) as stream, ThreadPoolExecutor(1) as second:

        def read(offset: int, nbytes: int) -> Tensor:
            raw, waiting = memory[:nbytes], []
            for piece in _read_pieces(stream, path, shard, offset, raw):
                waiting.append(second.submit(digest.update, piece))
                told(len(piece))
            wait(waiting)
            return raw

        read(0, begin)
        for header in shard.headers:
            raw = read(header.offset, header.nbytes)
            if _has_dtype(header):
                seen(header.name, _as_tensor(raw, header))
        _refuse_changed(stream, path, shard)
    return digest.hexdigest()


def non_finite(tensor: Tensor) -> int:
    """How many of the numbers are NaN or Inf; a chunk at a time, for a mask of all would take as much memory again."""
    if not tensor.is_floating_point() or tensor.dtype == torch.float4_e2m1fn_x2:  # which has neither
        return 0
    count = 0
    for chunk in tensor.reshape(-1).split(_CHUNK):
        numbers = chunk.float() if chunk.itemsize == 1 else chunk
        # Quick where all is well: NaN and Inf are both seen in the two ends.
        if numbers.numel() and not all(end.isfinite() for end in numbers.aminmax()):
            count += int((~numbers.isfinite()).sum())
    return count


def _read_pieces(stream: BinaryIO, path: Path, shard: ShardFile, offset: int, raw: Tensor) -> Iterator[memoryview[int]]:
    """Fill `raw` with the bytes from an offset on, and give the pieces as they come."""
    _refuse_changed(stream, path, shard)
    view, done = raw.numpy().data, 0
    stream.seek(offset)
    while done < len(view):
        try:
            got = stream.readinto(view[done : done + _PIECE_BYTES])  # type: ignore[attr-defined]
        except OSError as error:
            raise LowRankError(f"{path}: cannot be read at byte {offset + done:,}: {error.strerror}") from error
        if not got:
            raise LowRankError(
                f"{path}: ends at byte {offset + done:,}, {offset + len(view):,} were expected",
                hint="the file was cut while it was read: download or copy it again",
            )
        yield view[done : done + got]
        done += got


def _has_dtype(header: TensorHeader) -> bool:
    pairs = header.dtype != "F4" or (header.shape != () and header.shape[-1] % 2 == 0)
    return header.dtype in TORCH_DTYPES and pairs


def _as_tensor(raw: Tensor, header: TensorHeader) -> Tensor:
    shape = (*header.shape[:-1], header.shape[-1] // 2) if header.dtype == "F4" else header.shape
    return raw.view(TORCH_DTYPES[header.dtype]).reshape(shape)


def _refuse_changed(stream: BinaryIO, path: Path, shard: ShardFile) -> None:
    now = os.fstat(stream.fileno())
    if (now.st_size, now.st_mtime_ns) == (shard.nbytes, shard.mtime_ns):
        return
    assert shard.mtime_ns is not None
    was = f"{shard.nbytes:,} bytes of {_moment(shard.mtime_ns)}"
    raise LowRankError(
        f"{path}: changed between plan and run: {was} then, {now.st_size:,} bytes of {_moment(now.st_mtime_ns)} now",
        hint="put the file back as it was (with its time), or start again",
    )


def _moment(mtime_ns: int) -> str:
    seconds, rest = divmod(mtime_ns, 10**9)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(seconds))}.{rest:09d}"
