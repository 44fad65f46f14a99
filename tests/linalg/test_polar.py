"""The polar factor by matrix products: Muon's Newton-Schulz, and the best quintics."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank_kit.linalg.polar import POLAR_EXPRESS_FLOOR, newton_schulz, polar_express, polar_express_quintics
from tests.linalg.cases import CASES, DTYPES, with_spectrum

# Name -> (the function, where it takes singular values from 0.04 of the norm up).
POLARS: dict[str, tuple[Callable[..., Tensor], float, float]] = {
    "newton_schulz": (newton_schulz, 0.65, 1.2),
    "polar_express": (polar_express, 0.99, 1.01),
}
by_name = pytest.mark.parametrize("name", POLARS)


@by_name
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (12, 12), (3, 12, 20), (2, 3, 20, 12)])
def test_singular_values_come_near_one_and_singular_vectors_stay(shape: tuple[int, ...], name: str) -> None:
    """A spectrum from 1 to 0.1 is at least 0.04 once divided by its norm; Muon takes [0.04, 1] to [0.68, 1.13]."""
    polar, least, most = POLARS[name]
    *batch, rows, columns = shape
    M = torch.stack([with_spectrum(rows, columns, torch.linspace(1, 0.1, 12)) for _ in range(2 * 3)])
    M = M[: max(1, torch.Size(batch).numel())].reshape(shape)
    out = polar(M)
    assert out.shape == M.shape
    assert out.dtype == M.dtype
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    core = U.mT @ out.double() @ Vh.mT
    values = core.diagonal(dim1=-2, dim2=-1)
    assert values.min() > least
    assert values.max() < most
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


@by_name
@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-20, 1e20, 1e37])
def test_scale_does_not_matter(scale: float, name: str) -> None:
    """Also where the squares of the entries leave the range of float32."""
    polar, *_ = POLARS[name]
    M = torch.randn(8, 12)
    torch.testing.assert_close(polar(M * scale), polar(M), atol=1e-5, rtol=0)


@by_name
def test_a_batch_is_its_matrices(name: str) -> None:
    polar, *_ = POLARS[name]
    M = torch.randn(3, 6, 10) * torch.tensor([1e-10, 1.0, 1e10])[:, None, None]
    torch.testing.assert_close(polar(M), torch.stack([polar(m) for m in M]), atol=1e-5, rtol=0)


@by_name
def test_bfloat16_products_are_coarser_but_no_different(name: str) -> None:
    """Fifteen products with 8 bits of mantissa: 2 %, far below the spread of the singular values themselves."""
    polar, *_ = POLARS[name]
    M = torch.randn(16, 24)
    coarse, fine = polar(M, dtype=torch.bfloat16), polar(M)
    assert coarse.dtype == torch.float32
    relative = ((coarse - fine).norm() / fine.norm()).item()
    assert 1e-4 < relative < 0.05


@by_name
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_contract(case: str, dtype: torch.dtype, name: str) -> None:
    polar, least, most = POLARS[name]
    exact, rank = CASES[case]()
    out = polar(exact.to(dtype))
    assert out.shape == exact.shape
    assert out.dtype == torch.promote_types(dtype, torch.float32)
    assert out.isfinite().all()
    # The first singular value of any matrix of rank up to 8 starts at 1 / sqrt(8) or above.
    first = torch.linalg.svdvals(out)[0].item()
    assert (first == 0) if rank == 0 else (least < first < most)


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_polar_express_sends_all_above_its_floor_within_one_percent_of_one(shape: tuple[int, int]) -> None:
    """From the norm down to its thousandth, where five Newton-Schulz steps leave 0.5 and less."""
    M = with_spectrum(*shape, torch.logspace(0, -2.7, 16))
    assert POLAR_EXPRESS_FLOOR < torch.linalg.svdvals(M)[-1] / M.norm() < 1.5 * POLAR_EXPRESS_FLOOR
    assert (torch.linalg.svdvals(polar_express(M)) - 1).abs().max() < 0.01
    s = torch.linspace(POLAR_EXPRESS_FLOOR, 1, 100_001, dtype=torch.float64)
    for a, b, c in polar_express_quintics(6, POLAR_EXPRESS_FLOOR):
        s = a * s + b * s**3 + c * s**5
    assert (s - 1).abs().max() < 0.01


def test_polar_express_in_bfloat16_does_not_diverge() -> None:
    """A hundred directions of one size, each rounded past one now and then: the margin keeps the steep tails away."""
    values = torch.linalg.svdvals(polar_express(with_spectrum(100, 150, torch.ones(100)), dtype=torch.bfloat16))
    assert (values - 1).abs().max() < 0.03


@pytest.mark.parametrize("floor", [1e-3, 1e-2, 0.3])
def test_each_quintic_is_the_best_by_equioscillation(floor: float) -> None:
    """Chebyshev: a x + b x^3 + c x^5 is the closest to 1 just if its error has one size and alternates at four points.

    Each faces the image of the interval before it, [1 - E, 1 + E].
    """
    lower, upper = floor, 1.0
    errors = []
    for a, b, c in polar_express_quintics(6, floor):
        if upper - lower > 1e-4:
            x = np.linspace(lower, upper, 200_001)
            error = 1 - (a * x + b * x**3 + c * x**5)
            errors.append(np.abs(error).max())
            # Signs of the stretches where the error is at its largest, one after the other. The grid misses the
            # extrema by half a step: 1e-10 of them. 1e-13 is what float64 has left of 1 - p.
            peaks = np.sign(error[np.abs(error) > errors[-1] * (1 - 1e-7) - 1e-13])
            alternations = peaks[np.insert(np.diff(peaks) != 0, 0, True)]
            assert alternations.tolist() == [1, -1, 1, -1]
        else:  # the four points fall together, at the fixed point of order three
            x = np.array([lower, upper])
            errors.append(np.abs(1 - (a * x + b * x**3 + c * x**5)).max())
            assert errors[-1] < 1e-11
        lower, upper = 1 - errors[-1], 1 + errors[-1]
    assert errors == sorted(errors, reverse=True) or errors[-1] < 1e-11
