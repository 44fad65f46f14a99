"""The folded model is, at every step, the one with its multipliers in the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lowrank_kit.optim import NuMuon, parameter_groups
from lowrank_kit.scaling.mup import MuP
from tests.scaling.cases import config, folded, tokens
from tests.scaling.explicit import largest_difference, unfolded

STEPS, NORM = 2, 0.05
# Rank 16 of 48: at 32 the singular values on both sides of the cut are close in GPT-2, and rounding becomes 7e-12.
RULES: dict[str, dict[str, Any]] = {
    "sgd": {"rule": "sgd", "lr": 0.05},
    "adamw": {"rule": "adamw", "lr": 0.01},
    "muon": {"rule": "muon", "lr": 0.01},
    "muon_spectral": {"rule": "muon", "lr": 0.05, "scale": "spectral"},
    "numuon": {"rule": "numuon", "lr": 0.01, "rank_schedule": "fixed:0.3", "topk": "exact", "spectral_decay": 0.3},
}
Make = Callable[[MuP, nn.Module], torch.optim.Optimizer]


@cache
def scaling(family: str, tied: bool, target: tuple[int, int], **options: str) -> MuP:
    return MuP(config(family, 16, 1, tied=tied), config(family, *target, tied=tied), **options)


def ours(optimizer: str) -> Make:
    def make(rule: MuP, model: nn.Module) -> torch.optim.Optimizer:
        groups = parameter_groups(model, adamw_lr=0.01, weight_decay=0.1, momentum_dtype="float64", **RULES[optimizer])
        # An eps that matters, of what AdamW steps.
        return NuMuon(rule.scaled([{**group, "eps": 1e-3} for group in groups]))

    return make


def adamw(rule: MuP, model: nn.Module) -> torch.optim.Optimizer:
    groups = rule.param_groups(model, lr=0.01, weight_decay=0.1, eps=1e-3)
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def sgd(rule: MuP, model: nn.Module) -> torch.optim.Optimizer:
    groups = rule.param_groups(model, lr=0.05, weight_decay=0.01)
    return torch.optim.SGD(groups, momentum=0.9, nesterov=True)


def apart(
    family: str,
    make: Make,
    *,
    tied: bool = False,
    target: tuple[int, int] = (64, 2),
    depth: str = "k2",
    clip: Callable[[MuP, nn.Module], Tensor] = lambda rule, model: rule.clip_grad_norm_(model, NORM),
) -> float:
    """How far the folded model is from the one with multipliers after some steps, relative to the weights."""
    # Groups of ours tell their rule.
    optimizer = make.__name__ if make in (adamw, sgd) else "numuon"
    rule = scaling(family, tied, target, optimizer=optimizer, depth=depth)
    reference = copy(rule)  # all that was found holds for both forms
    reference.form = "explicit"
    model = folded(rule)
    other = unfolded(rule, model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    pairs = [(model, make(rule, model)), (other, make(reference, other))]
    torch.manual_seed(5)
    for _ in range(STEPS):
        ids, norms = tokens(8), []
        for one, steps in pairs:
            steps.zero_grad()
            one(input_ids=ids, labels=ids).loss.backward()
            norms.append(clip(rule, one) if one is model else nn.utils.clip_grad_norm_(one.parameters(), NORM))
            steps.step()
        assert norms[1] > NORM, "clipping is to be at work"
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    return largest_difference(rule, model, other)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("optimizer", RULES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_powers_of_two_are_the_same_bits(family: str, optimizer: str, tied: bool) -> None:
    assert apart(family, ours(optimizer), tied=tied) == 0


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("optimizer", RULES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_other_ratios_are_the_same_but_for_rounding(family: str, optimizer: str, tied: bool) -> None:
    assert apart(family, ours(optimizer), tied=tied, target=(48, 3)) <= 1e-12


@pytest.mark.parametrize("make", [adamw, sgd])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_torch_s_own_optimizers(family: str, make: Make) -> None:
    assert apart(family, make, tied=True) == 0
    assert apart(family, make, tied=False, target=(48, 3)) <= 1e-12


@pytest.mark.parametrize("optimizer", ["adamw", "numuon"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_fused_experts(family: str, optimizer: str) -> None:
    assert apart(family, ours(optimizer)) == 0
    assert apart(family, ours(optimizer), target=(48, 3)) <= 1e-12


@pytest.mark.parametrize("optimizer", ["adamw", "numuon"])
def test_gains_after_branches(optimizer: str) -> None:
    """Gemma multiplies embeddings by sqrt(width), and computes norms in float32, of gains stored as w = gain - 1."""
    assert apart("gemma2", ours(optimizer), tied=True) <= 1e-5


@pytest.mark.parametrize("depth", ["k1", "none"])
def test_other_depth_rules(depth: str) -> None:
    assert apart("llama", ours("numuon"), target=(64, 4), depth=depth) == 0


@pytest.mark.parametrize("make", [adamw, sgd, ours("numuon")])
def test_torch_s_clipping_is_of_another_norm(make: Make) -> None:
    off = apart("llama", make, clip=lambda _, model: nn.utils.clip_grad_norm_(model.parameters(), NORM))
    assert off > 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_target_like_the_base_is_the_plain_model(family: str) -> None:
    """To the bit: what is drawn, the groups' settings, and some steps."""
    rule = MuP(config(family), config(family))
    assert rule.multipliers == {}
    torch.manual_seed(7)
    scaled = rule.build()
    torch.manual_seed(7)
    plain = AutoModelForCausalLM.from_config(config(family))
    options: dict[str, Any] = {"rank_schedule": "cosine:1:0.25", "total_steps": 4, "spectral_decay": 0.6}
    torch.manual_seed(8)
    for scale, model in ((True, scaled), (False, plain)):
        groups = parameter_groups(model, rule="numuon", lr=0.01, weight_decay=0.1, **options)
        optimizer = NuMuon(rule.scaled(groups) if scale else groups)
        assert len(optimizer.param_groups) == len(groups)
        generator = torch.Generator().manual_seed(9)
        for _ in range(4):
            ids = torch.randint(0, 50, (4, 16), generator=generator)
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            (rule.clip_grad_norm_ if scale else _clip)(model, NORM)
            optimizer.step()
    weights = plain.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in scaled.state_dict().items())


def _clip(model: nn.Module, max_norm: float) -> Tensor:
    return nn.utils.clip_grad_norm_(model.parameters(), max_norm)
