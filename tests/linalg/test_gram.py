"""Half of the work, and the same sum of outer products."""

from __future__ import annotations

import pytest
import torch

from lowrank_kit.linalg.gram import MIRRORED_ROWS, NARROWEST, PANELS, add_gram_, at_least_float32, mirror_

# One panel, at its limit, two, not divisible, as many as there are, more than that, and than
# are mirrored together.
WIDTHS = [1, 5, NARROWEST, 2 * NARROWEST - 1, 2 * NARROWEST, PANELS * NARROWEST, 500, 2 * MIRRORED_ROWS + 3]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_gram_is_that_of_its_definition(width: int) -> None:
    x = torch.randn(70, width, dtype=torch.float64)
    total = mirror_(add_gram_(torch.zeros(width, width, dtype=torch.float64), x))
    torch.testing.assert_close(total, x.mT @ x, rtol=0, atol=1e-11)
    assert torch.equal(total, total.mT)


@pytest.mark.parametrize("width", WIDTHS)
def test_batches_add_up_whatever_is_below_the_diagonal(width: int) -> None:
    x = torch.randn(70, width, dtype=torch.float64)
    total = torch.full((width, width), torch.nan, dtype=torch.float64).tril(-1)
    for batch in x.split([1, 40, 0, 29]):
        assert add_gram_(total, batch) is total
    torch.testing.assert_close(mirror_(total), x.mT @ x, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_made_in_float32(dtype: torch.dtype) -> None:
    """Those of 16-bit numbers are exact in it; in their own format they would be off by 1e-3 or more."""
    x = torch.randn(50, 500).to(dtype)
    total = mirror_(add_gram_(torch.zeros(500, 500, dtype=torch.float64), x))
    expected = x.double().mT @ x.double()
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_the_sum_is_in_the_dtype_of_the_total() -> None:
    """2^24 + 1 is none of the numbers of float32."""
    total = 2.0**24 * torch.ones(200, 200, dtype=torch.float64)
    for _ in range(10):
        add_gram_(total, torch.ones(1, 200, dtype=torch.bfloat16))
    assert (mirror_(total) == 2.0**24 + 10).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("column", [0, 130, 399])
def test_the_diagonal_shows_what_is_not_finite(value: float, column: int) -> None:
    x = torch.randn(8, 400)
    x[3, column] = value
    total = add_gram_(torch.zeros(400, 400, dtype=torch.float64), x)
    assert total.diagonal().isfinite().logical_not().nonzero().flatten().tolist() == [column]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_at_least_float32(dtype: torch.dtype) -> None:
    x = torch.randn(3).to(dtype)
    wide = at_least_float32(x)
    assert wide.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(wide.to(dtype), x)
