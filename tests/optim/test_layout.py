"""Parameters as the matrices they hold: fused, interleaved, transposed, stacked; each steps as it would alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowrank_kit.optim import NuMuon
from lowrank_kit.optim.layout import Layout
from tests.optim.cases import MATRIX_RULES, RULES, gradients, steps_of

LR, DECAY = 0.02, 0.1
# Rows of q, k and v: (8, 4, 4), in one run or in two heads of (4, 2, 2).
CONTIGUOUS = [list(range(8)), list(range(8, 12)), list(range(12, 16))]
INTERLEAVED = [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    transposed=st.booleans(),
    split=st.lists(st.integers(1, 5), max_size=4).map(tuple),
    groups=st.integers(1, 3),
    leading=st.lists(st.integers(0, 3), max_size=2),
    columns=st.integers(1, 4),
)
def test_parts_and_join_are_inverse(
    transposed: bool, split: tuple[int, ...], groups: int, leading: list[int], columns: int
) -> None:
    layout = Layout(transposed, split, groups)
    X = torch.rand(*leading, groups * sum(split) or 3, columns)
    X = X.mT if transposed else X
    parts = layout.parts(X)
    assert torch.equal(layout.join(parts), X)
    assert [part.shape[-2] for part in parts] == ([groups * size for size in split] or [3])
    assert all(part.shape[:-2] == X.shape[:-2] and part.shape[-1] == columns for part in parts)


@pytest.mark.parametrize(("groups", "split", "rows"), [(1, (8, 4, 4), CONTIGUOUS), (2, (4, 2, 2), INTERLEAVED)])
def test_parts_are_the_rows_of_the_runs(groups: int, split: tuple[int, ...], rows: list[list[int]]) -> None:
    X = torch.arange(16.0)[:, None] + torch.tensor([0, 0.5])
    for part, expected in zip(Layout(False, split, groups).parts(X), rows, strict=True):
        assert torch.equal(part, X[expected])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("groups", "split", "rows"), [(1, (8, 4, 4), CONTIGUOUS), (2, (4, 2, 2), INTERLEAVED)])
@pytest.mark.parametrize(("rule", "topk"), [("muon", "exact"), ("numuon", "exact"), ("numuon", "warm")])
def test_a_fused_parameter_steps_as_its_parts_would(
    rule: str, topk: str, groups: int, split: tuple[int, ...], rows: list[list[int]], transposed: bool
) -> None:
    """Parts on scales 1e4 apart, and a scale that hangs on the shape, so that a step of the whole would show."""
    options: dict[str, Any] = {"rule": rule, "topk": topk, "rank_schedule": "fixed:0.5", "scale": "spectral"}
    options |= {"lr": LR, "weight_decay": DECAY, "spectral_decay": DECAY}
    loud = torch.ones(16, 1)
    loud[rows[1]], loud[rows[2]] = 1e2, 1e-2
    start, grads = torch.randn(16, 12), [grad * loud for grad in gradients((16, 12))]
    fused = nn.Parameter(start.mT.clone() if transposed else start.clone())
    layout = {"params": [fused], "split": split, "split_groups": groups, "transposed": transposed}
    together = steps_of(NuMuon([layout], **options), fused, [g.mT if transposed else g for g in grads])[-1]
    together = together.mT if transposed else together
    for each in rows:
        part = nn.Parameter(start[each].clone())
        alone = steps_of(NuMuon([part], **options), part, [grad[each] for grad in grads])[-1]
        # The products of six steps may sum in another order.
        torch.testing.assert_close(together[each], alone, atol=2e-6, rtol=0)


@pytest.mark.parametrize("scale", ["match_rms", "spectral", "none"])
@pytest.mark.parametrize("rule", MATRIX_RULES)
@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_a_transposed_parameter_takes_the_transposed_step(shape: tuple[int, int], rule: str, scale: str) -> None:
    options: dict[str, Any] = {"rule": rule, "scale": scale, "lr": LR, "weight_decay": DECAY, "spectral_decay": DECAY}
    start, grads = torch.randn(shape), gradients(shape)
    upright, lying = nn.Parameter(start.clone()), nn.Parameter(start.mT.clone())
    expected = steps_of(NuMuon([upright], rank_schedule="fixed:0.5", **options), upright, grads)
    group = {"params": [lying], "transposed": True}
    measured = steps_of(NuMuon([group], rank_schedule="fixed:0.5", **options), lying, [g.mT for g in grads])
    for one, other in zip(measured, expected, strict=True):
        # Strides choose the order in which products sum.
        torch.testing.assert_close(one.mT, other, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", [{}, {"split": (6, 2)}, {"split": (9, 3), "transposed": True}])
@pytest.mark.parametrize("rule", MATRIX_RULES)
def test_fused_experts_are_stepped_one_by_one(rule: str, layout: dict[str, Any]) -> None:
    """Gradients on scales 1e4 apart, so that a norm over the whole tensor would show."""
    grads = [g * torch.tensor([1e-2, 1.0, 1e2])[:, None, None] for g in gradients((3, 8, 12))]
    fused = nn.Parameter(torch.randn(3, 8, 12))
    single = [nn.Parameter(expert.clone()) for expert in fused.detach()]
    options: dict[str, Any] = {"rule": rule, "lr": LR, "weight_decay": DECAY, "spectral_decay": DECAY}
    options |= {"rank_schedule": "fixed:0.5"}
    together = steps_of(NuMuon([{"params": [fused], **layout}], **options), fused, grads)[-1]
    apart = [
        steps_of(NuMuon([{"params": [parameter], **layout}], **options), parameter, [g[expert] for g in grads])[-1]
        for expert, parameter in enumerate(single)
    ]
    # Batched and single products may sum in another order.
    torch.testing.assert_close(together, torch.stack(apart), atol=2e-6, rtol=0)


@pytest.mark.parametrize("rule", MATRIX_RULES)
def test_an_expert_without_tokens_is_left_alone(rule: str) -> None:
    """Neither step, nor decay of any kind, nor momentum: as if the other experts had been stepped without it."""
    options: dict[str, Any] = {"rule": rule, "lr": LR, "weight_decay": DECAY, "spectral_decay": DECAY}
    parameter = nn.Parameter(torch.randn(3, 8, 12))
    optimizer = NuMuon([parameter], rank_schedule="fixed:0.5", **options)
    grads = gradients((3, 8, 12), 3)
    for step, grad in enumerate(grads):
        if step:
            grad[1] = 0
        before = parameter.detach().clone()
        momentum = optimizer.state[parameter]["momentum"].clone() if step else torch.zeros(3, 8, 12)
        steps_of(optimizer, parameter, [grad])
        stayed = [torch.equal(parameter[i], before[i]) for i in range(3)]
        kept = [torch.equal(optimizer.state[parameter]["momentum"][i], momentum[i]) for i in range(3)]
        assert stayed == kept == [False, step > 0, False]


@pytest.mark.parametrize("rule", RULES)
def test_a_matrix_with_a_zero_gradient_goes_on(rule: str) -> None:
    """Its momentum still steps and fades, and it decays: a zero gradient is a gradient."""
    parameter = nn.Parameter(torch.randn(8, 12))
    optimizer = NuMuon([parameter], rule=rule, lr=LR, weight_decay=DECAY, rank_schedule="fixed:0.5")
    steps_of(optimizer, parameter, gradients((8, 12), 1))
    key = "exp_avg" if rule == "adamw" else "momentum"
    before, momentum = parameter.detach().clone(), optimizer.state[parameter][key].clone()
    steps_of(optimizer, parameter, [torch.zeros(8, 12)])
    faded = 0.9 if rule == "adamw" else 0.95
    torch.testing.assert_close(optimizer.state[parameter][key], faded * momentum)
    assert ((parameter - before).norm() > LR * DECAY * before.norm()).item()
