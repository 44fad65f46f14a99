"""The rank-k step against an exact SVD, on every scale and where the rank is not there."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_kit.linalg.topk import lmo_ratio, peak_scaled, rank_of_fraction, topk_polar
from tests.linalg.cases import CASES, DTYPES, with_spectrum

# Descending with a gap of a quarter between neighbours: every k has one top-k part.
GAPS = 0.75 ** torch.arange(10, dtype=torch.float64)


def reference(M: Tensor, k: int) -> Tensor:
    """U_k V_k^T by a float64 SVD: the definition."""
    U, _, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    return U[..., :k] @ Vh[..., :k, :]


@pytest.mark.parametrize("k", [1, 3, 9, 10])
@pytest.mark.parametrize("shape", [(10, 17), (17, 10), (10, 10)])
def test_it_is_the_exact_top_k_part(shape: tuple[int, int], k: int) -> None:
    M = with_spectrum(*shape, GAPS)
    out = topk_polar(M, k)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, reference(M, k), atol=1e-12, rtol=0)
    torch.testing.assert_close(topk_polar(M.float(), k).double(), reference(M.float().double(), k), atol=1e-7, rtol=0)
    values = torch.linalg.svdvals(out)
    torch.testing.assert_close(values, (torch.arange(10) < k).double(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("shape", [(4, 10, 17), (2, 3, 17, 10)])
def test_a_batch_is_its_matrices(shape: tuple[int, ...]) -> None:
    """Scales differ by 1e400 within the batch: each matrix is scaled by itself."""
    M = torch.randn(shape, dtype=torch.float64)
    M[0] *= 1e-200
    M[-1] *= 1e200
    out = topk_polar(M, 4)
    flat = [topk_polar(m, 4) for m in M.reshape(-1, *shape[-2:])]
    torch.testing.assert_close(out, torch.stack(flat).reshape(shape), atol=1e-6, rtol=0)
    torch.testing.assert_close(out.double(), reference(M, 4), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 1e-20), (torch.float32, 1e20), (torch.float64, 1e-200), (torch.float64, 1e200)],
)
@pytest.mark.parametrize("shape", [(10, 17), (17, 10)])
def test_scale_does_not_matter(shape: tuple[int, int], dtype: torch.dtype, scale: float) -> None:
    """Also where the squares of the entries leave the range of float64."""
    M = with_spectrum(*shape, GAPS).to(dtype)
    torch.testing.assert_close(topk_polar(M * scale, 5), topk_polar(M, 5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(10, 17), (17, 10)])
def test_badly_conditioned_directions_count_like_the_others(shape: tuple[int, int]) -> None:
    """Down to 1e-5 of the largest, in float32: the polar factor has no small singular value."""
    M = with_spectrum(*shape, torch.logspace(0, -5, 10)).float()
    torch.testing.assert_close(torch.linalg.svdvals(topk_polar(M, 10)), torch.ones(10), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(10, 17), (17, 10)])
def test_a_direction_without_signal_gets_no_step(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Rank 4 asked for 7: the other three are rounding noise, of any direction."""
    spectrum = torch.cat([GAPS[:4], torch.zeros(6, dtype=torch.float64)])
    M = with_spectrum(*shape, spectrum).to(dtype)
    out = topk_polar(M, 7)
    torch.testing.assert_close(out.double(), reference(M, 4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_contract(case: str, dtype: torch.dtype) -> None:
    exact, rank = CASES[case]()
    M = exact.to(dtype)
    side = min(M.shape)
    for k in range(1, side + 1):
        out = topk_polar(M, k)
        assert out.shape == M.shape
        assert out.dtype == torch.promote_types(dtype, torch.float32)
        assert out.isfinite().all()
        values = torch.linalg.svdvals(out)
        if rank < side and dtype == torch.bfloat16:  # rounded to bfloat16 a matrix of rank one has a higher rank
            rank = int(torch.linalg.matrix_rank(M.float()))
        expected = (torch.arange(side) < min(k, rank)).to(values.dtype)
        torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)


def test_a_wide_bfloat16_matrix_keeps_its_directions() -> None:
    """128 times bfloat16's eps is one: a threshold made of that would leave nothing."""
    out = topk_polar(torch.randn(8, 256).bfloat16(), 3)
    torch.testing.assert_close(torch.linalg.svdvals(out), (torch.arange(8) < 3).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("k", [0, 7])
def test_a_rank_that_is_not_there_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="between 1 and min"):
        topk_polar(torch.randn(9, 6), k)


@pytest.mark.parametrize(
    ("fraction", "side", "k"),
    [
        (0.25, 192, 48),
        (0.07, 100, 7),  # 0.07 * 100 = 7.000000000000001
        (0.1, 30, 3),
        (0.1 + 0.2, 10, 3),  # 0.30000000000000004
        (0.29, 100, 29),
        (1 / 3, 9, 3),
        (0.251, 192, 49),
        (1.0, 7, 7),
        (0.999, 7, 7),
        (1e-12, 100, 1),
    ],
)
def test_rank_of_fraction(fraction: float, side: int, k: int) -> None:
    assert rank_of_fraction(fraction, (side, side + 5)) == k
    assert rank_of_fraction(fraction, torch.Size((4, side + 5, side))) == k


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.integers(1, 1000), st.integers(1, 5000))
def test_rank_of_fraction_is_the_ceiling_of_the_decimal(thousandths: int, side: int) -> None:
    """Of 0.001, 0.002, ... as they are written, not as float64 holds them."""
    assert rank_of_fraction(thousandths / 1000, (side, side)) == math.ceil(Fraction(thousandths, 1000) * side)


@pytest.mark.parametrize(
    ("fraction", "side", "k"),
    [
        (0.25, 1024, 256),
        (0.25, 300, 80),  # 75: to the nearest, 80
        (0.24, 300, 80),  # 72: half way, up
        (0.23, 300, 64),  # 69
        (0.01, 300, 16),  # at least one multiple
        (0.999, 300, 300),  # never above the side
        (0.98, 260, 256),  # 255
        (1.0, 300, 300),  # a full step stays full
        (0.23, 256, 64),  # 59: the least side that is rounded
        (0.23, 255, 59),  # too narrow: half a multiple would be more than a 32nd of it
        (0.25, 7, 2),
    ],
)
def test_rank_of_fraction_in_multiples_of_16(fraction: float, side: int, k: int) -> None:
    assert rank_of_fraction(fraction, (side + 5, side), multiple=16) == k


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.integers(1, 1000), st.integers(1, 5000), st.sampled_from([1, 8, 16, 32]))
def test_a_multiple_moves_a_rank_by_half_of_it_at_most(thousandths: int, side: int, multiple: int) -> None:
    plain, rounded = (rank_of_fraction(thousandths / 1000, (side, side), multiple=m) for m in (1, multiple))
    assert 1 <= rounded <= side
    # The first multiple stands for all ranks below it.
    assert abs(rounded - plain) <= multiple / 2 or rounded == multiple
    assert abs(rounded - plain) < multiple


def test_lmo_ratio_in_numbers() -> None:
    M = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    assert lmo_ratio(M, torch.diag(torch.tensor([1.0, 1, 0, 0])), 2) == 1
    assert lmo_ratio(M, torch.diag(torch.tensor([1.0, 0, 1, 0])), 2) == pytest.approx(6 / 7)
    assert lmo_ratio(M, torch.diag(torch.tensor([0.0, 0, 0, -1])), 4) == pytest.approx(-0.1)
    assert lmo_ratio(torch.zeros(3, 4), torch.zeros(3, 4), 2) == 1


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_no_feasible_step_has_a_larger_lmo_ratio_than_the_exact_one(seed: int, k: int) -> None:
    """Feasible: singular values at most 1 that add up to at most k."""
    torch.manual_seed(seed)
    M = torch.randn(6, 9)
    assert lmo_ratio(M, topk_polar(M, k), k) == pytest.approx(1, abs=1e-6)
    s = torch.rand(6)
    assert lmo_ratio(M, with_spectrum(6, 9, s * min(1, k / s.sum().item())), k) <= 1


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e-37), (torch.float32, 1e37), (torch.float64, 1e-300)])
def test_peak_scaled_is_each_matrix_over_its_largest_entry(dtype: torch.dtype, scale: float) -> None:
    M = torch.tensor([[[1.0, -2.0]], [[0.0, 0.0]], [[0.5, 0.25]]], dtype=dtype) * scale
    expected = torch.tensor([[[0.5, -1.0]], [[0.0, 0.0]], [[1.0, 0.5]]], dtype=dtype)
    torch.testing.assert_close(peak_scaled(M), expected)


def test_peak_scaled_does_not_round_a_bfloat16_matrix_again() -> None:
    M = torch.randn(6, 9).bfloat16()
    assert torch.equal(peak_scaled(M), peak_scaled(M.float()))
