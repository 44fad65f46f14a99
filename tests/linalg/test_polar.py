"""Newton-Schulz: near the polar factor, on every scale, for every shape."""

from __future__ import annotations

import pytest
import torch

from lowrank_kit.linalg.polar import newton_schulz
from tests.linalg.cases import CASES, DTYPES, with_spectrum


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (12, 12), (3, 12, 20), (2, 3, 20, 12)])
def test_singular_values_come_near_one_and_singular_vectors_stay(shape: tuple[int, ...]) -> None:
    """A spectrum from 1 to 0.1 is at least 0.04 once divided by its norm; five steps take [0.04, 1] to [0.68, 1.13]."""
    *batch, rows, columns = shape
    M = torch.stack([with_spectrum(rows, columns, torch.linspace(1, 0.1, 12)) for _ in range(2 * 3)])
    M = M[: max(1, torch.Size(batch).numel())].reshape(shape)
    out = newton_schulz(M)
    assert out.shape == M.shape
    assert out.dtype == torch.float32
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    core = U.mT @ out.double() @ Vh.mT
    values = core.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.65
    assert values.max() < 1.2
    # The iteration is a polynomial in M M^T: it has no way to turn a singular vector. float32 products.
    assert (core - torch.diag_embed(values)).abs().max() < 1e-5


def test_a_polynomial_of_the_singular_values_in_numbers() -> None:
    """Five times s -> 3.4445 s - 4.775 s^3 + 2.0315 s^5, worked out on the singular values in float64."""
    s = torch.linspace(1, 0.1, 12, dtype=torch.float64)
    expected = s / s.norm()
    for _ in range(5):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    measured = torch.linalg.svdvals(newton_schulz(with_spectrum(12, 20, s)).double())
    torch.testing.assert_close(measured, expected.sort(descending=True).values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-20, 1e20, 1e37])
def test_scale_does_not_matter(scale: float) -> None:
    """Also where the squares of the entries leave the range of float32."""
    M = torch.randn(8, 12)
    torch.testing.assert_close(newton_schulz(M * scale), newton_schulz(M), atol=1e-5, rtol=0)


def test_a_batch_is_its_matrices() -> None:
    M = torch.randn(3, 6, 10) * torch.tensor([1e-10, 1.0, 1e10])[:, None, None]
    torch.testing.assert_close(newton_schulz(M), torch.stack([newton_schulz(m) for m in M]), atol=1e-5, rtol=0)


def test_bfloat16_products_are_coarser_but_no_different() -> None:
    """Fifteen products with 8 bits of mantissa: 2 %, far below the spread of the singular values themselves."""
    M = torch.randn(16, 24)
    coarse, fine = newton_schulz(M, dtype=torch.bfloat16), newton_schulz(M)
    assert coarse.dtype == torch.float32
    relative = ((coarse - fine).norm() / fine.norm()).item()
    assert 1e-4 < relative < 0.05


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_contract(case: str, dtype: torch.dtype) -> None:
    exact, rank = CASES[case]()
    out = newton_schulz(exact.to(dtype))
    assert out.shape == exact.shape
    assert out.dtype == torch.float32
    assert out.isfinite().all()
    # The first singular value of any matrix of rank up to 8 starts at 1 / sqrt(8) or above.
    assert torch.linalg.svdvals(out)[0] == (0 if rank == 0 else pytest.approx(0.95, abs=0.3))
