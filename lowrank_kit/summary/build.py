"""The page of all that was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lowrank_kit.report.page import Fold, Part, Section, Table, make_page
from lowrank_kit.summary.compression import compression_parts
from lowrank_kit.summary.experiments import experiment_parts, experiment_title
from lowrank_kit.summary.find import Found, reading
from lowrank_kit.summary.models import Models, overview
from lowrank_kit.summary.scaling import scaling_parts
from lowrank_kit.summary.spectra import spectra_parts
from lowrank_kit.summary.speed import speed_parts
from lowrank_kit.summary.training import training_section

# Kind of documents -> heading of their section, and what stands in it for each.
SECTIONS: Mapping[str, tuple[str, Callable[[Found], list[Part]]]] = {
    "experiment": ("Experiments", experiment_parts),
    "spectra": ("Spectra", spectra_parts),
    "compression": ("Compression", compression_parts),
    "bench": ("Speed", speed_parts),
    "check": ("Scale: checks", scaling_parts),
    "sweep": ("Scale: loss against the learning rate", scaling_parts),
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
    counts = Counter(one.kind for one in documents)
    sections = []
    if parts := overview(Models(documents)):
        sections.append(Section("Models", parts))
    if runs := [one for one in documents if one.kind == "run"]:
        sections.append(training_section(runs))
    sections += [
        _section(kind, found) for kind in SECTIONS if (found := [one for one in documents if one.kind == kind])
    ]
    sections.append(Section("Provenance", [_provenance(one) for one in documents]))
    lead = ", ".join(f"{kind} ({count})" for kind, count in counts.items())
    return make_page(title, f"Made from {len(documents)} documents: {lead}.", sections)


def _section(kind: str, documents: Sequence[Found]) -> Section:
    """A section below for each document."""
    title, parts = SECTIONS[kind]
    below = []
    for one in documents:
        with reading(one):
            below.append(Section(experiment_title(one) if kind == "experiment" else one.name, parts(one)))
    return Section(title, (), below)


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
