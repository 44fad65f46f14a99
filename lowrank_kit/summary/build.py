"""The page of all that was found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank_kit.errors import LowRankError
from lowrank_kit.report.page import Fold, Section, Table, make_page
from lowrank_kit.summary.compression import compression_section
from lowrank_kit.summary.experiments import experiments_section
from lowrank_kit.summary.find import Found
from lowrank_kit.summary.models import Models, overview
from lowrank_kit.summary.scaling import scaling_section
from lowrank_kit.summary.spectra import spectra_section
from lowrank_kit.summary.training import training_section

# Kinds of documents -> the section they go into, in order.
SECTIONS: Mapping[tuple[str, ...], Callable[[Sequence[Found]], Section]] = {
    ("experiment",): experiments_section,
    ("run",): training_section,
    ("spectra",): spectra_section,
    ("compression",): compression_section,
    ("check", "sweep"): scaling_section,
}
# Long, and shown elsewhere on the page.
_SHOWN = {"models", "matrices", "singular_values", "checks", "cells", "rows", "environment", "reasons", "documents"}


def build_page(documents: Sequence[Found], title: str = "lowrank report") -> str:
    """One HTML page.

    Args:
        documents: of `find_documents`.
        title: of the page.

    Raises:
        LowRankError: a document that lacks what its kind has.
    """
    kinds = dict.fromkeys(one.kind for one in documents)
    counts = ", ".join(f"{sum(one.kind == kind for one in documents)} of {kind}" for kind in kinds)
    sections = []
    if parts := overview(Models(documents)):
        sections.append(Section("Models", parts))
    for of, make in SECTIONS.items():
        if found := [one for one in documents if one.kind in of]:
            sections.append(_made(make, found))
    sections.append(Section("Provenance", [_provenance(one) for one in documents]))
    return make_page(title, f"{len(documents)} documents: {counts}.", sections)


def _made(make: Callable[[Sequence[Found]], Section], found: Sequence[Found]) -> Section:
    return make(found)


def _provenance(one: Found) -> Fold:
    """Versions, machine, settings and hashes of a document, folded."""
    environment = one.document.get("environment") or {}
    rest = {key: value for key, value in one.document.items() if key not in _SHOWN}
    rows = [{"what": key, "value": value} for key, value in _flat({"file sha256": one.sha256, **environment})]
    settings = [{"what": key, "value": value} for key, value in _flat(rest)]
    folds = [Table(rows, caption="File and environment"), Table(settings, caption="Settings and hashes")]
    return Fold(one.shown, folds)


def _flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as names with dots; lists in one line, cut short."""
    if isinstance(value, Mapping):
        dotted = f"{name}." if name else ""
        return [row for key, below in value.items() if key not in _SHOWN for row in _flat(below, f"{dotted}{key}")]
    if value is None or value == [] or value == "":
        return []
    if isinstance(value, list):
        text = ", ".join(map(str, value))
        value = text if len(text) <= 300 else f"{text[:300]} ... ({len(value):,})"
    return [(name, str(value))]
