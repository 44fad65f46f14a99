"""Rank schedules: the grammar, the knots and the curve between them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_kit.errors import UsageError
from lowrank_kit.optim.schedule import RankSchedule

fractions = st.floats(0.001, 1)
progress = st.floats(0, 1)
properties = settings(deadline=None, derandomize=True, max_examples=200)


@pytest.mark.parametrize(
    ("text", "kind", "knots"),
    [
        ("0.25", "fixed", ((0.0, 0.25),)),
        ("fixed:0.25", "fixed", ((0.0, 0.25),)),
        ("fixed:1", "fixed", ((0.0, 1.0),)),
        ("piecewise:1@0", "piecewise", ((0.0, 1.0),)),
        ("piecewise:1@0,0.5@0.3,0.25@0.6", "piecewise", ((0.0, 1.0), (0.3, 0.5), (0.6, 0.25))),
        ("cosine:1:0.25", "cosine", ((0.1, 1.0), (0.8, 0.25))),
        ("cosine:1:0.25:hold=0", "cosine", ((0.0, 1.0), (0.8, 0.25))),
        ("cosine:0.2:0.4:until=1:hold=0.5", "cosine", ((0.5, 0.2), (1.0, 0.4))),
    ],
)
def test_what_can_be_read(text: str, kind: str, knots: tuple[tuple[float, float], ...]) -> None:
    assert RankSchedule.parse(text) == RankSchedule(kind, knots)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read"),
        ("cosine", "cannot read"),
        ("quarter", "cannot read"),
        ("fixed:", "cannot read"),
        ("fixed:a", "cannot read"),
        ("fixed:0.25:0.5", "cannot read"),
        ("cosine:1", "cannot read"),
        ("cosine:1:0.25:hold", "cannot read"),
        ("cosine:1:0.25:held=0.1", "cannot read"),
        ("piecewise:1", "cannot read"),
        ("piecewise:1@0,", "cannot read"),
        ("piecewise:1@0@1", "cannot read"),
        ("linear:1:0.5", 'unknown rank schedule "linear"'),
        ("cosin:1:0.5", 'did you mean "cosine"'),
        ("0", r"rank fraction must be in \(0, 1\], got 0"),
        ("1.01", "rank fraction must be in"),
        ("-0.5", "rank fraction must be in"),
        ("nan", "rank fraction must be in"),
        ("fixed:inf", "rank fraction must be in"),
        ("cosine:1:0", "rank fraction must be in"),
        ("piecewise:1@0,2@0.5", "rank fraction must be in"),
        ("piecewise:1@0,0.5@1.5", r"progress in a rank schedule must be in \[0, 1\], got 1.5"),
        ("cosine:1:0.5:hold=-0.1", "progress in a rank schedule must be in"),
        ("cosine:1:0.5:hold=nan", "progress in a rank schedule must be in"),
        ("cosine:1:0.5:hold=0.8", "must ascend"),
        ("cosine:1:0.5:hold=0.9", "must ascend"),
        ("piecewise:1@0,0.5@0.6,0.25@0.3", "must ascend"),
        ("piecewise:1@0,0.5@0.5,0.25@0.5", "must ascend"),
        ("piecewise:1@0.1", "starts at progress 0, got 0.1"),
    ],
)
def test_what_cannot_be_read_says_why(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        RankSchedule.parse(text)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("place", "fraction"), [(0, 1), (0.2999, 1), (0.3, 0.5), (0.5999, 0.5), (0.6, 0.25), (1, 0.25)]
)
def test_piecewise_steps_at_its_knots(place: float, fraction: float) -> None:
    assert RankSchedule.parse("piecewise:1@0,0.5@0.3,0.25@0.6").fraction(place) == fraction


@pytest.mark.parametrize(
    ("place", "fraction"),
    [(0, 1), (0.1, 1), (0.275, 0.25 + 0.375 * (1 + math.sqrt(0.5))), (0.45, 0.625), (0.8, 0.25), (1, 0.25)],
)
def test_cosine_at_known_places(place: float, fraction: float) -> None:
    """A quarter of the way cos is sqrt(1/2), half way the mean of both ends."""
    assert RankSchedule.parse("cosine:1:0.25").fraction(place) == pytest.approx(fraction, rel=1e-12)


@properties
@given(start=fractions, end=fractions, hold=st.floats(0, 0.4), until=st.floats(0.5, 1), one=progress, other=progress)
def test_cosine_goes_one_way_between_its_ends(
    start: float, end: float, hold: float, until: float, one: float, other: float
) -> None:
    schedule = RankSchedule.parse(f"cosine:{start!r}:{end!r}:hold={hold!r}:until={until!r}")
    early, late = (schedule.fraction(place) for place in sorted((one, other)))
    slack = 1e-12
    assert min(start, end) - slack <= early <= max(start, end) + slack
    assert 0 < early <= 1
    assert (late - early) * (end - start) >= -slack
    assert schedule.fraction(min(one, hold)) == pytest.approx(start, rel=1e-12)
    assert schedule.fraction(max(one, until)) == pytest.approx(end, rel=1e-12)


@properties
@given(values=st.lists(fractions, min_size=1, max_size=6), place=progress)
def test_piecewise_is_the_last_knot_that_was_passed(values: list[float], place: float) -> None:
    knots = [(i / len(values), value) for i, value in enumerate(values)]
    schedule = RankSchedule.parse("piecewise:" + ",".join(f"{value!r}@{start!r}" for start, value in knots))
    assert schedule.fraction(place) == next(value for start, value in reversed(knots) if start <= place)


@properties
@given(fraction=fractions, place=progress)
def test_fixed_stays(fraction: float, place: float) -> None:
    assert RankSchedule.parse(f"fixed:{fraction!r}").fraction(place) == fraction
