"""Granite has the multipliers in its config: the same function, and the same training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GraniteForCausalLM

from lowrank_kit.errors import UsageError
from lowrank_kit.optim import NuMuon, parameter_groups
from lowrank_kit.scaling import MuP, to_granite
from tests.scaling.cases import HEAD_DIM, config, folded, tokens
from tests.scaling.explicit import largest_difference


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_llama_becomes_a_granite(tied: bool) -> None:
    rule = MuP(config("llama", 16, 1, tied=tied), config("llama", 64, 4, tied=tied))
    llama = folded(rule)
    granite = to_granite(rule, llama)
    assert type(granite) is GraniteForCausalLM
    assert (granite.config.residual_multiplier, granite.config.logits_scaling) == (1 / 4, 4)
    assert (granite.config.attention_multiplier, granite.config.embedding_multiplier) == (HEAD_DIM**-0.5, 1)
    assert granite.config.tie_word_embeddings == tied
    torch.manual_seed(3)
    ids = tokens()
    assert torch.equal(granite(input_ids=ids).logits, llama(input_ids=ids).logits)
    down = "model.layers.3.mlp.down_proj.weight"
    assert torch.equal(granite.get_parameter(down), 4 * llama.get_parameter(down))


def test_ratios_that_are_no_powers_of_two_are_rounded() -> None:
    rule = MuP(config("llama", 16, 1), config("llama", 48, 3))
    llama = folded(rule)
    ids = tokens()
    logits = to_granite(rule, llama)(input_ids=ids).logits
    torch.testing.assert_close(logits, llama(input_ids=ids).logits, atol=0, rtol=1e-12)


def test_a_granite_in_the_explicit_form_trains_as_a_folded_llama() -> None:
    """Relative to the base's own multipliers, which are 1 here and .5 and 8 below."""
    rule = MuP(config("llama", 16, 1), config("llama", 64, 4))
    explicit = MuP(config("granite", 16, 1), config("granite", 64, 4), form="explicit")
    llama, granite = folded(rule), explicit.build(dtype=torch.float64)
    assert (granite.config.residual_multiplier, granite.config.logits_scaling) == (1 / 4, 4)
    granite.load_state_dict(to_granite(rule, llama).state_dict())
    torch.manual_seed(4)
    pairs = [(rule, llama), (explicit, granite)]
    steps = [
        NuMuon(one.scaled(parameter_groups(model, rule="muon", lr=0.01, weight_decay=0.1, momentum_dtype="float64")))
        for one, model in pairs
    ]
    for _ in range(3):
        ids = tokens()
        for (one, model), optimizer in zip(pairs, steps, strict=True):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            one.clip_grad_norm_(model, 0.05)
            optimizer.step()
    assert largest_difference(rule, llama, granite) == 0


def test_multipliers_that_the_base_has_are_kept() -> None:
    own: dict[str, Any] = {"residual_multiplier": 0.5, "logits_scaling": 8.0}
    base, target = config("granite", 16, 1, **own), config("granite", 64, 4, **own)
    model = MuP(base, target, form="explicit").build()
    assert (model.config.residual_multiplier, model.config.logits_scaling) == (1 / 8, 32)
    plain = MuP(base, target).build()
    assert (plain.config.residual_multiplier, plain.config.logits_scaling) == (1 / 2, 8)


def test_what_cannot_become_a_granite() -> None:
    rule = MuP(config("qwen3", 16, 1), config("qwen3", 32, 2))
    with pytest.raises(UsageError, match="qwen3 in the folded form"):
        to_granite(rule, rule.build())
    rule = MuP(config("llama", 16, 1), config("llama", 32, 2), form="explicit")
    with pytest.raises(UsageError, match="llama in the explicit form"):
        to_granite(rule, rule.build())
