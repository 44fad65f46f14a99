"""Tensors of a folder that is made of another, one or one matrix in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from lowrank_kit.checkpoint.folder import refuse_non_finite
from lowrank_kit.checkpoint.reading import TORCH_DTYPES, non_finite
from lowrank_kit.checkpoint.writer import Shard, plan_shards, tensor_bytes, write_shards
from lowrank_kit.errors import LowRankError
from lowrank_kit.serving.exports.base import Request

# Names of `--dtype` -> the format's.
WORDS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Output:
    """A tensor of the new folder.

    Args:
        name, dtype, shape: as the format says them.
        sources: tensors on disk that it is made of.
        make: makes it of these; None for one that stays as it is.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    make: Callable[..., Tensor] | None = None


def write_outputs(request: Request, folder: Path, outputs: list[Output]) -> int:
    """Write the tensors, in shards; bytes of the files.

    Raises:
        LowRankError: NaN or Inf in what is read, a number too large for what is written, a full disk.
    """
    shards = plan_shards(
        ([(out.name, out.dtype, out.shape)] for out in outputs), max_shard_bytes=request.settings.max_shard_bytes
    )
    nbytes = sum(shard.nbytes for shard in shards)
    with tqdm(total=nbytes, desc="export", unit="B", unit_scale=True, disable=request.no_bar) as bar:
        write_shards(folder, shards, _filler(request, outputs, bar.update))
    return nbytes


def _filler(
    request: Request, outputs: list[Output], told: Callable[[int], object]
) -> Callable[[Shard], Iterator[tuple[str, Tensor]]]:
    """Gives the tensors of a shard, one at a time."""
    checkpoint = request.checkpoint
    by_name = {out.name: out for out in outputs}

    def fill(shard: Shard) -> Iterator[tuple[str, Tensor]]:
        wanted = [by_name[header.name] for header in shard.headers]
        for sources, group in groupby(wanted, key=lambda out: out.sources):
            read = dict(checkpoint.tensors(sources))
            for name, tensor in read.items():
                refuse_non_finite(checkpoint, name, tensor)
            for out in group:
                tensors = [read[name].to(request.device) if out.make else read[name] for name in sources]
                made = out.make(*tensors) if out.make else tensors[0]
                made = made.to(TORCH_DTYPES[out.dtype])
                _refuse_overflow(request, out, made)
                yield out.name, made
                told(tensor_bytes(out.dtype, out.shape))

    return fill


def _refuse_overflow(request: Request, out: Output, tensor: Tensor) -> None:
    """What was read is finite, but may be too large for the number format that is written."""
    if count := non_finite(tensor):
        raise LowRankError(
            f"{request.model}: {count:,} of {tensor.numel():,} numbers of {out.name} are too large for {out.dtype}",
            hint="--dtype float32, or bfloat16",
        )
