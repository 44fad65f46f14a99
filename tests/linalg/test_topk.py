"""The rank-k step against an exact SVD, on every scale and where the rank is not there."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_kit.linalg.topk import rank_of_fraction, topk_polar
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
    assert out.dtype == torch.float32
    # Decomposed in float64, so the rounding of the float32 result is all there is.
    torch.testing.assert_close(out.double(), reference(M, k), atol=1e-7, rtol=0)
    values = torch.linalg.svdvals(out)
    torch.testing.assert_close(values, (torch.arange(10) < k).float(), atol=2e-6, rtol=0)


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
        assert out.dtype == torch.float32
        assert out.isfinite().all()
        values = torch.linalg.svdvals(out)
        if rank < side and dtype == torch.bfloat16:  # rounded to bfloat16 a matrix of rank one has a higher rank
            rank = int(torch.linalg.matrix_rank(M.float()))
        expected = (torch.arange(side) < min(k, rank)).float()
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
