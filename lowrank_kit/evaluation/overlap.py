"""No score on text that the model was compressed with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from lowrank_kit.checkpoint.folder import REPORT_FILE, Checkpoint
from lowrank_kit.data.corpus import split_documents
from lowrank_kit.data.sources import Document
from lowrank_kit.errors import LowRankError, UsageError


def refuse_used_text(checkpoint: Checkpoint, documents: Sequence[Document]) -> None:
    """Refuse documents that the compression of a checkpoint has read, by what its compression.json says.

    They are compared whole, and as a compression of these documents would have cut them: a single file is split in
    two, and capped by --max-bytes. Not seen is text that is the same in part only, as in another edition of a file,
    and what a model was trained on. A folder without compression.json, or with one that names no documents, passes.

    Args:
        checkpoint: dense or compressed.
        documents: to be scored, whole or held out.

    Raises:
        UsageError: how many of them it has read.
        LowRankError: compression.json is damaged.
    """
    report = _report(checkpoint)
    used = set((report.get("calibration") or {}).get("documents", ()))
    if not used or not documents:
        return
    candidates = list(documents)
    max_bytes = (report.get("settings") or {}).get("max_bytes")
    # Where nothing is left to train on, nothing can have been read of it.
    with suppress(UsageError):
        candidates += split_documents(documents, "", max_bytes=max_bytes).train
    names = {document.name for document in candidates if document.digest in used}
    if names:
        raise UsageError(
            f"{checkpoint.path} was compressed with {len(names)} of the {len(documents)} documents of this text "
            f"({min(names)}{', ...' if len(names) > 1 else ''}): scores on them say nothing of other text",
            hint="--part heldout, or another text",
        )


def _report(checkpoint: Checkpoint) -> dict[str, Any]:
    path = checkpoint.path / REPORT_FILE
    if not path.is_file():
        return {}
    try:
        report = json.loads(path.read_text())
    except ValueError as error:
        raise LowRankError(f"{path} is damaged: {error}", hint="compress the model again") from error
    return report if isinstance(report, dict) else {}
