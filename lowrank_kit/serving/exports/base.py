"""What every kind of export is given and gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.writer import MAX_SHARD_BYTES


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What a user may say of an export.

    Args:
        to: kind, one of `KINDS`.
        base: folder or hub name of the dense model that adapters are for.
        rank: of adapters.
        dtype: number format of what is written; "auto" is that of the source, of a graph float32.
        max_shard_bytes: most bytes of tensors in a file.
    """

    to: str = "dense"
    base: str | None = None
    rank: int | None = None
    dtype: str = "auto"
    max_shard_bytes: int = MAX_SHARD_BYTES


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be exported, and how.

    Args:
        model: as the user named it.
        name: hub name or folder name.
        checkpoint: opened; config.json and tensors agree.
        settings: of the export.
        device: for products and decompositions; one that has float64.
        progress: whether a bar is drawn.
    """

    model: str
    name: str
    checkpoint: Checkpoint
    settings: ExportSettings
    device: torch.device
    progress: bool = False

    @property
    def no_bar(self) -> bool | None:
        """As tqdm's `disable`: None is no bar where nobody looks."""
        return None if self.progress else True


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What a kind says of what it has written.

    Args:
        card: text of the model card.
        result: what there is to know of the whole: key -> number or word.
        matrices: a row for each matrix that is told of.
        notes: sentences that the user should know.
        warnings: of what the user may not expect.
    """

    card: str
    result: dict[str, Any] = field(default_factory=dict)
    matrices: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of export.

    Args:
        write: fills a new folder.
        options: names of the settings that are for this kind.
        check: refuses what can be refused before any work, as a package that is not installed.
    """

    write: Callable[[Request, Path], Exported]
    options: tuple[str, ...] = ()
    check: Callable[[ExportSettings], None] = lambda settings: None
