"""The pivoted form against what it claims: the same matrix, small coefficients, and little lost by rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_kit.linalg.factor import truncated_svd, weighted_error
from lowrank_kit.linalg.pivot import TOLERANCE, Pivoted, _coefficients, _lu_order, _swap, expand, pivot
from tests.linalg.cases import CASES, DTYPES, with_spectrum

# (out, in, rank). The last one takes some thirty swaps.
SHAPES = [(14, 6, 3), (6, 14, 5), (8, 8, 4), (8, 8, 1), (9, 5, 5), (5, 9, 5), (2, 2, 1), (1, 6, 1), (300, 120, 100)]


def check_form(form: Pivoted, num_out: int, rank: int) -> None:
    """Shapes, an index that is a permutation, coefficients within the bound."""
    assert form.coefficients.shape == (num_out - rank, rank)
    assert form.index.dtype == torch.int32
    assert sorted(form.index.tolist()) == list(range(num_out))
    if rank < num_out:
        # Solved anew after the swaps: a rounding above the bound is possible.
        assert form.coefficients.abs().max() <= 1 + TOLERANCE + 1e-9


@pytest.mark.parametrize(("num_out", "num_in", "rank"), SHAPES)
def test_it_is_the_product(num_out: int, num_in: int, rank: int) -> None:
    """For factors that are not orthonormal, on scales from 1 to 1e-6."""
    B = torch.randn(num_out, rank, dtype=torch.float64) * torch.logspace(0, -6, rank, dtype=torch.float64)
    A = torch.randn(rank, num_in, dtype=torch.float64)
    form = pivot(B, A)
    check_form(form, num_out, rank)
    # Some hundred roundings of 2^-53.
    torch.testing.assert_close(form.dense(), B @ A, atol=1e-12, rtol=0)
    torch.testing.assert_close(expand(form.coefficients, form.index) @ form.rows, B @ A, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("num_out", "num_in", "rank"), SHAPES)
def test_the_kept_rows_are_rows_of_it(num_out: int, num_in: int, rank: int) -> None:
    B, A = torch.randn(num_out, rank), torch.randn(rank, num_in)
    form = pivot(B, A)
    W = B.double() @ A.double()
    for row, place in enumerate(form.index.tolist()):
        if place < rank:
            torch.testing.assert_close(form.rows[place], W[row], atol=1e-14, rtol=0)


def test_of_any_rank_of_nested_factors() -> None:
    W = torch.randn(12, 9, dtype=torch.float64)
    full = truncated_svd(W)
    for rank in range(1, 10):
        cut = full.truncate(rank)
        form = pivot(cut.B, cut.A)
        check_form(form, 12, rank)
        torch.testing.assert_close(form.dense(), cut.dense(), atol=1e-13, rtol=0)


def test_swaps_enlarge_the_volume_to_a_local_maximum() -> None:
    """No exchange of one kept row makes |det| larger by more than the tolerance; a few are tried in every case."""
    B = torch.linalg.qr(torch.randn(40, 8, dtype=torch.float64)).Q
    form = pivot(B, torch.eye(8, dtype=torch.float64))
    kept = torch.argsort(form.index)[:8]
    volume = torch.linalg.det(B[kept]).abs()
    for j in range(8):
        for other in range(40):
            tried = kept.clone()
            tried[j] = other
            assert torch.linalg.det(B[tried]).abs() <= volume * (1 + TOLERANCE + 1e-9)


def test_swapped_coefficients_are_those_of_the_swapped_rows() -> None:
    """The updates of rank one against solving anew."""
    basis = torch.linalg.qr(torch.randn(300, 100, dtype=torch.float64)).Q
    before = _lu_order(basis)
    C, order = _coefficients(basis, before), before.clone()
    _swap(C, order)
    assert (order != before).sum() > 20
    torch.testing.assert_close(C, _coefficients(basis, order), atol=1e-11, rtol=0)


def wilkinson(side: int) -> Tensor:
    """What partial pivoting is worst at: no row exchanged, and the last one is 2^(side - 1) large in the others."""
    W = torch.eye(side, dtype=torch.float64) - torch.ones(side, side, dtype=torch.float64).tril(-1)
    W[:, -1] = 1
    return W


def test_where_partial_pivoting_fails() -> None:
    B = torch.cat((wilkinson(12), torch.randn(6, 12, dtype=torch.float64)))
    form = pivot(B, torch.eye(12, dtype=torch.float64))
    check_form(form, 18, 12)
    torch.testing.assert_close(form.dense(), B, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_contract(case: str, dtype: torch.dtype) -> None:
    """As B of a wide A: zero, of lower rank than it has columns, in any dtype."""
    B = CASES[case]()[0].to(dtype)
    B = B if B.shape[0] >= B.shape[1] else B.mT
    A = torch.randn(B.shape[1], 7).to(dtype)
    form = pivot(B, A)
    check_form(form, *B.shape)
    assert form.rows.dtype == form.coefficients.dtype == torch.float64
    torch.testing.assert_close(form.dense(), B.double() @ A.double(), atol=1e-12, rtol=0)


def test_duplicate_rows() -> None:
    B = torch.randn(3, 4, dtype=torch.float64).repeat(5, 1)[torch.randperm(15)]  # rank 3, four columns
    A = torch.randn(4, 6, dtype=torch.float64)
    form = pivot(B, A)
    check_form(form, 15, 4)
    torch.testing.assert_close(form.dense(), B @ A, atol=1e-12, rtol=0)


def test_arguments_are_left_alone() -> None:
    B, A = torch.randn(9, 4, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    before = B.clone(), A.clone()
    pivot(B, A)
    assert torch.equal(B, before[0])
    assert torch.equal(A, before[1])


def test_more_columns_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="at most the number of rows, 3, got 4"):
        pivot(torch.randn(3, 4), torch.randn(4, 5))


def rounding_error(W: Tensor, form: Pivoted) -> float:
    rounded = Pivoted(form.rows.bfloat16().double(), form.coefficients.bfloat16().double(), form.index)
    return weighted_error(W, rounded.dense())


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_rounding_to_bfloat16(share: float) -> None:
    """Singular values 1 / i: two factors lose .0024, the pivoted form .0049; .02 and more where rows are not chosen."""
    W = with_spectrum(256, 256, 1 / torch.arange(1.0, 257.0))
    cut = truncated_svd(W).truncate(int(256 * share))
    two = weighted_error(cut.dense(), cut.B.bfloat16().double() @ cut.A.bfloat16().double())
    assert two < 0.003
    pivoted = rounding_error(cut.dense(), pivot(cut.B, cut.A))
    assert two < pivoted < 3 * two
    # The first rows there are have coefficients of any size.
    first = cut.B[: cut.B.shape[1]]
    C = torch.linalg.solve(first, cut.B[cut.B.shape[1] :], left=False)
    unpivoted = Pivoted(first @ cut.A, C, torch.arange(256, dtype=torch.int32))
    assert rounding_error(cut.dense(), unpivoted) > 2 * pivoted
