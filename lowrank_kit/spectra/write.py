"""Spectra as files: JSON, CSV and pictures, for one model or two side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_kit.report.files import new_folder, write_csv, write_json, write_png
from lowrank_kit.report.plots import decay_bands_plot, decay_plot, place_means, places_plot
from lowrank_kit.spectra.measure import Spectra

EFFECTIVE_RANK = r"$e^H /\,\min(m, n)$, $H$ the entropy of $\sigma / \Sigma\sigma$"


def write_spectra(output: Path, models: Mapping[str, Spectra], document: Mapping[str, Any]) -> None:
    """Fill a new folder: spectra.json, spectra.csv, and for each model a decay picture and a heat map.

    Args:
        output: folder to make; appears whole or not at all.
        models: short name -> spectra, one or two.
        document: what goes into spectra.json; the singular values are added to it.

    Raises:
        UsageError: the folder is not empty.
    """
    values = {
        name: {row.name: row.singular_values.tolist() for row in spectra.rows} for name, spectra in models.items()
    }
    with new_folder(output) as folder:
        write_json(folder / "spectra.json", {**document, "singular_values": values})
        rows = [{"model": name, **row.record()} for name, spectra in models.items() for row in spectra.rows]
        write_csv(folder / "spectra.csv", rows)
        for index, (name, spectra) in enumerate(models.items(), 1):
            suffix = "" if len(models) == 1 else f"-{index}"
            write_png(folder / f"decay{suffix}.png", decay_plot(_curves(spectra), f"Singular values of {name}"))
            write_png(folder / f"heatmap{suffix}.png", _heatmap(f"Effective rank of {name}", _shares(spectra)))
        if len(models) == 2:
            _write_comparison(folder, models)


def _write_comparison(folder: Path, models: Mapping[str, Spectra]) -> None:
    bands = {
        name: {role: [values for _, values in lines] for role, lines in _curves(spectra).items()}
        for name, spectra in models.items()
    }
    first, second = models
    write_png(folder / "decay.png", decay_bands_plot(bands, f"Singular values of {first} and {second}"))
    before, after = (_shares(spectra) for spectra in models.values())
    difference = {place: after[place] - before[place] for place in before if place in after}
    figure = _heatmap(f"Effective rank of {second} less that of {first}", difference, diverging=True)
    write_png(folder / "heatmap.png", figure)


def _curves(spectra: Spectra) -> dict[str, list[tuple[int | None, np.ndarray]]]:
    """Role -> (block, singular values) of its matrices."""
    curves: dict[str, list[tuple[int | None, np.ndarray]]] = defaultdict(list)
    for row in spectra.rows:
        curves[row.role].append((row.block, row.singular_values))
    return dict(curves)


def _shares(spectra: Spectra) -> dict[tuple[str, str], float]:
    """(role, block) -> effective rank as a share of min(m, n), the mean over experts."""
    return place_means((row.role, row.block, row.share("effective_rank")) for row in spectra.rows)


def _heatmap(title: str, shares: Mapping[tuple[str, str], float], *, diverging: bool = False) -> Any:
    limits = None if diverging else (0.0, 1.0)
    return places_plot(shares, title=title, label=EFFECTIVE_RANK, limits=limits, diverging=diverging)
