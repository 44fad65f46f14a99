"""A few cases of each property, always the same, and all that ever failed. Thousands: evals/robustness/fuzz.py."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.place import Place
from tests.fuzz.properties import FUZZES


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", FUZZES)
def test_it_holds(name: str, place: Place) -> None:
    fuzz = FUZZES[name]

    @settings(
        max_examples=fuzz.few,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(fuzz.cases)
    def check(case: object) -> None:
        fuzz.check(place, case)

    check()
