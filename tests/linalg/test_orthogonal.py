"""Q R by Cholesky factors: as orthonormal as Householder's, in as few passes as that takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_kit.linalg.orthogonal import orthonormalize


def assert_is_qr(Y: Tensor, Q: Tensor, R: Tensor) -> None:
    """To 1e-5, column by column: ten roundings of float32 over sums of 8 to 60 terms."""
    assert Q.shape == Y.shape
    assert R.shape == (*Y.shape[:-2], Y.shape[-1], Y.shape[-1])
    eye = torch.eye(Y.shape[-1]).expand_as(R)
    torch.testing.assert_close(Q.mT @ Q, eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(R, R.triu(), atol=0, rtol=0)
    # In float64, which holds the squares of 1e-37.
    error, size = (Q.double() @ R.double() - Y.double()).norm(dim=-2), Y.double().norm(dim=-2)
    assert (error <= 1e-5 * size).all()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each factorization as it is taken: "cholesky" or "qr"."""
    names: list[str] = []

    def noted(name: str, factorize: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def call(A: Tensor) -> Any:
            names.append(name)
            return factorize(A)

        return call

    monkeypatch.setattr(torch.linalg, "cholesky_ex", noted("cholesky", torch.linalg.cholesky_ex))
    monkeypatch.setattr(torch.linalg, "qr", noted("qr", torch.linalg.qr))
    return names


def conditioned(rows: int, columns: int, decades: float) -> Tensor:
    """Columns in random directions whose matrix has a condition of 10^decades."""
    U, _, Vh = torch.linalg.svd(torch.randn(rows, columns), full_matrices=False)
    return U * torch.logspace(0, -decades, columns) @ Vh


@pytest.mark.parametrize("shape", [(20, 8), (8, 8), (30, 1), (3, 20, 8), (2, 3, 16, 5), (0, 20, 8)])
def test_it_is_a_qr_decomposition(shape: tuple[int, ...]) -> None:
    Y = torch.randn(shape)
    assert_is_qr(Y, *orthonormalize(Y))


@pytest.mark.parametrize("spread", [6, 12, 20])
def test_orthogonal_columns_of_any_size_take_one_pass(spread: int, taken: list[str]) -> None:
    """Norms from 1 down to 1e-20, in falling, rising and mixed order: squared in one Gram they would be gone."""
    U = torch.linalg.svd(torch.randn(3, 40, 8), full_matrices=False).U
    sizes = torch.logspace(0, -spread, 8)
    Y = U * torch.stack([sizes, sizes.flip(0), sizes[torch.randperm(8)]])[:, None, :]
    Q, R = orthonormalize(Y)
    assert_is_qr(Y, Q, R)
    assert taken == ["cholesky"]
    assert (R.diagonal(dim1=-2, dim2=-1) > 0).all()


@pytest.mark.parametrize(("decades", "passes"), [(0.1, ["cholesky"]), (2.5, ["cholesky"] * 2)])
def test_passes_by_the_condition(decades: float, passes: list[str], taken: list[str]) -> None:
    """One pass leaves eps cond^2: 1 % of the identity at a condition of 300."""
    Y = conditioned(60, 10, decades)
    assert_is_qr(Y, *orthonormalize(Y))
    assert taken == passes


def test_the_leading_columns_keep_their_span() -> None:
    Y = torch.randn(30, 6)
    Q, _ = orthonormalize(Y)
    for count in range(1, 7):
        leading, span = Y[:, :count], Q[:, :count]
        torch.testing.assert_close(span @ (span.mT @ leading), leading, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e30, 1e37])
def test_the_scale_is_in_r(scale: float, taken: list[str]) -> None:
    """Also where the squares of the entries leave the range of float32."""
    Y = torch.randn(30, 6) / 4  # at most 1, so that 1e37 times its norms is in range
    assert_is_qr(scale * Y, *orthonormalize(scale * Y))
    assert "qr" not in taken


@pytest.mark.parametrize("how", ["a zero column", "all zero", "two equal columns"])
def test_dependent_columns(how: str, taken: list[str]) -> None:
    """Also of one matrix in a batch."""
    Y = torch.randn(3, 30, 6)
    if how == "all zero":
        Y[1] = 0
    else:
        Y[1, :, 4] = Y[1, :, 0] * (how == "two equal columns")
    Q, R = orthonormalize(Y)
    # Two equal columns may be parted by their rounding, soundly.
    assert taken[-1] == "qr" or how == "two equal columns"
    assert_is_qr(Y, Q, R)


@pytest.mark.parametrize("exponent", range(-8, 0))
def test_nothing_between_sound_and_dependent_slips_through(exponent: int) -> None:
    """Two columns at every angle from 1e-8 up: whichever way is taken, the columns are orthonormal."""
    Y = torch.randn(40, 8)
    Y[:, 5] = Y[:, 1] + 10.0**exponent * torch.randn(40)
    assert_is_qr(Y, *orthonormalize(Y))


@pytest.mark.parametrize("columns", [4, 6, 8, 12, 20])
@pytest.mark.parametrize("sine", [0.26, 0.3, 0.5, 0.7])
def test_a_chain_of_columns_that_lean_on_one_another(sine: float, columns: int) -> None:
    """Each at a fair angle to those before it, together of a condition up to 1e11: no diagonal of a factor shows it."""
    R = torch.diag(torch.full((columns,), sine)) + torch.diag(torch.full((columns - 1,), (1 - sine**2) ** 0.5), 1)
    Y = torch.linalg.qr(torch.randn(60, columns)).Q @ R
    assert_is_qr(Y, *orthonormalize(Y))
