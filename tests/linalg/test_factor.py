"""Factors against what they claim to be: the best of their rank, nested, and honest about their error."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_kit.linalg import factor
from lowrank_kit.linalg.factor import (
    ROWS,
    Factors,
    anchored_target,
    ridged,
    scaled_svd,
    stacked,
    tail_scores,
    truncated_svd,
    two_sided_svd,
    weighted_error,
    whitened_svd,
)
from tests.linalg.cases import CASES, DTYPES
from tests.linalg.search import activations, best_found

SHAPES = [(5, 9), (9, 5), (7, 7), (1, 6), (6, 1)]


def output_error(W: Tensor, factors: Factors, X: Tensor) -> float:
    """|(W - B A) X|_F^2, as it is defined."""
    return ((W - factors.dense()) @ X).square().sum().item()


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
        found = best_found(lambda BA: ((W - BA) @ X).square().sum(), shape, rank)
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


def gram_of(X: Tensor) -> Tensor:
    return X @ X.mT


def curvature(num_out: int, rank: int | None = None) -> Tensor:
    """G, [num_out, num_out], of a rank."""
    return gram_of(activations(num_out, num_out if rank is None else rank))


DECOMPOSITIONS: dict[str, Callable[[Tensor], Factors]] = {
    "plain": truncated_svd,
    "whitened": lambda W: whitened_svd(W, gram_of(activations(W.shape[1]))),
    "scaled": lambda W: scaled_svd(W, gram_of(activations(W.shape[1]))),
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
    X = activations(shape[1], tokens)
    # The difference is that of float64: in float32 one of 1e-9 would be none. Scales far off float32's are none, too.
    for size, scale in ((1.0, 1.0), (1e-9, 1.0), (1.0, 1e-30), (1.0, 1e30)):
        W = scale * torch.randn(shape, dtype=torch.float64)
        difference = size * scale * torch.randn(shape, dtype=torch.float64)
        other = W + difference
        on_outputs, on_weights = ((other - W) @ X).norm() / (W @ X).norm(), (other - W).norm() / W.norm()
        assert weighted_error(W, other, X @ X.mT) == pytest.approx(on_outputs.item(), rel=3e-6)
        assert weighted_error(W, other) == pytest.approx(on_weights.item(), rel=3e-6)
    assert weighted_error(W, W, X @ X.mT) == weighted_error(W, W) == 0.0


@pytest.mark.parametrize("shape", [(2 * ROWS + 7, 20), (20, 2 * ROWS + 7), (3, ROWS + 1, ROWS + 1)])
def test_weighted_error_of_more_than_is_gone_through_at_once(shape: tuple[int, ...]) -> None:
    W, other = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    X = torch.randn(*shape[:-2], shape[-1], 30, dtype=torch.float64)
    on_outputs, on_weights = ((other - W) @ X).norm() / (W @ X).norm(), (other - W).norm() / W.norm()
    assert weighted_error(W, other, X @ X.mT) == pytest.approx(on_outputs.item(), rel=1e-5)
    assert weighted_error(W, other) == pytest.approx(on_weights.item(), rel=1e-5)


def test_weighted_error_of_no_outputs() -> None:
    zero = torch.zeros(3, 4)
    assert weighted_error(zero, zero) == 0.0
    assert weighted_error(zero, torch.ones(3, 4)) == float("inf")


THREE = [(6, 9), (9, 6), (7, 7)]


def close(a: Factors, b: Factors, tolerance: float = 1e-9) -> None:
    """The same maps at every rank, and the same spectrum."""
    for rank in range(1, len(a.singular_values) + 1):
        torch.testing.assert_close(a.truncate(rank).dense(), b.truncate(rank).dense(), atol=tolerance, rtol=0)
    torch.testing.assert_close(a.singular_values, b.singular_values, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("shape", THREE)
def test_what_each_objective_is_with_trivial_weights(shape: tuple[int, int]) -> None:
    W, H = torch.randn(shape, dtype=torch.float64), gram_of(activations(shape[1]))
    identity = torch.eye(shape[0], dtype=torch.float64)
    close(scaled_svd(W, H, exponent=0), truncated_svd(W))
    close(scaled_svd(W, H, exponent=1), whitened_svd(W, H.diagonal().diag()))
    # Damping adds a tenth of the identity to the identity: all singular values by the root of 1.1.
    two_sided = two_sided_svd(W, H, 3 * identity, damping=0.1)
    close(Factors(two_sided.B, two_sided.A, two_sided.singular_values / 3.3**0.5), whitened_svd(W, H))
    torch.testing.assert_close(anchored_target(W, H, H, blend=1.0, ridge=1e-3), W, atol=1e-12, rtol=0)


@pytest.mark.parametrize("tokens", [40, 4], ids=["full-rank Gram", "rank-deficient Gram"])
@pytest.mark.parametrize("shape", THREE)
def test_the_anchored_target_solves_its_normal_equations(shape: tuple[int, int], tokens: int) -> None:
    """The gradient of its definition, by autograd, is zero there; at b = 0 it is W whatever the inputs are."""
    W, X, Y = torch.randn(shape, dtype=torch.float64), activations(shape[1], tokens), activations(shape[1], tokens)
    assert torch.equal(anchored_target(W, gram_of(Y), X @ Y.mT, blend=0.0, ridge=1e-3), W)
    for blend in (0.5, 1.0):
        target = anchored_target(W, gram_of(Y), X @ Y.mT, blend, ridge=1e-3).requires_grad_()
        wanted = W @ ((1 - blend) * Y + blend * X)
        ridge = 1e-3 * gram_of(Y).diagonal().mean()
        error = (wanted - target @ Y).square().sum() + ridge * (target - W).square().sum()
        (gradient,) = torch.autograd.grad(error, target)
        assert gradient.abs().max() < 1e-9 * (wanted @ Y.mT).abs().max()


@pytest.mark.parametrize("rank", [None, 1, 0], ids=["full", "rank one", "zero"])
@pytest.mark.parametrize("shape", [*SHAPES, (40, 6)])
def test_two_sided_factors_of_any_curvature(shape: tuple[int, int], rank: int | None) -> None:
    W, H = torch.randn(shape, dtype=torch.float64), gram_of(activations(shape[1]))
    G = curvature(shape[0], rank)
    full = two_sided_svd(W, H, G, damping=0.1)
    torch.testing.assert_close(full.dense(), W, atol=1e-10, rtol=0)
    gauge = full.B.mT @ ridged(G, 0.1) @ full.B
    torch.testing.assert_close(gauge, torch.eye(len(gauge), dtype=torch.float64), atol=1e-9, rtol=0)
    if rank == 0:  # all errors weigh the same
        close(Factors(full.B, full.A, full.singular_values / 0.1**0.5), whitened_svd(W, H))


def test_ridged() -> None:
    H = gram_of(activations(5))
    torch.testing.assert_close(ridged(H, 0.5) - H, 0.5 * H.trace() / 5 * torch.eye(5, dtype=torch.float64))
    assert torch.equal(ridged(torch.zeros(3, 3), 0.25), 0.25 * torch.eye(3))


def made_for(shape: tuple[int, int], W: Tensor, H: Tensor, G: Tensor) -> dict[str, Factors]:
    other = activations(shape[1])
    target = anchored_target(W, gram_of(other), activations(shape[1]) @ other.mT, 1.0, 1e-3)
    return {
        "plain": truncated_svd(W),
        "scaled": scaled_svd(W, H),
        "whitened": whitened_svd(W, H),
        "two-sided": two_sided_svd(W, H, G, damping=0.1),
        "anchored": whitened_svd(target, ridged(gram_of(other), 1e-3)),
        "anchored two-sided": two_sided_svd(target, ridged(gram_of(other), 1e-3), G, damping=0.1),
    }


@pytest.mark.parametrize("rank_of_G", [None, 1, 0], ids=["full", "rank one", "zero"])
@pytest.mark.parametrize("shape", THREE)
def test_tail_scores_sum_to_the_weighted_error_whatever_the_factors(
    shape: tuple[int, int], rank_of_G: int | None
) -> None:
    W, H, G = torch.randn(shape, dtype=torch.float64), gram_of(activations(shape[1])), curvature(shape[0], rank_of_G)
    unrelated_H, unrelated_G = gram_of(activations(shape[1], 4)), curvature(shape[0])
    for full in made_for(shape, W, H, G).values():
        for weights_H, weights_G in ((H, G), (unrelated_H, unrelated_G)):
            scores = tail_scores(full, weights_H, weights_G)
            total = (weights_G @ full.dense() @ weights_H * full.dense()).sum().item()
            for rank in range(min(shape)):
                lost = full.dense() - full.B[:, :rank] @ full.A[:rank]
                error = (weights_G @ lost @ weights_H * lost).sum().item()
                assert scores[rank:].sum().item() == pytest.approx(error, rel=1e-9, abs=1e-12 * total)


@pytest.mark.parametrize("shape", THREE)
def test_tail_scores_of_the_weights_they_were_made_for_are_the_spectrum(shape: tuple[int, int]) -> None:
    W, H, G = torch.randn(shape, dtype=torch.float64), gram_of(activations(shape[1])), curvature(shape[0])
    identity = torch.eye(shape[0], dtype=torch.float64)
    factors = made_for(shape, W, H, G)
    for full, weights in ((factors["whitened"], identity), (factors["two-sided"], ridged(G, 0.1))):
        scores, energy = tail_scores(full, H, weights), full.singular_values.square()
        torch.testing.assert_close(scores, energy, rtol=0, atol=1e-10 * energy[0].item())


@pytest.mark.parametrize("tokens", [200, 20], ids=["full-rank Gram", "rank-deficient Gram"])
@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (70, 70)])
def test_float32_is_near_the_optimum_too(shape: tuple[int, int], tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The energy of the error grows by no more than float32's rounding of the whole, a few times 2^-24."""
    W, X, G = torch.randn(shape, dtype=torch.float64), activations(shape[1], tokens), curvature(shape[0])
    exact = made_for(shape, W, gram_of(X), G)
    monkeypatch.setattr(factor, "FLOAT64_SIDE", 0)
    identity = torch.eye(shape[0], dtype=torch.float64)
    for name, weights in (("whitened", identity), ("two-sided", ridged(G, 0.1))):
        rough = made_for(shape, W, gram_of(X), G)[name]
        assert rough.A.dtype == rough.B.dtype == torch.float32
        total = (weights @ W @ gram_of(X) * W).sum()
        for rank in (5, 15, 40):
            best, near = (
                (weights @ E @ gram_of(X) * E).sum()
                for E in (W - f.truncate(rank).dense().double() for f in (exact[name], rough))
            )
            assert near <= best * (1 + 1e-5) + 1e-6 * total
        torch.testing.assert_close(rough.dense().double(), W, atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", [factor.FLOAT64_SIDE, 0], ids=["float64", "float32"])
@pytest.mark.parametrize("shape", THREE)
def test_a_gram_that_rounding_made_indefinite(
    shape: tuple[int, int], side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token, its Gram rounded to bfloat16: negative eigenvalues of 1e-3 of the largest, no Cholesky factor."""
    monkeypatch.setattr(factor, "FLOAT64_SIDE", side)
    W, X = torch.randn(shape, dtype=torch.float64), activations(shape[1], 1)
    gram = gram_of(X).bfloat16().double()
    assert torch.linalg.eigvalsh(gram)[0] < -1e-4 * gram.trace()
    full = whitened_svd(W, gram)
    torch.testing.assert_close(full.dense().double(), W, atol=1e-6 if side else 1e-2, rtol=0)
    assert output_error(W, full.truncate(1), X) < 1e-3 * (W @ X).square().sum()


@pytest.mark.parametrize("side", [factor.FLOAT64_SIDE, 0], ids=["float64", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_without_any_input_or_curvature_the_matrix_comes_back(
    shape: tuple[int, int], side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where numbers below 1e-38 are flushed to zero, as some libraries make the processor do."""
    monkeypatch.setattr(factor, "FLOAT64_SIDE", side)
    W, H, G = torch.randn(shape, dtype=torch.float64), torch.zeros(shape[1], shape[1]), torch.zeros(shape[0], shape[0])
    torch.set_flush_denormal(True)
    try:
        found = [whitened_svd(W, H), scaled_svd(W, H), two_sided_svd(W, H, G, damping=0.1)]
        target = anchored_target(W, H, H, blend=1.0, ridge=1e-3)
    finally:
        torch.set_flush_denormal(False)
    for result in (*(full.dense() for full in found), target):
        torch.testing.assert_close(result.double(), W, atol=1e-5, rtol=0)


def test_scaled_keeps_directions_that_only_unseen_inputs_reach() -> None:
    """Input 0 is always zero: what W makes of it comes last, but it comes."""
    W = torch.randn(9, 4, dtype=torch.float64)
    X = activations(4)
    X[0] = 0
    full = scaled_svd(W, gram_of(X))
    torch.testing.assert_close(full.dense(), W, atol=1e-10, rtol=0)
    assert output_error(W, full.truncate(3), X) < 1e-6 * (W @ X).square().sum()


def test_a_stack_has_the_energies_and_errors_of_its_matrices_together() -> None:
    W = torch.randn(3, 6, 5, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.0])[:, None, None]
    gram = torch.stack([x.mT @ x for x in torch.randn(3, 20, 5, dtype=torch.float64)])
    each = [whitened_svd(W[e], gram[e]) for e in range(3)]
    whole = stacked(each).truncate(2)
    lost = [weighted_error(W[e], each[e].truncate(2).dense(), gram[e]) for e in range(2)]
    energies = [(W[e] @ gram[e] @ W[e].mT).trace().item() for e in range(2)]
    share = sum(error**2 * energy for error, energy in zip(lost, energies, strict=True)) / sum(energies)
    assert weighted_error(W, whole.dense(), gram) == pytest.approx(share**0.5, rel=1e-5)
    assert whole.relative_error(2) == pytest.approx(share**0.5, rel=1e-5)
    curvature = torch.stack([torch.eye(6, dtype=torch.float64)] * 3)
    together = torch.stack([tail_scores(each[e], gram[e], curvature[e]) for e in range(3)]).sum(0)
    torch.testing.assert_close(tail_scores(stacked(each), gram, curvature), together)
