"""The object that knows base and target: what it draws, its groups, its clipping, its table, and what it refuses."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lowrank_kit.errors import UsageError
from lowrank_kit.optim import parameter_groups
from lowrank_kit.scaling import MuP
from tests.more_families import MORE, tiny_config
from tests.scaling.cases import config, folded, tokens


def stds(model: nn.Module) -> dict[str, float]:
    """Last name of a matrix -> RMS over all blocks; of GPT-2's two c_proj together."""
    squares = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            squares[name.split(".")[-2]].append(parameter.detach().square().mean().item())
    return {name: (sum(values) / len(values)) ** 0.5 for name, values in squares.items()}


# Base 32 x 2, target 128 x 8, so n = 4 and L = 4: of the base's 0.02.
DRAWN = {
    "llama": {"embed_tokens": 0.02, "q_proj": 0.01, "k_proj": 0.01, "up_proj": 0.01, "o_proj": 0.01 / 4,
              "down_proj": 0.01 / 4, "lm_head": 0.02 / 4},
    # The base draws c_proj with 0.02 / sqrt(2 * 2), the target by itself with 0.02 / sqrt(2 * 8).
    "gpt2": {"wte": 0.02, "wpe": 0.02, "c_attn": 0.01, "c_fc": 0.01, "c_proj": 0.01 / 2 / 4},
}  # fmt: skip


@pytest.mark.parametrize("family", DRAWN)
def test_what_is_drawn(family: str) -> None:
    target = config(family, 128, 8, tied=family == "gpt2", vocab_size=400)
    rule = MuP(config(family, 32, 2, tied=family == "gpt2", vocab_size=400), target)
    torch.manual_seed(0)
    found = stds(rule.build())
    for name, std in DRAWN[family].items():
        assert found[name] == pytest.approx(std, rel=0.03), name


def test_gains_are_folded_as_they_are_drawn() -> None:
    tied = MuP(config("llama", 16, 2, tied=True), config("llama", 64, 4, tied=True)).build()
    assert set(tied.get_parameter("model.norm.weight").tolist()) == {1 / 4}
    assert set(tied.get_parameter("model.layers.0.input_layernorm.weight").tolist()) == {1.0}
    gemma = MuP(config("gemma2", 16, 2, tied=True), config("gemma2", 64, 4, tied=True)).build()
    assert set(gemma.get_parameter("model.layers.3.post_feedforward_layernorm.weight").tolist()) == {1 / 2 - 1}


def test_embeddings_that_the_architecture_multiplies_by_sqrt_of_the_width() -> None:
    """The residual stream starts as it does in the base, and logits are those of 1 / n."""
    rule = MuP(config("gemma2", 16, 2, tied=True), config("gemma2", 64, 4, tied=True))
    assert rule.multipliers["model.embed_tokens.weight"] == 1 / 2
    assert rule.multipliers["model.norm.weight"] == 1 / 2
    untied = MuP(config("gemma2", 16, 2), config("gemma2", 64, 4))
    assert untied.multipliers["lm_head.weight"] == 1 / 4


def test_an_outline_on_the_meta_device() -> None:
    rule = MuP(config("llama", 16, 2), config("llama", 64, 4))
    with torch.device("meta"):
        model = rule.build(dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


def test_groups_are_few_and_the_base_s_comes_first() -> None:
    rule = MuP(config("llama", 16, 2), config("llama", 64, 8), optimizer="adamw")
    model = rule.build()
    groups = rule.param_groups(model, lr=0.1, weight_decay=0.5, eps=1e-6)
    names = [name for group in groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert groups[0]["lr"] == 0.1
    found = {name: (g["lr"], g["weight_decay"], g["eps"]) for g in groups for name in g["param_names"]}
    block = "model.layers.7"
    assert {name: found[name] for name in found if block in name or "layers" not in name} == {
        "model.embed_tokens.weight": (0.1, 0.5, pytest.approx(1e-6 / 4)),
        **dict.fromkeys(
            (f"{block}.{name}.weight" for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                                                   "mlp.gate_proj", "mlp.up_proj")),
            (0.025, 2.0, pytest.approx(1e-6 / 16)),
        ),
        **dict.fromkeys(
            (f"{block}.{name}.weight" for name in ("self_attn.o_proj", "mlp.down_proj")),
            (0.025 / 4, 8.0, pytest.approx(1e-6 / 4)),
        ),
        **dict.fromkeys(
            (f"{block}.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")),
            (0.1, 0.0, pytest.approx(1e-6 / 16)),
        ),
        "model.norm.weight": (0.1, 0.0, pytest.approx(1e-6 / 4)),
        "lm_head.weight": (0.025, 2.0, 1e-6),
    }  # fmt: skip
    assert len(groups) == 6


def test_groups_of_this_package_keep_what_else_they_say() -> None:
    rule = MuP(config("gpt2", 16, 2, tied=True), config("gpt2", 64, 4, tied=True))
    groups = parameter_groups(rule.build(), rule="numuon", lr=0.1, adamw_lr=0.01, rank_schedule="fixed:0.5")
    scaled = rule.scaled(groups)
    by_name = {name: group for group in scaled for name in group["param_names"]}
    qkv, down = by_name["transformer.h.3.attn.c_attn.weight"], by_name["transformer.h.3.mlp.c_proj.weight"]
    assert (qkv["lr"], qkv["split"], qkv["transposed"], qkv["rank_schedule"]) == (0.05, (64, 64, 64), True, "fixed:0.5")
    assert (down["lr"], down["transposed"], "eps" in down) == (0.025, True, False)
    # Eps of AdamW is scaled also where the groups say nothing of it.
    assert by_name["transformer.wte.weight"]["eps"] == 1e-8 / 4
    assert by_name["transformer.h.0.mlp.c_proj.bias"]["lr"] == 0.01 / 2


def test_names_of_a_wrapped_model() -> None:
    rule = MuP(config("llama", 16, 2), config("llama", 64, 4), optimizer="adamw")
    model = rule.build()
    wrapped = nn.Module()
    wrapped.module = model
    plain, found = rule.param_groups(model, lr=0.1), rule.param_groups(wrapped, lr=0.1)
    assert [group["lr"] for group in found] == [group["lr"] for group in plain]
    assert rule.fold("_orig_mod.module.lm_head.weight") == 1 / 4


@pytest.mark.parametrize(
    ("group", "said"),
    [
        ({"params": []}, 'group 0 "" has 0 parameters and 0 names'),
        ({"params": [1], "name": "matrices"}, 'group 0 "matrices" has 1 parameters and 0 names'),
        (
            {"params": [1], "param_names": ["model.nothing.weight"]},
            "model.nothing.weight is no parameter of the target",
        ),
        ({"params": [1], "param_names": ["lm_head.weight"], "rule": "muonn"}, '"muonn" is, is not known'),
        (
            {"params": [1], "param_names": ["model.layers.0.mlp.up_proj.weight"], "rule": "muon", "scale": "rms"},
            'scale "rms" is',
        ),
        ({"params": [1], "param_names": ["lm_head.weight"], "rule": "numuon"}, "are for hidden matrices"),
    ],
)
def test_groups_that_are_refused(group: dict[str, Any], said: str) -> None:
    rule = MuP(config("llama", 16, 1), config("llama", 32, 1))
    with pytest.raises(UsageError, match=said):
        rule.scaled([{"lr": 0.1, **group}])


def test_no_groups() -> None:
    with pytest.raises(UsageError, match="no parameters to train"):
        MuP(config("llama", 16, 1), config("llama", 32, 1)).scaled([])


def test_decay_of_folded_gains_of_one_plus_w() -> None:
    rule = MuP(config("gemma2", 16, 2, tied=True), config("gemma2", 32, 4, tied=True), optimizer="adamw")
    model = rule.build()
    for name, refused in (
        ("model.norm.weight", True),
        ("model.layers.0.post_feedforward_layernorm.weight", True),
        ("model.layers.0.input_layernorm.weight", False),  # nothing is folded into it
    ):
        group = {"params": [model.get_parameter(name)], "param_names": [name], "lr": 0.1, "weight_decay": 0.1}
        if refused:
            with pytest.raises(UsageError, match=f"weight decay of {name}: it holds"):
                rule.scaled([group])
        else:
            assert rule.scaled([group])[0]["weight_decay"] == 0.1
    assert rule.param_groups(model, lr=0.1, weight_decay=0.1)


def test_clipping_returns_the_norm_of_the_model_with_multipliers() -> None:
    rule = MuP(config("llama", 16, 2), config("llama", 64, 4))
    model = folded(rule)
    assert rule.clip_grad_norm_(model, 1.0) == 0  # no gradients yet
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    squares = [(rule.fold(name) * grad).square().sum().item() for name, grad in before.items()]
    norm = rule.clip_grad_norm_(model, 0.01)
    assert norm.item() == pytest.approx(sum(squares) ** 0.5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, before[name] * 0.01 / norm, rtol=1e-4, atol=0)


def test_the_table() -> None:
    rows = MuP(config("llama", 16, 2), config("llama", 64, 4)).rows()
    assert [(row["role"], row["optimizer"], row["count"]) for row in rows] == [
        ("embedding", "adamw", 1),
        *[(role, "numuon", 4) for role in ("q", "k", "v", "o", "gate", "up", "down")],
        ("gain", "adamw", 8),
        ("gain", "adamw", 1),
        ("head", "adamw", 1),
    ]
    down = next(row for row in rows if row["role"] == "down")
    assert {key: down[key] for key in ("fan-in", "fan-out", "fold", "std", "lr", "weight decay")} == {
        "fan-in": 4, "fan-out": 4, "fold": 0.5, "std": 0.25, "lr": 0.25, "weight decay": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optimizer": "muonn"}, '"muonn" is, is not known'),
        ({"depth": "k3"}, 'unknown depth rule "k3"'),
        ({"form": "fold"}, 'unknown form "fold"'),
    ],
)
def test_unknown_words(options: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        MuP(config("llama", 16, 1), config("llama", 32, 1), **options)


def test_state_spaces_are_refused() -> None:
    with pytest.raises(UsageError, match=r"no scaling rule for .*A_log"):
        MuP(tiny_config("mamba", {}), tiny_config("mamba", {**MORE["mamba"][1], "hidden_size": 64}))


def test_blocks_that_are_not_alike() -> None:
    base, target = (
        tiny_config("deepseek_v3", MORE["deepseek_v3"][1] | given) for given in ({}, {"num_hidden_layers": 4})
    )
    base.first_k_dense_replace = 2  # no experts at all
    with pytest.raises(UsageError, match=r"only the target has model.layers.\*.mlp"):
        MuP(base, target)


def test_parameters_that_are_drawn_in_no_known_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowrank_kit.scaling import mup

    real = mup.initial_stds
    monkeypatch.setattr(mup, "initial_stds", lambda model: {k: v for k, v in real(model).items() if "q_proj" not in k})
    with pytest.raises(UsageError, match=r"q_proj.weight of LlamaForCausalLM is drawn in a way that is not known"):
        MuP(config("llama", 16, 1), config("llama", 32, 1))


def test_the_model_is_a_plain_one() -> None:
    target = config("llama", 32, 2)
    model = MuP(config("llama", 16, 1), target).build()
    assert type(model) is type(AutoModelForCausalLM.from_config(target))
    assert model.config.to_dict() == target.to_dict() | {"dtype": "float32"}
