"""The rank-k step from a subspace, against the exact one: by eigh, and by QR sweeps as on an accelerator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_kit.linalg.subspace import basis_columns, krylov_topk_polar, random_basis, warm_topk_polar
from lowrank_kit.linalg.topk import lmo_ratio, topk_polar
from tests.linalg.cases import orthonormal, with_spectrum
from tests.linalg.test_topk import reference

# A gap of a fifth after each of sixty: every k has one top-k part, and the last is 1e-6 of the first.
GAPS = 0.8 ** torch.arange(60, dtype=torch.float64)
SHAPES = [(60, 90), (90, 60), (60, 60)]

# Arguments of a path, and how far its step may be from the exact one: float32 products; then what four QR sweeps leave
# of the rotation between neighbours a fifth apart; then 8 bits of mantissa, which turn them too.
PATHS: dict[str, tuple[dict[str, Any], float]] = {
    "factorized": ({"factorize": True}, 1e-4),
    "products": ({"factorize": False}, 1e-3),
    "products in bfloat16": ({"factorize": False, "dtype": torch.bfloat16}, 3e-2),
}
by_path = pytest.mark.parametrize("path", PATHS)
ROUNDING = {"factorized": 1e-5, "products": 1e-5, "products in bfloat16": 1e-2}


def iterate(M: Tensor, k: int, path: str, steps: int = 8, basis: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Several steps on one matrix that does not change, from a random basis."""
    side = min(M.shape[-2:])
    if basis is None:
        basis = random_basis(side, basis_columns(k, side), seed=0).expand(*M.shape[:-2], -1, -1)
    options, _ = PATHS[path]
    for step in range(steps):
        out, basis = warm_topk_polar(M, k, basis, cold=step == 0, **options)
    return out, basis


@pytest.mark.parametrize(
    ("k", "side", "oversampling", "columns"),
    [
        (100, 400, 0.1, 126),
        (101, 400, 0.5, 168),
        (4, 400, 0.1, 21),
        (4, 12, 0.1, 12),
        (12, 12, 0.1, 12),
        (1, 1, 0.1, 1),
    ],
)
def test_basis_columns(k: int, side: int, oversampling: float, columns: int) -> None:
    assert basis_columns(k, side, oversampling) == columns


def test_a_random_basis_is_its_seed() -> None:
    torch.manual_seed(1)
    first = random_basis(40, 30, seed=7)
    torch.manual_seed(2)
    assert torch.equal(first, random_basis(40, 30, seed=7))
    assert not torch.equal(first, random_basis(40, 30, seed=8))
    assert first.shape == (40, 30)
    assert first.dtype == torch.float32
    assert first.std().item() == pytest.approx(1, abs=0.1)  # 1200 draws: 0.02


@by_path
@pytest.mark.parametrize("k", [1, 8, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_comes_to_the_exact_step_and_its_basis_to_the_singular_vectors(
    shape: tuple[int, int], k: int, path: str
) -> None:
    M = with_spectrum(*shape, GAPS)
    out, basis = iterate(M, k, path)
    assert out.shape == M.shape
    assert out.dtype == basis.dtype == torch.float32
    tolerance = PATHS[path][1]
    assert (out.double() - reference(M, k)).norm() / k**0.5 < tolerance
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    vectors = Vh if shape[0] >= shape[1] else U.mT
    assert basis.shape == (60, basis_columns(k, 60))
    # The largest first: each column is its singular vector but for a sign.
    assert (vectors[:k] @ basis[:, :k].double()).diagonal().abs().min() > 1 - 2 * tolerance


@by_path
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_is_feasible_wherever_the_basis_stands(shape: tuple[int, int], path: str) -> None:
    """Singular values 0 and 1, k of them, after a single step from a random basis; no spectral gap."""
    out, basis = warm_topk_polar(torch.randn(shape), 20, random_basis(60, 38, seed=3), **PATHS[path][0])
    expected = (torch.arange(60) < 20).float()
    torch.testing.assert_close(torch.linalg.svdvals(out), expected, atol=ROUNDING[path], rtol=0)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(38), atol=1e-5, rtol=0)


@by_path
def test_a_matrix_and_its_transpose_step_alike(path: str) -> None:
    M, basis = torch.randn(50, 80), random_basis(50, 30, seed=1)
    out, V = warm_topk_polar(M, 12, basis, **PATHS[path][0])
    transposed, W = warm_topk_polar(M.mT, 12, basis, **PATHS[path][0])
    torch.testing.assert_close(out, transposed.mT, atol=ROUNDING[path], rtol=0)
    torch.testing.assert_close(V, W, atol=ROUNDING[path], rtol=0)


@pytest.mark.parametrize("path", ["factorized", "products"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_turns_with_the_matrix_and_the_basis(shape: tuple[int, int], path: str) -> None:
    """step(Q M P^T) = Q step(M) P^T, also where nothing has converged: noise, one step from a random basis."""
    M, (Q, P) = torch.randn(shape), (orthonormal(n, n).float() for n in shape)
    smaller, basis = (P if shape[0] >= shape[1] else Q), random_basis(60, 20, seed=2)
    out, V = warm_topk_polar(M, 8, basis, **PATHS[path][0])
    turned, W = warm_topk_polar(Q @ M @ P.mT, 8, smaller @ basis, **PATHS[path][0])
    torch.testing.assert_close(turned, Q @ out @ P.mT, atol=1e-4, rtol=0)
    signs = (W * (smaller @ V)).sum(0).sign()  # of an eigenvector: either
    torch.testing.assert_close(W, smaller @ V * signs, atol=1e-4, rtol=0)


@by_path
@pytest.mark.parametrize("batch", [(2, 3), (0,)])
def test_a_batch_is_its_matrices(batch: tuple[int, ...], path: str) -> None:
    """On scales from 1e-20 to 1e20."""
    count = torch.Size(batch).numel()
    M = torch.randn(count, 20, 30) * torch.logspace(-20, 20, 6)[:count, None, None]
    bases = torch.randn(count, 20, 14)
    options, _ = PATHS[path]
    out, new = warm_topk_polar(M.reshape(*batch, 20, 30), 9, bases.reshape(*batch, 20, 14), **options)
    assert out.shape == (*batch, 20, 30)
    assert new.shape == (*batch, 20, 14)
    for i in range(count):
        alone, basis = warm_topk_polar(M[i], 9, bases[i], **options)
        torch.testing.assert_close(out.flatten(0, -3)[i], alone, atol=ROUNDING[path], rtol=0)
        torch.testing.assert_close(new.flatten(0, -3)[i], basis, atol=10 * ROUNDING[path], rtol=0)


@by_path
@pytest.mark.parametrize("shape", SHAPES)
def test_directions_without_signal_get_no_step_and_room_for_new_ones(shape: tuple[int, int], path: str) -> None:
    """Rank 4 asked for 9: what is left of the basis is random, so that a matrix of full rank is found from it."""
    options, tolerance = PATHS[path]
    low = with_spectrum(*shape, torch.where(torch.arange(60) < 4, GAPS, 0))
    out, basis = iterate(low, 9, path)
    if path != "products in bfloat16":  # rounded to bfloat16, the matrix has full rank
        torch.testing.assert_close(out.double(), reference(low, 4), atol=1e-4, rtol=0)
    assert basis.norm(dim=0).min() > 0.5
    new = with_spectrum(*shape, GAPS)
    for _ in range(8):
        out, basis = warm_topk_polar(new, 9, basis, **options)
    assert (out.double() - reference(new, 9)).norm() / 3 < tolerance


@by_path
def test_zero_steps_nowhere_and_blinds_to_nothing(path: str) -> None:
    """QR of zero is the identity: a basis of axes, which would never see what lies along the other axes alone."""
    out, basis = iterate(torch.zeros(90, 60), 5, path)
    assert torch.equal(out, torch.zeros(90, 60))
    M = torch.zeros(90, 60)
    M[:, 30:] = torch.randn(90, 30)
    for _ in range(8):
        out, basis = warm_topk_polar(M, 5, basis, **PATHS[path][0])
    assert lmo_ratio(M, out, 5) > 0.99


@by_path
def test_a_cold_basis_takes_three_iterations(path: str) -> None:
    """The three in one do without the rotations between, which leave the span of the basis where it is."""
    M, basis = torch.randn(90, 60), random_basis(60, 26, seed=5)
    options, _ = PATHS[path]
    _, V = warm_topk_polar(M, 8, basis, cold=True, **options)
    distances = []
    for _ in range(4):
        _, basis = warm_topk_polar(M, 8, basis, **options)
        distances.append((V @ V.mT - basis @ basis.mT).norm() / 26**0.5)
    # Noise turns the span by a tenth or more in each iteration, a product rounded to bfloat16 by less than a hundredth.
    assert distances[2] < (0.01 if "dtype" in options else 1e-4)
    assert min(distances[1], distances[3]) > 0.1


def test_a_basis_kept_in_bfloat16_serves() -> None:
    M = with_spectrum(90, 60, GAPS)
    _, basis = iterate(M, 8, "factorized")
    out, _ = warm_topk_polar(M, 8, basis.bfloat16())
    # One iteration halves the 0.4 % of the rounding at least: the next direction outside is 0.8^26 of the first.
    assert (out.double() - reference(M, 8)).norm() / 8**0.5 < 2e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_krylov_is_the_exact_step_within_the_space_of_the_paper(shape: tuple[int, int]) -> None:
    """span [A G, A^2 G] with A = M^T M, in float64 and without the QR between: on noise, where the space decides."""
    M, k = torch.randn(shape), 6
    tall = (M if shape[0] >= shape[1] else M.mT).double()
    G = random_basis(60, k + 8, seed=4).double()
    first = tall.mT @ (tall @ G)
    Q = torch.linalg.qr(torch.cat([first, tall.mT @ (tall @ first)], dim=-1)).Q
    expected = reference(tall @ Q, k) @ Q.mT
    out = krylov_topk_polar(M, k, seed=4)
    torch.testing.assert_close(out.double(), expected if shape[0] >= shape[1] else expected.mT, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_krylov_of_a_falling_spectrum_is_the_exact_step(shape: tuple[int, int]) -> None:
    """The space it leaves out begins at 0.8^(2 (k + 8)). One matrix of a batch does not touch the other."""
    M = torch.stack([with_spectrum(*shape, GAPS), 1e30 * with_spectrum(*shape, GAPS)])
    out = krylov_topk_polar(M, 10)
    torch.testing.assert_close(out.double(), reference(M, 10), atol=1e-3, rtol=0)
    expected = (torch.arange(60) < 10).float().expand(2, 60)
    torch.testing.assert_close(torch.linalg.svdvals(out), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("k", "exact"), [(3, False), (4, True), (12, True)])
def test_krylov_takes_the_exact_step_where_the_blocks_fill_the_side(k: int, exact: bool) -> None:
    """2 (k + 8) columns of 24."""
    M = torch.randn(30, 24)
    assert torch.equal(krylov_topk_polar(M, k), topk_polar(M, k)) == exact
