"""A sweep: its cells and their order, its file, its verdict, on made-up losses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.scaling.family import Size
from lowrank_kit.scaling.transfer import Cell, Grid, Sweep, shown

BASE = Size(64, 4)
RATES = (-8.0, -7.0, -6.0, -5.0, -4.0)
SETTINGS = {"steps": 10}


def grid(**changes: Any) -> Grid:
    given: dict[str, Any] = {"widths": (64, 128), "depths": (4, 16), "log2_rates": RATES, "seeds": (0, 1)}
    return Grid(BASE, **{**given, **changes})


class Training:
    """Losses with a known optimum: of the plain model it moves with the size; a seed moves it, too."""

    def __init__(self, most: int = 1000) -> None:
        self.cells: list[Cell] = []
        self.most = most

    def __call__(self, size: Size, rule: str, rates: Sequence[float], seed: int) -> list[float]:
        if len(self.cells) == self.most:
            raise KeyboardInterrupt
        self.cells.append(Cell(size, rule, seed))
        octaves = math.log2(size.width / BASE.width) + math.log2(size.depth / BASE.depth) / 2
        centre = -6 + 0.2 * seed - (octaves if rule == "sp" else 0.0)
        return [2 + 0.1 * (math.log2(rate) - centre) ** 2 for rate in rates]


def test_the_base_comes_first_and_is_shared_and_controls_come_last() -> None:
    first = [(shown(cell.size), cell.rule) for cell in grid().cells() if cell.seed == 0]
    assert first == [
        ("64 x 4", "mup"),
        ("128 x 4", "mup"),
        ("64 x 16", "mup"),
        ("64 x 16", "k1"),  # which is mup in the width
        ("128 x 4", "sp"),
        ("64 x 16", "sp"),
    ]
    assert [cell.seed for cell in grid().cells()] == [0] * 6 + [1] * 6


def test_shift_and_regret_are_told_by_rule(tmp_path: Path) -> None:
    sweep = Sweep(grid(), tmp_path / "sweep.json", SETTINGS)
    sweep.run(Training())
    rows = {(row["rule"], row["width"], row["depth"]): row for row in sweep.rows()}
    assert rows["mup", 64, 4]["log2 lr"] == pytest.approx(-5.9)
    assert rows["mup", 64, 4]["verdict"] == "base"
    assert rows["mup", 64, 16]["shift"] == pytest.approx(0, abs=1e-6)
    assert rows["sp", 128, 4]["shift"] == pytest.approx(1.0)
    assert rows["sp", 128, 4]["regret"] == pytest.approx(0.1 * 0.9**2), "at -6, the point nearest to -5.9"
    assert [rows[rule, 128, 4]["read by"] for rule in ("mup", "sp")] == ["parabola", "grid"]
    assert (rows["mup", 128, 4]["verdict"], rows["sp", 128, 4]["verdict"]) == ("PASS", "FAIL")
    verdict = sweep.verdict()
    assert verdict["passed"] is True, "controls do not count"
    assert verdict["reasons"] == []


def test_controls_may_have_fewer_seeds(tmp_path: Path) -> None:
    one = grid(control_seeds=(1,))
    assert [(cell.seed, cell.rule) for cell in one.cells() if cell.rule != "mup"] == [(1, "k1"), (1, "sp"), (1, "sp")]
    sweep = Sweep(one, tmp_path / "sweep.json", SETTINGS)
    sweep.run(Training())
    rows = {(row["rule"], row["width"]): row for row in sweep.rows() if row["axis"] == "width"}
    assert [rows[rule, 128]["seeds"] for rule in ("mup", "sp")] == [2, 1]
    assert rows["mup", 64]["log2 lr"] == pytest.approx(-5.9)
    assert rows["sp", 64]["log2 lr"] == pytest.approx(-5.8), "the base as that seed has it"
    assert rows["sp", 128]["shift"] == pytest.approx(1.0)


def test_a_seed_that_differs_shows_beside_the_mean(tmp_path: Path) -> None:
    def train(size: Size, rule: str, rates: Sequence[float], seed: int) -> list[float]:
        centre = -6 if size == BASE else -6.5 + seed
        return [2 + 0.1 * (math.log2(rate) - centre) ** 2 for rate in rates]

    sweep = Sweep(grid(depths=(), rules=("mup",)), tmp_path / "sweep.json", SETTINGS)
    sweep.run(train)
    row = sweep.rows()[-1]
    assert row["shift"] == pytest.approx(0, abs=1e-4)
    assert row["worst shift"] == pytest.approx(0.5)
    assert row["worst regret"] == pytest.approx(0.025)


def test_one_seed_that_diverges_is_not_hidden_in_the_mean(tmp_path: Path) -> None:
    def train(size: Size, rule: str, rates: Sequence[float], seed: int) -> list[float]:
        losses = Training()(size, rule, rates, 0)
        return losses if size == BASE or seed == 0 else [*losses[:2], math.nan, math.nan, math.nan]

    sweep = Sweep(grid(depths=(), rules=("mup",)), tmp_path / "sweep.json", SETTINGS)
    sweep.run(train)
    verdict = Sweep(sweep.grid, sweep.path, SETTINGS).verdict()
    assert verdict["passed"] is False
    assert "128 x 4" in verdict["reasons"][0]
    assert json.loads(sweep.path.read_text())["cells"][-1]["losses"][2:] == [None] * 3


def test_a_killed_sweep_goes_on_cell_by_cell(tmp_path: Path) -> None:
    path, killed, after, whole = tmp_path / "sweep.json", Training(most=5), Training(), Training()
    with pytest.raises(KeyboardInterrupt):
        Sweep(grid(), path, SETTINGS).run(killed)
    sweep = Sweep(grid(), path, SETTINGS)
    assert sweep.verdict()["passed"] is None, "not before all of mup is there"
    sweep.run(after)
    other = Sweep(grid(), tmp_path / "other.json", SETTINGS)
    other.run(whole)
    assert killed.cells + after.cells == whole.cells == grid().cells()
    assert sweep.rows() == other.rows()
    assert len(sweep.points()) == 12 * 5


def test_sizes_and_seeds_can_be_added_and_settings_not_changed(tmp_path: Path) -> None:
    path, more = tmp_path / "sweep.json", Training()
    Sweep(grid(), path, SETTINGS).run(Training())
    larger = Sweep(grid(widths=(128, 256), seeds=(0,)), path, SETTINGS)
    larger.run(more)
    assert more.cells == [Cell(Size(256, 4), rule, 0) for rule in ("mup", "sp")]
    with pytest.raises(UsageError, match="steps: 10 -> 20"):
        Sweep(grid(), path, {"steps": 20})
    with pytest.raises(UsageError, match="log2_rates"):
        Sweep(grid(log2_rates=RATES[1:]), path, SETTINGS)
    path.write_text("{}")
    with pytest.raises(LowRankError, match="no file of a sweep"):
        Sweep(grid(), path, SETTINGS)


def test_only_the_cells_asked_for_are_trained(tmp_path: Path) -> None:
    train, told = Training(), list[Cell]()
    sweep = Sweep(grid(), tmp_path / "sweep.json", SETTINGS)
    sweep.run(train, [cell for cell in grid().cells() if cell.seed == 1], told=told.append)
    assert {cell.seed for cell in train.cells} == {1}
    assert told == train.cells
    assert sweep.rows() == [], "the mean is over all seeds"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"depths": (2, 16)}, "depth 2 is below the base's, 4"),
        ({"widths": (64,), "depths": ()}, "no size but the base"),
        ({"log2_rates": (-5.0, -4.0)}, "at least three"),
        ({"log2_rates": (-4.0, -5.0, -6.0)}, "ascending"),
        ({"seeds": ()}, "a seed"),
    ],
)
def test_grids_in_which_nothing_can_be_found(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        grid(**changes)
