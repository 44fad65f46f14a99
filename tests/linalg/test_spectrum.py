"""What a spectrum says: known values, and the inequalities that hold for every matrix."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_kit.linalg.spectrum import effective_rank, rank_at_energy, singular_values, stable_rank
from tests.linalg.cases import CASES, DTYPES

# Spectra of up to 12 values over 12 orders of magnitude, zeros among them, not all zero.
spectra = (
    st.lists(st.just(0.0) | st.floats(1e-6, 1e6), min_size=1, max_size=12)
    .filter(any)
    .map(lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64))
)
properties = settings(deadline=None, derandomize=True, max_examples=200)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_singular_values_are_numpys(case: str, dtype: torch.dtype) -> None:
    W = CASES[case]()[0].to(dtype)
    s = singular_values(W)
    assert s.dtype == torch.float64
    assert s.shape == (min(W.shape),)
    expected = np.linalg.svd(W.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(s.numpy(), expected, atol=1e-13 * max(1.0, expected[0]))


@pytest.mark.parametrize(
    ("s", "stable", "effective"),
    [
        ([3.0], 1.0, 1.0),
        ([2.0, 2.0, 2.0, 2.0], 4.0, 4.0),
        ([2.0, 1.0], 1.25, 3 / 2 ** (2 / 3)),  # p = (2/3, 1/3): exp H = 3 / 2^(2/3)
        ([1.0, 1.0, 0.0], 2.0, 2.0),
        ([0.0, 0.0], 0.0, 0.0),
        ([], 0.0, 0.0),
    ],
)
def test_known_values(s: list[float], stable: float, effective: float) -> None:
    s_S = torch.tensor(s, dtype=torch.float64)
    assert stable_rank(s_S) == pytest.approx(stable, rel=1e-12)
    assert effective_rank(s_S) == pytest.approx(effective, rel=1e-12)


@pytest.mark.parametrize(("share", "rank"), [(1e-9, 1), (0.5, 1), (0.64, 1), (0.65, 2), (0.9, 2), (0.99, 3), (1.0, 3)])
def test_rank_at_energy(share: float, rank: int) -> None:
    """Energies 64, 27, 9 of 100, and a zero that is never needed."""
    assert rank_at_energy(torch.tensor([8.0, 27**0.5, 3.0, 0.0], dtype=torch.float64), share) == rank


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_zero_matrix_has_no_energy(share: float) -> None:
    assert rank_at_energy(torch.zeros(3), share) == 0
    assert rank_at_energy(torch.zeros(0), share) == 0


@properties
@given(spectra)
def test_one_to_stable_to_effective_to_rank(s: Tensor) -> None:
    """1 <= stable <= (sum s)^2 / sum s^2 <= effective <= rank.

    The second by s_max sum s >= sum s^2; the others since Renyi entropies (2, 1, 0) rise as their order falls.
    """
    participation = (s.sum() ** 2 / s.square().sum()).item()
    rank = int((s > 0).sum())
    chain = [1.0, stable_rank(s), participation, effective_rank(s), float(rank)]
    assert all(low <= high * (1 + 1e-12) for low, high in pairwise(chain)), chain
    assert rank_at_energy(s, 1.0) <= rank


@properties
@given(spectra, st.integers(-100, 100))
def test_scale_does_not_matter(s: Tensor, exponent: int) -> None:
    scaled = s * 2.0**exponent
    assert stable_rank(scaled) == pytest.approx(stable_rank(s), rel=1e-12)
    assert effective_rank(scaled) == pytest.approx(effective_rank(s), rel=1e-12)
    assert [rank_at_energy(scaled, share) for share in (0.5, 0.9, 1.0)] == [
        rank_at_energy(s, share) for share in (0.5, 0.9, 1.0)
    ]


@properties
@given(spectra, st.floats(1e-3, 1), st.floats(1e-3, 1))
def test_rank_at_energy_is_the_smallest_that_reaches_it_and_rises_with_the_share(
    s: Tensor, one: float, other: float
) -> None:
    low, high = sorted((one, other))
    rank = rank_at_energy(s, low)
    assert rank <= rank_at_energy(s, high)
    energy = s.square()
    slack = 1e-12 * energy.sum()
    assert energy[:rank].sum() >= low * energy.sum() - slack
    assert energy[: rank - 1].sum() < low * energy.sum() + slack
