"""One checkpoint trained with spectral decay, compressed by three methods to one size, beside a published table."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lowrank_kit.report.tables import markdown_table

sys.path.insert(0, str(Path(__file__).parents[1] / "compressibility"))
from compressibility_study import DENSE, results, steps

__all__ = ["TITLE", "pictures", "results", "steps", "tables"]

TITLE = "Beside a published table"
# arXiv 2610.11730, table 2: compression of the model, loss over the dense model's (3.1129 nats, 124M parameters).
PUBLISHED = {
    "plain": ("truncated SVD", 1.43, 0.0359),
    "scaled": ("ASVD", 1.45, 0.0286),
    "whiten": ("SVD-LLM", 1.42, 0.0196),
}


def tables(document: Mapping[str, Any]) -> str:
    """Compression and increase of the held-out loss, measured and published."""
    (optimizer,) = document["settings"]["optimizers"]
    rows = {row["method"]: row for row in document["rows"] if row["optimizer"] == optimizer}
    dense = rows.pop(DENSE)
    shown = []
    for method, row in rows.items():
        name, compression, increase = PUBLISHED[method]
        shown.append(
            {
                "method": f"`{method}`",
                "compression": f"{dense['parameters'] / row['parameters']:.2f}x",
                "held-out loss": f"{dense['domain loss']:.4f} to {row['domain loss']:.4f}",
                "increase": f"{row['domain loss'] - dense['domain loss']:+.4f}",
                "as published": f"{name}, {compression}x, {increase:+.4f}",
            }
            | {
                task: f"{dense[task]:.3f} to {row[task]:.3f} ±{row[f'{task} stderr']:.3f}"
                for task in document["settings"]["tasks"]["limits"]
                if task in row
            }
        )
    return markdown_table(shown)


def pictures(document: Mapping[str, Any]) -> dict[str, Figure]:
    """None: three points."""
    return {}
