"""What a serving engine cannot take of a compressed folder: one clear error each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowrank_kit.checkpoint.quantizer import LowRankConfig
from lowrank_kit.errors import UsageError
from lowrank_kit.layers import INT8, STACKED

_EXPORT = "lowrank export FOLDER --to dense -o DENSE, which any engine takes"


def check_matrices(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The matrices of a `quantization_config`.

    Raises:
        LowRankError: a newer format version, an unknown form or a rank below 1.
        UsageError: experts of low rank, or 8-bit codes.
    """
    matrices = LowRankConfig(**config).matrices
    stacked = [name for name, entry in matrices.items() if entry["form"] == STACKED]
    if stacked:
        raise UsageError(f"{stacked[0]}: experts of low rank are not for this engine", hint=_EXPORT)
    codes = [name for name, entry in matrices.items() if entry["form"].endswith(INT8)]
    if codes:
        raise UsageError(f"{codes[0]}: factors of 8-bit codes are not for this engine", hint=_EXPORT)
    return {name: {"rank": entry["rank"], "form": entry["form"]} for name, entry in matrices.items()}


def refuse_sharded(name: str, here: tuple[int, int], whole: tuple[int, int]) -> None:
    """Refuse a layer of which a process has a part: ranks are not split.

    Args:
        name: of the layer.
        here: inputs and outputs in this process.
        whole: of the layer.

    Raises:
        UsageError: they differ.
    """
    if here != whole:
        raise UsageError(
            f"{name}: {here[1]} x {here[0]} of {whole[1]} x {whole[0]} in this process: matrices of low rank are not "
            "split over devices",
            hint=f"--tensor-parallel-size 1; or {_EXPORT}",
        )


def refuse_head(name: str, matrices: Mapping[str, Any]) -> None:
    """Refuse a factorized head or embedding, which the engine looks rows up in.

    Raises:
        UsageError: it is one.
    """
    if name in matrices:
        raise UsageError(f"{name} is factorized: a head of low rank is not for this engine", hint=_EXPORT)
