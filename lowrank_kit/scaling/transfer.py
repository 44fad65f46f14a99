"""Does a learning rate tuned on the base serve wider and deeper models: losses over sizes, rates, rules and seeds.

The training itself is passed in. Losses go into one file, a cell being all rates of one size, rule and seed: a sweep
that was stopped goes on with the cells that the file lacks.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_kit.config import settings_difference
from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.report.files import write_json
from lowrank_kit.scaling.family import Size
from lowrank_kit.scaling.optimum import Optimum, Transfer, transfer

# Name of a rule -> depth rule of `MuP`, or None for the plain model with the base's settings.
RULES: dict[str, str | None] = {"mup": "k2", "k1": "k1", "sp": None}
MUP, CONTROLS = "mup", ("k1", "sp")


@dataclass(frozen=True)
class Cell:
    """All learning rates of one size, rule and seed."""

    size: Size
    rule: str
    seed: int


def shown(size: Size) -> str:
    """64 x 4 for width 64 and depth 4."""
    return f"{size.width} x {size.depth}"


TrainFunction = Callable[[Size, str, Sequence[float], int], Sequence[float]]


@dataclass(frozen=True)
class Grid:
    """What a sweep trains.

    Args:
        base: the size that rates are tuned on.
        widths: at the base's depth.
        depths: at the base's width, none below the base's.
        log2_rates: log2 of the learning rates, ascending, three at least.
        seeds: of weights and data order.
        rules: of `RULES`, mup among them.
        control_seeds: seeds of the rules but mup, some of `seeds`; None is all.

    Raises:
        UsageError: a grid in which nothing can be found.
    """

    base: Size
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    log2_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    rules: tuple[str, ...] = (MUP, *CONTROLS)
    control_seeds: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.log2_rates) < 3 or any(np.diff(self.log2_rates) <= 0):
            raise UsageError(f"at least three learning rates, ascending; got log2 {list(self.log2_rates)}")
        if not self.seeds:
            raise UsageError("a sweep needs a seed")
        if not self.axis("width") and not self.axis("depth"):
            raise UsageError(f"no size but the base, {shown(self.base)}", hint="widths or depths that differ from it")
        shallow = [depth for depth in self.depths if depth < self.base.depth]
        if shallow:
            raise UsageError(
                f"depth {shallow[0]} is below the base's, {self.base.depth}", hint="take the shallowest as the base"
            )

    def axis(self, name: str) -> list[Size]:
        """Sizes of the axis "width" or "depth", but for the base, ascending."""
        widths = [Size(width, self.base.depth) for width in self.widths]
        depths = [Size(self.base.width, depth) for depth in self.depths]
        return sorted({*(widths if name == "width" else depths)} - {self.base})

    def rules_of(self, axis: str) -> tuple[str, ...]:
        """The rules with seeds that differ on an axis: k1 is another rule for the depth alone."""
        return tuple(rule for rule in self.rules if self.seeds_of(rule) and (axis == "depth" or rule != "k1"))

    def seeds_of(self, rule: str) -> tuple[int, ...]:
        """Those that a rule is trained under."""
        return self.seeds if rule == MUP or self.control_seeds is None else self.control_seeds

    @property
    def axes(self) -> list[str]:
        """Those with a size."""
        return [name for name in ("width", "depth") if self.axis(name)]

    def cells(self) -> list[Cell]:
        """In the order to train them: seed by seed, the base first, the controls last. All rules share the base."""
        found = []
        for seed in self.seeds:
            found.append(Cell(self.base, MUP, seed))
            for rule in (rule for rule in self.rules if seed in self.seeds_of(rule)):
                axes = [axis for axis in self.axes if rule in self.rules_of(axis)]
                found += [Cell(size, rule, seed) for axis in axes for size in self.axis(axis)]
        return found


class Sweep:
    """Losses of a grid, in a file.

    Args:
        grid: what is trained.
        path: of the results, JSON; read where it exists.
        settings: plain values that the losses depend on, beside the grid.

    Raises:
        UsageError: the file is of other settings; the difference is told.
        LowRankError: the file cannot be read.
    """

    def __init__(self, grid: Grid, path: Path, settings: Mapping[str, Any]) -> None:
        self.grid, self.path = grid, path
        # Further sizes, seeds and rules are further cells; what is here changes those there are.
        self.settings = {"base": shown(grid.base), "log2_rates": list(grid.log2_rates), **settings}
        self.records: dict[Cell, dict[str, Any]] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        try:
            document = json.loads(self.path.read_text())
            before, cells = document["settings"], document["cells"]
            self.records = {Cell(Size(c["width"], c["depth"]), c["rule"], c["seed"]): c for c in cells}
        except (ValueError, KeyError, TypeError) as error:
            raise LowRankError(f"{self.path} is no file of a sweep: {error}", hint="start in a new folder") from error
        if difference := settings_difference(before, json.loads(json.dumps(self.settings))):
            raise UsageError(
                f"{self.path} is of a sweep with other settings: {'; '.join(difference)}",
                hint="go on with the same settings, or start in a new folder",
            )

    def missing(self) -> list[Cell]:
        """Cells that are not trained yet, in order."""
        return [cell for cell in self.grid.cells() if cell not in self.records]

    def run(
        self, train: TrainFunction, cells: Iterable[Cell] | None = None, *, told: Callable[[Cell], None] | None = None
    ) -> None:
        """Train the cells that the file lacks, and write it after each.

        Args:
            train: size, rule, learning rates and seed -> a loss for each rate, not finite where training diverged.
            cells: of the grid; None is all.
            told: called with each cell before it is trained.
        """
        wanted = None if cells is None else set(cells)
        for cell in self.missing():
            if wanted is not None and cell not in wanted:
                continue
            if told is not None:
                told(cell)
            started = time.perf_counter()
            losses = train(cell.size, cell.rule, [2.0**rate for rate in self.grid.log2_rates], cell.seed)
            self.records[cell] = {
                **cell.size._asdict(),
                "rule": cell.rule,
                "seed": cell.seed,
                "losses": [float(loss) for loss in losses],
                "seconds": round(time.perf_counter() - started, 1),
            }
            self.write()

    def write(self) -> None:
        """Write the results: settings, cells, and what follows from them. A loss that diverged is null."""
        document = {"settings": self.settings, "cells": list(self.records.values()), **self.verdict()}
        write_json(self.path, document)

    def losses(self, size: Size, rule: str, seed: int | None = None) -> list[float] | None:
        """Losses of a size, rate by rate; None where they are not there.

        Args:
            size: of the grid.
            rule: of the grid; the base is the same under all.
            seed: None is the mean over all seeds of the rule, inf where one of them diverged.
        """
        seeds = self.grid.seeds_of(rule) if seed is None else (seed,)
        cells = [Cell(size, MUP if size == self.grid.base else rule, number) for number in seeds]
        if not all(cell in self.records for cell in cells):
            return None
        values = [[math.inf if loss is None else loss for loss in self.records[cell]["losses"]] for cell in cells]
        found = np.array(values, dtype=float)
        return [float(loss) for loss in np.where(np.isfinite(found), found, np.inf).mean(axis=0)]

    def transfer(self, size: Size, rule: str, seed: int | None = None) -> Transfer | None:
        """What the base's best rate is to a size; see `losses`."""
        here, base = self.losses(size, rule, seed), self.losses(self.grid.base, rule, seed)
        return None if here is None or base is None else transfer(self.grid.log2_rates, here, base)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each axis, rule and size that all seeds are there of, the base first: means over the seeds, and the
        worst seed."""
        return [
            row
            for axis in self.grid.axes
            for rule in self.grid.rules_of(axis)
            for size in (self.grid.base, *self.grid.axis(axis))
            if (row := self._row(axis, rule, size)) is not None
        ]

    def _row(self, axis: str, rule: str, size: Size) -> dict[str, Any] | None:
        mean = self.transfer(size, rule)
        if mean is None:
            return None
        seeds = [one for seed in self.grid.seeds_of(rule) if (one := self.transfer(size, rule, seed)) is not None]
        best, base = mean.optimum, size == self.grid.base
        passed = (best is not None and best.found) if base else mean.passed
        row = {"axis": axis, "rule": rule, "width": size.width, "depth": size.depth}
        row["seeds"] = len(seeds)
        row |= {"log2 lr": None, "by": "diverged", "loss": None} if best is None else _figures(best)
        keys = ("shift", "regret", "read by", "worst shift", "worst regret")
        figures: tuple[Any, ...] = (None,) * len(keys)
        if not base:
            worst = [round(float(np.max([getattr(one, key) for one in seeds])), 4) for key in keys[:2]]
            figures = (round(mean.shift, 4), round(mean.regret, 4), mean.read, *worst)
        verdict = "base" if base and passed else "PASS" if passed else "FAIL"
        return {**row, **dict(zip(keys, figures, strict=True)), "verdict": verdict}

    def verdict(self) -> dict[str, Any]:
        """`rows`; whether the learning rate transfers under mup, None while cells are missing; why not."""
        rows = self.rows()
        failed = [row for row in rows if row["rule"] == MUP and row["verdict"] == "FAIL"]
        complete = not [cell for cell in self.missing() if cell.rule == MUP]
        return {
            "rows": rows,
            "passed": not failed if complete or failed else None,
            "reasons": list(dict.fromkeys(_reason(row) for row in failed)),
        }

    def points(self) -> list[dict[str, Any]]:
        """A row for each loss, for CSV."""
        return [
            {
                **cell.size._asdict(),
                "rule": cell.rule,
                "seed": cell.seed,
                "log2_lr": rate,
                "loss": None if loss is None or not math.isfinite(loss) else loss,
            }
            for cell, record in self.records.items()
            for rate, loss in zip(self.grid.log2_rates, record["losses"], strict=True)
        ]


def _figures(best: Optimum) -> dict[str, Any]:
    return {"log2 lr": round(best.log2_rate, 4), "by": best.how, "loss": round(best.loss, 4)}


def _reason(row: Mapping[str, Any]) -> str:
    name = shown(Size(row["width"], row["depth"]))
    if row["by"] == "diverged":
        return f"{name} diverged at every rate"
    if row["by"] == "edge":
        return f"{name} is best at the end of the grid, log2 lr {row['log2 lr']:g}: give further rates"
    if not math.isfinite(row["shift"]):
        return f"{name}: the base's best rate was not found"
    return f"{name}: shift {row['shift']:.2f}, regret {row['regret']:.3f} nats"
