"""Folders made once for many tests, and what is in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def once(root: Path, make: Callable[[str, Path], object]) -> Callable[[str], Path]:
    """`folder(name)`: what `make(name, folder)` makes under a root, the first time that it is asked for."""

    def folder(name: str) -> Path:
        if not (root / name).exists():
            make(name, root / name)
        return root / name

    return folder


def weights(folder: Path) -> dict[str, bytes]:
    """Safetensors file -> bytes."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def report_of(folder: Path) -> dict[str, Any]:
    """Of a compressed folder."""
    return dict(json.loads((folder / "compression.json").read_text()))
