"""Factors against what they claim to be: the best of their rank, nested, and honest about their error."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_kit.linalg.factor import Factors, truncated_svd, weighted_error, whitened_svd
from tests.linalg.cases import CASES, DTYPES

SHAPES = [(5, 9), (9, 5), (7, 7), (1, 6), (6, 1)]


def activations(num_in: int, tokens: int = 40) -> Tensor:
    """Correlated inputs, [num_in, tokens] float64, on scales from 1 to 1 / num_in."""
    scales = 1 / torch.arange(1, num_in + 1, dtype=torch.float64)
    mixing = torch.randn(num_in, num_in, dtype=torch.float64)
    return mixing @ (scales[:, None] * torch.randn(num_in, tokens, dtype=torch.float64))


def output_error(W: Tensor, factors: Factors, X: Tensor) -> float:
    """|(W - B A) X|_F^2, as it is defined."""
    return ((W - factors.dense()) @ X).square().sum().item()


def best_found(W: Tensor, X: Tensor, rank: int, starts: int = 3) -> float:
    """Smallest |(W - B A) X|_F^2 that gradient descent on A and B finds: L-BFGS in float64 from several starts."""
    errors = []
    for _ in range(starts):
        B = torch.randn(W.shape[0], rank, dtype=torch.float64, requires_grad=True)
        A = torch.randn(rank, W.shape[1], dtype=torch.float64, requires_grad=True)
        search = torch.optim.LBFGS(
            [A, B], max_iter=500, tolerance_grad=1e-11, tolerance_change=1e-15, line_search_fn="strong_wolfe"
        )

        def loss(A: Tensor = A, B: Tensor = B, search: torch.optim.Optimizer = search) -> Tensor:
            search.zero_grad()
            error = ((W - B @ A) @ X).square().sum()
            error.backward()
            return error

        search.step(loss)
        errors.append(((W - B @ A) @ X).square().sum().item())
    return min(errors)


@pytest.mark.parametrize("shape", SHAPES)
def test_truncated_svd_leaves_the_tail_of_the_spectrum(shape: tuple[int, int]) -> None:
    """Eckart and Young: |W - W_r|_F^2 = sum of the squared singular values after r, these taken from numpy."""
    W = torch.randn(shape, dtype=torch.float64)
    s = np.linalg.svd(W.numpy(), compute_uv=False)
    full = truncated_svd(W)
    for rank in range(1, min(shape) + 1):
        error = (W - full.truncate(rank).dense()).square().sum().item()
        # float64: 1e-12 of the energy of W is what cancellation leaves of the exact zero at full rank.
        assert error == pytest.approx((s[rank:] ** 2).sum(), rel=1e-9, abs=1e-12 * (s**2).sum())


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7)])
def test_no_other_matrix_of_the_rank_is_nearer(shape: tuple[int, int]) -> None:
    """Against the best A for 200 random B, and against small moves of the optimum itself."""
    W = torch.randn(shape, dtype=torch.float64)
    for rank in (1, 3):
        best = truncated_svd(W).truncate(rank)
        error = (W - best.dense()).norm().item()
        for trial in range(200):
            B = torch.randn(shape[0], rank, dtype=torch.float64)
            if trial % 2:
                B = best.B + 10.0 ** -(trial % 7) * B
            competitor = B @ torch.linalg.lstsq(B, W).solution
            assert (W - competitor).norm().item() >= error * (1 - 1e-12)


@pytest.mark.parametrize("tokens", [40, 4], ids=["full-rank Gram", "rank-deficient Gram"])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)], ids=["wide", "tall", "square"])
def test_whitened_svd_is_the_optimum_of_the_output_error(shape: tuple[int, int], tokens: int) -> None:
    """Never worse than a search over all factors, up to 1e-9; and the search finds it, so that the bar is no lower one.

    With 4 tokens the outputs have rank 4.
    """
    W, X = torch.randn(shape, dtype=torch.float64), activations(shape[1], tokens)
    full = whitened_svd(W, X @ X.mT)
    total = (W @ X).square().sum().item()
    for rank in (1, 3):
        error = output_error(W, full.truncate(rank), X)
        found = best_found(W, X, rank)
        assert error <= found * (1 + 1e-9)
        # Where the search ends is not exact: 1e-6 of the energy of the outputs.
        assert error == pytest.approx(found, abs=1e-6 * total)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_whitened_svd_is_better_on_the_outputs_than_plain(shape: tuple[int, int]) -> None:
    W, X = torch.randn(shape, dtype=torch.float64), activations(shape[1])
    whitened, plain = whitened_svd(W, X @ X.mT).truncate(2), truncated_svd(W).truncate(2)
    assert output_error(W, whitened, X) < 0.99 * output_error(W, plain, X)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_whitened_with_the_identity_is_plain(shape: tuple[int, int]) -> None:
    W = torch.randn(shape, dtype=torch.float64)
    whitened, plain = whitened_svd(W, torch.eye(shape[1])), truncated_svd(W)
    for rank in (1, 3):
        torch.testing.assert_close(whitened.truncate(rank).dense(), plain.truncate(rank).dense(), atol=1e-10, rtol=0)
    torch.testing.assert_close(whitened.singular_values, plain.singular_values, atol=1e-7, rtol=0)


@pytest.mark.parametrize("tokens", [40, 4], ids=["full-rank Gram", "rank-deficient Gram"])
@pytest.mark.parametrize("shape", SHAPES)
def test_relative_error_is_the_measured_one(shape: tuple[int, int], tokens: int) -> None:
    W, X = torch.randn(shape, dtype=torch.float64), activations(shape[1], tokens)
    full = whitened_svd(W, X @ X.mT)
    total = (W @ X).square().sum().item()
    previous = float("inf")
    for rank in range(1, min(shape) + 1):
        measured = (output_error(W, full.truncate(rank), X) / total) ** 0.5
        # Eigenvalues carry float64's 1e-16 of the energy; the error is the root of a sum of them.
        assert full.relative_error(rank) == pytest.approx(measured, rel=1e-6, abs=1e-7)
        assert full.truncate(rank).relative_error(rank) == full.relative_error(rank)
        assert full.relative_error(rank) <= previous
        previous = full.relative_error(rank)
    assert full.relative_error(min(shape)) == 0.0


@pytest.mark.parametrize("tokens", [40, 4, 1], ids=["full-rank Gram", "rank-deficient Gram", "one token"])
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_gives_the_matrix_back_whatever_the_inputs(shape: tuple[int, int], tokens: int) -> None:
    """A direction that no input had weighs sqrt(eps) of the largest, so it is found to eps / sqrt(eps) = 1e-8."""
    W, X = torch.randn(shape, dtype=torch.float64), activations(shape[1], tokens)
    torch.testing.assert_close(whitened_svd(W, X @ X.mT).dense(), W, atol=1e-6, rtol=0)


DECOMPOSITIONS: dict[str, Callable[[Tensor], Factors]] = {
    "plain": truncated_svd,
    "whitened": lambda W: whitened_svd(W, (X := activations(W.shape[1])) @ X.mT),
}
decompositions = pytest.mark.parametrize("decompose", DECOMPOSITIONS.values(), ids=DECOMPOSITIONS)


@decompositions
@pytest.mark.parametrize("shape", SHAPES)
def test_factors_are_nested_and_orthonormal(decompose: Callable[[Tensor], Factors], shape: tuple[int, int]) -> None:
    W = torch.randn(shape, dtype=torch.float64)
    side = min(shape)
    full = decompose(W)
    assert (full.B.shape, full.A.shape, full.singular_values.shape) == ((shape[0], side), (side, shape[1]), (side,))
    assert (full.singular_values.diff() <= 0).all()
    torch.testing.assert_close(full.B.mT @ full.B, torch.eye(side, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(full.dense(), W, atol=1e-12, rtol=0)
    for rank in range(1, side + 1):
        once, twice = full.truncate(rank), full.truncate(side).truncate(rank)
        assert torch.equal(once.B, full.B[:, :rank])
        assert torch.equal(once.A, full.A[:rank])
        assert torch.equal(once.dense(), twice.dense())


@decompositions
@pytest.mark.parametrize("rank", [0, -1, 6])
def test_a_rank_that_is_not_there_is_refused(decompose: Callable[[Tensor], Factors], rank: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 5"):
        decompose(torch.randn(5, 9)).truncate(rank)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@settings(deadline=None, derandomize=True, max_examples=25)
@given(seed=st.integers(0, 1000), exponent=st.integers(-60, 60))
def test_signs_and_scale_of_the_inputs_do_not_matter(shape: tuple[int, int], seed: int, exponent: int) -> None:
    """x -> -x for any token leaves the Gram as it is; a positive factor only scales the singular values.

    Powers of two are exact, so nothing but their root may change.
    """
    torch.manual_seed(seed)
    W, X = torch.randn(shape, dtype=torch.float64), activations(shape[1])
    signs = torch.randint(0, 2, (X.shape[1],)) * 2.0 - 1
    best = whitened_svd(W, X @ X.mT).truncate(3)
    flipped = whitened_svd(W, (X * signs) @ (X * signs).mT).truncate(3)
    scaled = whitened_svd(W, X @ X.mT * 2.0**exponent).truncate(3)
    torch.testing.assert_close(flipped.dense(), best.dense(), atol=1e-8, rtol=0)
    torch.testing.assert_close(scaled.dense(), best.dense(), atol=1e-8, rtol=0)
    torch.testing.assert_close(scaled.singular_values, best.singular_values * 2.0 ** (exponent / 2), rtol=1e-6, atol=0)


@decompositions
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_contract(decompose: Callable[[Tensor], Factors], case: str, dtype: torch.dtype) -> None:
    exact, rank = CASES[case]()
    W = exact.to(dtype)
    full = decompose(W)
    side = min(W.shape)
    assert full.B.shape == (W.shape[0], side)
    assert full.A.shape == (side, W.shape[1])
    for tensor in (full.A, full.B, full.singular_values):
        assert tensor.dtype == torch.float64
        assert tensor.isfinite().all()
    # The working dtype is float64 whatever comes in, so nothing but the input's own rounding is lost.
    torch.testing.assert_close(full.dense(), W.double(), atol=1e-12, rtol=0)
    if 0 < rank < side and dtype != torch.bfloat16:  # bfloat16 rounds a matrix of rank one to a higher rank
        assert full.relative_error(rank) < 1e-7
    if rank == 0:
        assert full.relative_error(1) == 0.0


@pytest.mark.parametrize("tokens", [40, 4], ids=["full-rank Gram", "rank-deficient Gram"])
@pytest.mark.parametrize("shape", SHAPES)
def test_weighted_error_is_that_of_the_outputs(shape: tuple[int, int], tokens: int) -> None:
    W, other, X = torch.randn(shape), torch.randn(shape), activations(shape[1], tokens)
    # In float64 whatever comes in: differences of float32 numbers would be off by 1e-8.
    difference = other.double() - W.double()
    on_outputs, on_weights = (difference @ X).norm() / (W.double() @ X).norm(), difference.norm() / W.double().norm()
    assert weighted_error(W, other, X @ X.mT) == pytest.approx(on_outputs.item(), rel=1e-9)
    assert weighted_error(W, other) == pytest.approx(on_weights.item(), rel=1e-9)
    assert weighted_error(W, W, X @ X.mT) == weighted_error(W, W) == 0.0


def test_weighted_error_of_no_outputs() -> None:
    zero = torch.zeros(3, 4)
    assert weighted_error(zero, zero) == 0.0
    assert weighted_error(zero, torch.ones(3, 4)) == float("inf")
