"""Training at several rates: an ensemble is its members trained one by one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig

from lowrank_kit.errors import UsageError
from lowrank_kit.optim import NuMuon, parameter_groups
from lowrank_kit.scaling.family import Size, resized
from lowrank_kit.scaling.mup import MuP
from lowrank_kit.scaling.trainer import SizeTrainer
from lowrank_kit.scaling.trial import TrialSettings, draw_batches, ensemble_pays, train_rates

RATES = [2**-8, 2**-6, 2**-4]
VOCABULARY = 48


def llama(**changes: Any) -> LlamaConfig:
    given = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 0}
    return LlamaConfig(**{**given, **sizes, "num_key_value_heads": 1, "tie_word_embeddings": False, **changes})


def gpt2() -> GPT2Config:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": VOCABULARY}
    return GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0)


def blocks() -> Tensor:
    return torch.randint(0, VOCABULARY, (12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


def built(base: PreTrainedConfig) -> tuple[MuP, PreTrainedModel]:
    rule = MuP(base, resized(base, Size(32, 3)))
    torch.manual_seed(0)
    model = rule.build(dtype=torch.float64)
    model.set_attn_implementation("eager")
    return rule, model


@pytest.mark.parametrize("base", [llama(), gpt2()], ids=["llama", "gpt2"])
@pytest.mark.parametrize("optimizer", ["numuon", "muon", "adamw", "sgd"])
def test_an_ensemble_is_its_members(base: PreTrainedConfig, optimizer: str) -> None:
    rule, model = built(base)
    settings = TrialSettings(
        optimizer, adamw_share=0.5, steps=4, batch_size=2, weight_decay=0.1, clip=0.3, topk="exact"
    )
    batches = draw_batches(blocks(), settings, seed=0)
    for scaling in (rule, None):
        one_by_one = train_rates(model, scaling, batches, RATES, settings, ensemble=False)
        ensemble = train_rates(model, scaling, batches, RATES, settings, ensemble=True)
        torch.testing.assert_close(ensemble, one_by_one, rtol=1e-7, atol=0)
        assert len(set(ensemble)) == len(RATES)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_member_that_diverges_does_not_touch_the_others(optimizer: str) -> None:
    rule, model = built(llama())
    settings = TrialSettings(optimizer, adamw_share=0.5, steps=6, batch_size=2, clip=0)
    batches = draw_batches(blocks(), settings, seed=0)
    rates = [RATES[0], 1e200, RATES[1]]
    found = train_rates(model, rule, batches, rates, settings, ensemble=True)
    assert found[1] == math.inf
    torch.testing.assert_close(found, train_rates(model, rule, batches, rates, settings, ensemble=False))
    assert found[::2] == pytest.approx(train_rates(model, rule, batches, RATES[:2], settings, ensemble=True), rel=1e-9)
    assert train_rates(model, rule, batches, [1e200] * 2, settings, ensemble=True) == [math.inf] * 2


def test_a_training_is_what_the_rule_and_the_optimizer_make_of_it() -> None:
    """SGD, to which the size of a gradient matters: the loss of the second step shows what the first was clipped to."""
    rule, model = built(llama())
    settings = TrialSettings("sgd", adamw_share=0.5, steps=2, batch_size=2, clip=0.01, warmup=0)
    batches = draw_batches(blocks(), settings, seed=0)
    found = train_rates(model, rule, batches, [0.5], settings, ensemble=False)
    optimizer = NuMuon(rule.scaled(parameter_groups(model, rule="sgd", lr=0.5, adamw_lr=0.25)))
    model(input_ids=batches[0], labels=batches[0]).loss.backward()
    rule.clip_grad_norm_(model, 0.01)
    optimizer.step()
    assert found[0] == pytest.approx(float(model(input_ids=batches[1], labels=batches[1]).loss.detach()), rel=1e-6)


def test_the_weights_given_stay() -> None:
    rule, model = built(llama())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = TrialSettings("adamw", steps=2, batch_size=2)
    for ensemble in (True, False):
        train_rates(model, rule, draw_batches(blocks(), settings, 0), RATES, settings, ensemble=ensemble)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_batches_are_drawn_by_the_seed_alone() -> None:
    settings = TrialSettings(steps=9, batch_size=2)
    batches = draw_batches(blocks(), settings, 3)
    assert (batches.shape, batches.dtype) == ((9, 2, 12), torch.int64)
    assert torch.equal(batches, draw_batches(blocks(), settings, 3))
    assert not torch.equal(batches, draw_batches(blocks(), settings, 4))
    assert len(batches[:6].flatten(0, 1).unique(dim=0)) == 12, "all blocks before any comes again"


def test_the_rate_rises_and_falls() -> None:
    settings = TrialSettings(steps=20, warmup=0.2)
    shares = [settings.rate(step) for step in range(20)]
    assert shares[4] == 1.0 == max(shares)
    assert shares[:5] == sorted(shares[:5])
    assert shares[4:] == sorted(shares[4:], reverse=True)
    assert 0 < shares[-1] < 0.02


def test_small_blocks_are_trained_as_an_ensemble_and_experts_are_not() -> None:
    _, small = built(llama())
    assert ensemble_pays(small)
    experts = {"moe_intermediate_size": 8, "num_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen3MoeConfig(**sizes, **experts, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0)
    family = SizeTrainer(config, blocks(), TrialSettings())
    assert not ensemble_pays(family.build(config, None))
    wide = llama(hidden_size=256, intermediate_size=1024)
    assert not ensemble_pays(family.build(wide, None))


def test_a_family_trains_every_rule_and_the_base_the_same_way() -> None:
    settings = TrialSettings("muon", steps=3, batch_size=2)
    family = SizeTrainer(llama(), blocks(), settings)
    base, target = Size(16, 1), Size(32, 2)
    of_base = {rule: family(base, rule, RATES, 0) for rule in ("mup", "k1", "sp")}
    assert of_base["mup"] == of_base["k1"] == of_base["sp"]
    found = [family(target, rule, RATES, 0) for rule in ("mup", "k1", "sp")]
    assert len({tuple(losses) for losses in found}) == 3
    assert found[0] == family(target, "mup", RATES, 0)
    assert found[0] != family(target, "mup", RATES, 1)


def test_a_model_may_be_prepared() -> None:
    def zero(model: PreTrainedModel) -> None:
        model.get_output_embeddings().weight.data.zero_()

    settings = TrialSettings("adamw", steps=1, batch_size=2)
    found = SizeTrainer(llama(), blocks(), settings, prepare=zero)(Size(16, 1), "mup", [0.001], 0)
    assert found == [pytest.approx(math.log(VOCABULARY))]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optimizer": "adam"}, 'no optimizer "adam"'),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"adamw_share": 0.0}, "share of AdamW"),
        ({"warmup": 1.0}, "warmup"),
        ({"clip": -1.0}, "no negative"),
    ],
)
def test_settings_that_are_none(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        TrialSettings(**changes)
