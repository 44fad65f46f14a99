"""A plain Hugging Face folder of a compressed model: factors multiplied, one matrix in memory at a time.

Shape legend: E experts, O out, I in.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from lowrank_kit.checkpoint.beside import copy_beside
from lowrank_kit.checkpoint.card import dense_card
from lowrank_kit.checkpoint.folder import CONFIG_FILE, REPORT_FILE, Checkpoint
from lowrank_kit.checkpoint.reading import TORCH_DTYPES
from lowrank_kit.checkpoint.stored import Source, StoredMatrix, sources_by_parameter
from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.layers import STACKED
from lowrank_kit.matrices import find_matrices
from lowrank_kit.report.files import write_text
from lowrank_kit.serving.exports.base import Exported, Kind, Request
from lowrank_kit.serving.exports.tensors import WORDS, Output, write_outputs


def write_dense(request: Request, folder: Path) -> Exported:
    """Write weights, config and what lies beside them.

    Raises:
        UsageError: the model is dense.
        LowRankError: factors in several number formats, NaN or Inf, a full disk.
    """
    checkpoint = request.checkpoint
    compressed = [stored for stored in checkpoint.matrices() if stored.compressed]
    if not compressed:
        raise UsageError(
            f"{request.model} is dense already: any tool takes it as it is",
            hint=f"to make it smaller: lowrank compress {request.model} --keep 0.5 -o SMALL",
        )
    outputs = _outputs(request)
    nbytes = write_outputs(request, folder, outputs)
    copy_beside(checkpoint.path, folder)
    write_text(folder / CONFIG_FILE, json.dumps(_config(request), indent=2) + "\n")
    if (report := checkpoint.path / REPORT_FILE).is_file():
        # So that no score is made on text that the compression has read.
        write_text(folder / REPORT_FILE, report.read_text())
    before = checkpoint.nbytes
    return Exported(
        card=dense_card(base_model=request.name, reported=report.is_file(), bytes_before=before, nbytes=nbytes),
        result={"bytes_before": before, "bytes_after": nbytes},
        matrices=[_row(checkpoint, stored) for stored in compressed],
        notes=[
            f"the files grow again, to {nbytes / before:.2f} times the bytes: use the compressed folder where a tool "
            "can read it"
        ],
    )


def _row(checkpoint: Checkpoint, stored: StoredMatrix) -> dict[str, object]:
    matrix, rank = stored.matrix, checkpoint.rank(stored)
    return {"name": matrix.name, "role": matrix.role, "out": matrix.shape[0], "in": matrix.shape[1], "rank": rank}


def _config(request: Request) -> dict[str, object]:
    """config.json of a plain model; code that came with the compressed one is not copied."""
    config = {k: v for k, v in request.checkpoint.config.items() if k not in ("quantization_config", "auto_map")}
    if request.settings.dtype != "auto":
        config.pop("torch_dtype", None)  # the name before transformers 5
        config["dtype"] = request.settings.dtype
    return config


def _outputs(request: Request) -> list[Output]:
    """Every tensor of the dense folder, in the order in which what it is made of lies on disk."""
    checkpoint, wanted = request.checkpoint, WORDS.get(request.settings.dtype)
    made: dict[str, list[Output]] = {}
    dropped: set[str] = set()
    renamed: dict[str, str] = {}
    compressed = [stored for stored in checkpoint.matrices() if stored.compressed]
    model = checkpoint.meta_model()
    transposed = {matrix.parameter for matrix in find_matrices(model) if matrix.transposed}
    on_disk = sources_by_parameter(model, checkpoint.headers)
    for tensors, group in groupby(compressed, key=lambda stored: stored.tensors):
        matrices, dtype = list(group), wanted or _one_dtype(checkpoint, tensors)
        first, path = matrices[0].matrix, matrices[0].disk_path
        if matrices[0].form == STACKED:
            outputs = _of_experts(matrices, on_disk[first.parameter], dtype)
        else:
            outputs = [_of_matrix(matrices[0], dtype, transposed=first.parameter in transposed)]
            renamed[f"{path}.B.bias"] = f"{path}.bias"
        made |= dict.fromkeys(tensors, outputs)
        dropped.update(source.header.name for source in on_disk[first.parameter])  # the sentinels
    found: dict[str, Output] = {}
    for header in checkpoint.headers.values():
        if header.name in made:
            found |= {out.name: out for out in made[header.name]}
        elif header.name not in dropped:
            dtype = wanted if wanted and header.dtype in WORDS.values() else header.dtype
            name = renamed.get(header.name, header.name)
            found[name] = Output(name, dtype or header.dtype, header.shape, (header.name,))
    return list(found.values())


def _one_dtype(checkpoint: Checkpoint, tensors: tuple[str, ...]) -> str:
    """Number format of the factors of a matrix."""
    dtypes = {name: checkpoint.headers[name].dtype for name in tensors}
    found = {name: dtype for name, dtype in dtypes.items() if not dtype.startswith("I")}  # no codes and no indices
    if len(set(found.values())) > 1:
        raise LowRankError(
            f"{checkpoint.path}: factors of one matrix in several number formats: "
            + ", ".join(f"{name} {dtype}" for name, dtype in found.items()),
            hint="say which one is wanted: --dtype float32, or bfloat16",
        )
    return next(iter(found.values()))


def _of_matrix(stored: StoredMatrix, dtype: str, *, transposed: bool) -> Output:
    """The weight of a layer, [in, out] if the layer of the dense model is `transposed`."""

    def make(*tensors: Tensor) -> Tensor:
        W = stored.weight(*tensors)
        return W.mT if transposed else W

    shape = stored.matrix.shape[::-1] if transposed else stored.matrix.shape
    return Output(f"{stored.disk_path}.weight", dtype, shape, stored.tensors, make)


def _of_experts(experts: list[StoredMatrix], on_disk: list[Source], dtype: str) -> list[Output]:
    """The weights of all experts as a dense folder of their family has them.

    Args:
        experts: with the same factors.
        on_disk: the sentinels of these.
        dtype: to be stored.
    """
    first = experts[0]
    if on_disk[0].expert is not None:  # each apart
        return [
            Output(f"{one.matrix.name}.weight", dtype, one.matrix.shape, one.tensors, one.weight) for one in experts
        ]

    def stack(*tensors: Tensor) -> Tensor:
        stack_EOI = torch.empty(len(experts), *first.matrix.shape, dtype=TORCH_DTYPES[dtype])
        for W_OI, one in zip(stack_EOI, experts, strict=True):
            W_OI.copy_(one.weight(*tensors))
        return stack_EOI

    return [Output(on_disk[0].header.name, dtype, (len(experts), *first.matrix.shape), first.tensors, stack)]


KIND = Kind(write=write_dense)
