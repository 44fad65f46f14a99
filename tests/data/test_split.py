from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_kit.data.split import fitting, place


def one_by_one(places: list[int], sizes: list[int], max_bytes: float) -> list[bool]:
    """The rule as one would say it."""
    together = {p: sum(size for q, size in zip(places, sizes, strict=True) if q == p) for p in set(places)}
    taken, room = set(), max_bytes
    for p in sorted(together):
        if together[p] <= room:
            taken.add(p)
            room -= together[p]
    return [p in taken for p in places]


@settings(deadline=None, derandomize=True)
@given(
    documents=st.lists(st.tuples(st.sampled_from([*range(12), 2**63, 2**64 - 1]), st.integers(1, 40)), max_size=30),
    max_bytes=st.one_of(st.integers(0, 300), st.floats(0, 300)),
)
def test_those_first_that_fit(documents: list[tuple[int, int]], max_bytes: float) -> None:
    places, sizes = [p for p, _ in documents], [size for _, size in documents]
    found = fitting(np.array(places, dtype=np.uint64), np.array(sizes, dtype=np.int64), max_bytes)
    assert found.tolist() == one_by_one(places, sizes, max_bytes)


def test_the_place_is_of_the_text_and_the_seed() -> None:
    assert place("text", 0) == place("text", 0)
    assert len({place("text", 0), place("text", 1), place("texts", 0)}) == 3
    assert all(0 <= place(str(number), 0) < 2**64 for number in range(50))
    assert max(place(str(number), 0) for number in range(50)) > 2**63
