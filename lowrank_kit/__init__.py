"""lowrank-kit: train causal language models that fold, fold the ones you have, and prove what it cost.

Importing this package registers the checkpoint format, so that `AutoModelForCausalLM.from_pretrained` loads
compressed folders.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lowrank_kit._registration import register_with_transformers

if TYPE_CHECKING:
    from lowrank_kit.compression.calibration import calibrate as calibrate
    from lowrank_kit.compression.run import compress as compress
    from lowrank_kit.compression.settings import CompressSettings as CompressSettings
    from lowrank_kit.layers.fused import fuse as fuse
    from lowrank_kit.layers.linear import LowRankLinear as LowRankLinear
    from lowrank_kit.layers.pivoted import PivotedLinear as PivotedLinear
    from lowrank_kit.matrices import find_matrices as find_matrices
    from lowrank_kit.optim.numuon import NuMuon as NuMuon
    from lowrank_kit.optim.routing import parameter_groups as parameter_groups
    from lowrank_kit.serving.export import export as export
    from lowrank_kit.serving.exports.base import ExportSettings as ExportSettings
    from lowrank_kit.training.run import train as train

__version__ = version("lowrank-kit")

# Public name -> where it lives, imported on first use: this package must import in milliseconds.
_PUBLIC = {
    "CompressSettings": "lowrank_kit.compression.settings",
    "ExportSettings": "lowrank_kit.serving.exports.base",
    "LowRankLinear": "lowrank_kit.layers.linear",
    "NuMuon": "lowrank_kit.optim.numuon",
    "PivotedLinear": "lowrank_kit.layers.pivoted",
    "calibrate": "lowrank_kit.compression.calibration",
    "compress": "lowrank_kit.compression.run",
    "export": "lowrank_kit.serving.export",
    "find_matrices": "lowrank_kit.matrices",
    "fuse": "lowrank_kit.layers.fused",
    "parameter_groups": "lowrank_kit.optim.routing",
    "train": "lowrank_kit.training.run",
}
__all__ = [
    "CompressSettings",
    "ExportSettings",
    "LowRankLinear",
    "NuMuon",
    "PivotedLinear",
    "calibrate",
    "compress",
    "export",
    "find_matrices",
    "fuse",
    "parameter_groups",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


register_with_transformers()
