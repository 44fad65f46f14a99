"""The rank-k step as a filter of the spectrum, against the exact one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_kit.linalg import spectral_filter
from lowrank_kit.linalg.spectral_filter import filter_topk_polar, first_threshold
from lowrank_kit.linalg.topk import lmo_ratio
from tests.linalg.cases import with_spectrum
from tests.linalg.test_topk import reference

# A gap of a fifth after each of sixteen: every k has one top-k part, and the last is 0.035 of the first.
GAPS = 0.8 ** torch.arange(16, dtype=torch.float64)
SHAPES = [(16, 30), (30, 16), (16, 16)]


@pytest.fixture
def polars(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Grows by one with every polar factor that is taken: one of the matrix, then one for each threshold tried."""
    taken: list[torch.Size] = []
    real = spectral_filter.polar_express

    def counted(M: Tensor, **options: object) -> Tensor:
        taken.append(M.shape)
        return real(M, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(spectral_filter, "polar_express", counted)
    return taken


@pytest.mark.parametrize("k", [1, 4, 12, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_with_a_gap_it_is_the_exact_step(shape: tuple[int, int], k: int) -> None:
    M = with_spectrum(*shape, GAPS)
    out, threshold = filter_topk_polar(M, k)
    assert out.shape == M.shape
    assert out.dtype == threshold.dtype == torch.float32
    assert threshold.shape == (1, 1)
    # Eight quintics in float32 bring a singular value within 1e-5 of one, and a sign at 10 % from its edge likewise;
    # where k is reached by 1 % less, that much is missing.
    assert (out.double() - reference(M, k)).norm() / k**0.5 < 0.015
    below, above = (GAPS[k] if k < 16 else 0) / GAPS.norm(), GAPS[k - 1] / GAPS.norm()
    assert below < threshold.item() < above


@pytest.mark.parametrize("k", range(1, 16))
@pytest.mark.parametrize("seed", range(3))
def test_without_a_gap_it_is_feasible_and_as_good(k: int, seed: int) -> None:
    """Noise: the edge passes in part, at any k. The count may miss k by 1 %, and the LMO ratio by as much."""
    torch.manual_seed(seed)
    M = torch.randn(16, 24)
    out, _ = filter_topk_polar(M, k)
    s = torch.linalg.svdvals(out.double())
    assert s[0] < 1 + 1e-4
    assert s.sum() < k * (1 + 1e-4)
    assert lmo_ratio(M, out, k) > 0.99


@pytest.mark.parametrize("k", range(1, 9))
def test_a_budget_that_ends_between_equal_singular_values_is_shared(k: int) -> None:
    """No projector has k directions of a plateau; all of them, scaled down, are as good for the budget."""
    M, threshold = torch.eye(9, 14), None
    for _ in range(3):
        out, threshold = filter_topk_polar(M, k, threshold)
    torch.testing.assert_close(torch.linalg.svdvals(out), torch.full((9,), k / 9), atol=1e-4, rtol=0)
    assert lmo_ratio(M, out, k) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_directions_without_signal_get_no_step(shape: tuple[int, int]) -> None:
    M = with_spectrum(*shape, torch.where(torch.arange(16) < 4, GAPS, 0)).float()
    out, threshold = filter_topk_polar(M, 9)
    assert lmo_ratio(M, out, 9) > 0.99
    s = torch.linalg.svdvals(out)
    torch.testing.assert_close(s[:4], torch.ones(4), atol=0.01, rtol=0)
    assert s[4] < 0.01  # rounding, of 1e-7, that the polar factor has amplified
    assert threshold.item() >= 1e-8


def test_zero_steps_nowhere() -> None:
    out, threshold = filter_topk_polar(torch.zeros(5, 8), 2)
    assert torch.equal(out, torch.zeros(5, 8))
    assert 0 < threshold.item() < first_threshold(2)


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e20, 1e37])
def test_scale_does_not_matter(scale: float) -> None:
    M = torch.randn(16, 24)
    (out, threshold), (scaled, other) = filter_topk_polar(M, 5), filter_topk_polar(M * scale, 5)
    torch.testing.assert_close(scaled, out, atol=1e-3, rtol=0)
    torch.testing.assert_close(other, threshold, rtol=1e-3, atol=0)


def test_a_batch_is_its_matrices() -> None:
    """The first is done at once, the plateau never: going on for the one does not move the other."""
    easy = with_spectrum(9, 14, torch.tensor([1.0] * 4 + [1e-2] * 5)).float()
    M = torch.stack([easy, torch.eye(9, 14), torch.randn(9, 14), torch.zeros(9, 14)]).reshape(2, 2, 9, 14)
    out, threshold = filter_topk_polar(M, 4)
    assert out.shape == M.shape
    assert threshold.shape == (2, 2, 1, 1)
    for m, step, t in zip(M.flatten(0, 1), out.flatten(0, 1), threshold.flatten(0, 1), strict=True):
        alone, its = filter_topk_polar(m, 4)
        torch.testing.assert_close(step, alone, atol=1e-4, rtol=0)
        torch.testing.assert_close(t, its, rtol=1e-4, atol=0)
    empty, none = filter_topk_polar(M.flatten(0, 1)[:0], 4)
    assert empty.shape == (0, 9, 14)
    assert none.shape == (0, 1, 1)


def test_the_threshold_of_the_step_before_is_tried_first(polars: list[torch.Size]) -> None:
    M = with_spectrum(16, 24, GAPS)
    first, threshold = filter_topk_polar(M, 5)
    searched = len(polars)
    assert searched > 2
    again, kept = filter_topk_polar(M, 5, threshold)
    assert len(polars) - searched == 2
    assert polars[-1] == (16, 16)  # on the smaller side
    assert torch.equal(again, first)
    assert torch.equal(kept, threshold)


@pytest.mark.parametrize("start", [1e-5, 0.9, 100.0])
def test_a_threshold_that_is_far_off_finds_its_way(start: float) -> None:
    M = with_spectrum(16, 24, GAPS)
    out, threshold = filter_topk_polar(M, 5, torch.full((1, 1), start))
    assert (out.double() - reference(M, 5)).norm() / 5**0.5 < 0.015
    assert GAPS[5] / GAPS.norm() < threshold.item() < GAPS[4] / GAPS.norm()
