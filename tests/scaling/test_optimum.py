"""Optima, shifts and regrets of curves whose answer is known."""

from __future__ import annotations

import math

import pytest

from lowrank_kit.scaling.optimum import find_optimum, loss_at, transfer

RATES = [-8.0, -7.0, -6.0, -5.0, -4.0]


def curve(centre: float, least: float = 2.0, bend: float = 0.1) -> list[float]:
    return [least + bend * (rate - centre) ** 2 for rate in RATES]


def test_the_parabola_finds_the_least_of_a_parabola() -> None:
    found = find_optimum(RATES, curve(-5.7))
    assert found is not None
    assert (found.how, found.found) == ("parabola", True)
    assert found.log2_rate == pytest.approx(-5.7)
    assert found.loss == pytest.approx(2.0)


def test_a_grid_need_not_be_even() -> None:
    rates = [-8.0, -6.5, -6.0, -4.0]
    found = find_optimum(rates, [2 + 0.1 * (rate + 6.2) ** 2 for rate in rates])
    assert found is not None
    assert found.log2_rate == pytest.approx(-6.2)


@pytest.mark.parametrize("centre", [-9.0, -3.0])
def test_the_best_at_an_end_of_the_grid_is_not_found(centre: float) -> None:
    found = find_optimum(RATES, curve(centre))
    assert found is not None
    assert (found.how, found.found, found.log2_rate) == ("edge", False, RATES[0 if centre < -8 else -1])
    assert math.isnan(transfer(RATES, curve(centre), curve(-6)).shift)
    assert math.isnan(transfer(RATES, curve(-6), curve(centre)).shift)
    assert not transfer(RATES, curve(centre), curve(centre)).passed


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e5])
def test_beside_a_rate_that_diverged_the_best_point_stands(bad: float) -> None:
    losses = [*curve(-5.2)[:4], bad]
    found = find_optimum(RATES, losses)
    assert found is not None
    assert (found.how, found.found, found.log2_rate) == ("grid", True, -5.0)
    if bad != 1e5:
        assert find_optimum(RATES, [bad] * 5) is None


def test_shift_and_regret_of_known_curves() -> None:
    found = transfer(RATES, curve(-5.7), curve(-6.1))
    assert found.shift == pytest.approx(0.4)
    assert found.regret == pytest.approx(0.1 * 0.4**2)
    assert (found.read, found.passed) == ("parabola", True)


@pytest.mark.parametrize(("centre", "bend", "passed"), [(-5.3, 0.03, True), (-5.2, 0.03, False), (-5.4, 0.1, False)])
def test_either_figure_can_fail(centre: float, bend: float, passed: bool) -> None:
    assert transfer(RATES, curve(centre, bend=bend), curve(-6, bend=bend)).passed is passed


def test_far_from_the_optimum_the_nearest_point_is_read() -> None:
    losses = [3.0, 2.5, 2.2, 2.0, 2.4]
    found = find_optimum(RATES, losses)
    assert found is not None
    assert loss_at(-7.3, found, RATES, losses) == (2.5, "grid")
    assert loss_at(-5.0, found, RATES, losses) == (pytest.approx(2.0), "parabola")


def test_a_rate_at_which_it_diverges_costs_without_limit() -> None:
    found = transfer(RATES, [2.0, 1.9, 2.2, math.nan, math.nan], curve(-5.0))
    assert found.regret == math.inf
    assert not found.passed
