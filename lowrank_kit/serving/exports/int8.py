"""A compressed model with factors of 8-bit codes: `from_pretrained` takes it where lowrank-kit is imported.

A model has one method of quantization in transformers, which is its loader: with torchao's a folder would no longer be
a compressed one. So the codes are those of this format's own layers, symmetric and with one scale for each row, as of
torchao's `Int8WeightOnlyConfig`, but from -127 to 127, with 127 for the largest number, where it has 127.5.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from lowrank_kit.checkpoint.beside import copy_beside
from lowrank_kit.checkpoint.card import int8_card
from lowrank_kit.checkpoint.folder import CONFIG_FILE, REPORT_FILE, Checkpoint, refuse_non_finite
from lowrank_kit.checkpoint.parts import COMPRESSED_LEAVES
from lowrank_kit.checkpoint.quantizer import QUANT_METHOD, needed_version
from lowrank_kit.checkpoint.reading import TORCH_DTYPES
from lowrank_kit.checkpoint.stored import StoredMatrix
from lowrank_kit.errors import UsageError
from lowrank_kit.layers import INT8, LAYERS, STACKED
from lowrank_kit.layers.int8 import to_codes
from lowrank_kit.linalg.factor import weighted_error
from lowrank_kit.report.files import write_text
from lowrank_kit.serving.exports.base import Exported, Kind, Request
from lowrank_kit.serving.exports.tensors import WORDS, Output, write_outputs


def write_int8(request: Request, folder: Path) -> Exported:
    """Write codes and scales, config and what lies beside them.

    Raises:
        UsageError: no matrix is stored as factors of numbers.
        LowRankError: NaN or Inf, a full disk.
    """
    checkpoint = request.checkpoint
    matrices = [stored for stored in checkpoint.matrices() if stored.form in LAYERS]
    if not matrices and any(stored.form.endswith(INT8) for stored in checkpoint.matrices()):
        raise UsageError(f"{request.model} has factors of 8-bit codes already", hint="use it as it is")
    if not matrices:
        raise UsageError(
            f"{request.model} has no matrix that is stored as factors: only these become codes",
            hint=f"lowrank compress {request.model} --keep 0.5 -o SMALL",
        )
    rows = [_row(request, stored) for stored in matrices]
    nbytes, before = write_outputs(request, folder, _outputs(request, matrices)), checkpoint.nbytes
    copy_beside(checkpoint.path, folder)
    write_text(folder / CONFIG_FILE, json.dumps(_config(request), indent=2) + "\n")
    if (report := checkpoint.path / REPORT_FILE).is_file():
        write_text(folder / REPORT_FILE, report.read_text())  # so that no score is made on text that it was made with
    worst = max(row["relative_error"] for row in rows)
    return Exported(
        card=int8_card(base_model=request.name, bytes_before=before, nbytes=nbytes, worst=worst),
        result={"bytes_before": before, "bytes_after": nbytes, "largest_error": worst},
        matrices=rows,
        notes=[
            f"{nbytes / before:.2f} times the bytes; matrices differ by {100 * worst:.2g} % at most, in norm",
            "weights are made of the codes at each call: less memory, and no less time",
            *_of_experts(checkpoint),
        ],
    )


def _of_experts(checkpoint: Checkpoint) -> list[str]:
    stacks = {stored.tensors for stored in checkpoint.matrices() if stored.form == STACKED}
    return [f"factors of experts stay as they are: {len(stacks)} stacks"] if stacks else []


def _row(request: Request, stored: StoredMatrix) -> dict[str, Any]:
    """How far a matrix of codes is from the one of numbers."""
    read = dict(request.checkpoint.tensors(stored.tensors))
    for name, tensor in read.items():
        refuse_non_finite(request.checkpoint, name, tensor)
    tensors = [read[name].to(request.device) for name in stored.tensors]
    coded = list(tensors)
    for place, (name, tensor) in enumerate(zip(stored.tensors, tensors, strict=True)):
        if name.endswith(".weight"):
            codes, scale = to_codes(tensor, TORCH_DTYPES[_dtype(request, name)])
            coded[place] = codes.double() * scale.double()
    matrix = stored.matrix
    return {
        "name": matrix.name,
        "role": matrix.role,
        "out": matrix.shape[0],
        "in": matrix.shape[1],
        "rank": request.checkpoint.rank(stored),
        "relative_error": weighted_error(stored.weight(*tensors), stored.weight(*coded)),
    }


def _dtype(request: Request, name: str) -> str:
    """Of a tensor of numbers in the new folder."""
    dtype = request.checkpoint.headers[name].dtype
    return WORDS.get(request.settings.dtype, dtype) if dtype in WORDS.values() else dtype


def _outputs(request: Request, matrices: list[StoredMatrix]) -> list[Output]:
    factors = {name for stored in matrices for name in stored.tensors if name.endswith(".weight")}
    outputs = []
    for name, header in request.checkpoint.headers.items():
        dtype = _dtype(request, name)
        if name not in factors:
            outputs.append(Output(name, dtype, header.shape, (name,)))
            continue
        path = name.removesuffix(".weight")

        def codes(W: Tensor, dtype: str = dtype) -> Tensor:
            return to_codes(W, TORCH_DTYPES[dtype])[0]

        def scale(W: Tensor, dtype: str = dtype) -> Tensor:
            return to_codes(W, TORCH_DTYPES[dtype])[1]

        outputs.append(Output(f"{path}.codes", "I8", header.shape, (name,), codes))
        outputs.append(Output(f"{path}.scale", dtype, (header.shape[0], 1), (name,), scale))
    return outputs


def _config(request: Request) -> dict[str, Any]:
    config = dict(request.checkpoint.config)
    config.pop("auto_map", None)  # code of an older format
    entries = {
        name: entry | ({"form": f"{entry['form']}{INT8}"} if f"{entry['form']}{INT8}" in COMPRESSED_LEAVES else {})
        for name, entry in request.checkpoint.quantization().matrices.items()
    }
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "format_version": needed_version(entries),
        "matrices": entries,
    }
    if request.settings.dtype != "auto":
        config.pop("torch_dtype", None)
        config["dtype"] = request.settings.dtype
    return config


KIND = Kind(write=write_int8)
