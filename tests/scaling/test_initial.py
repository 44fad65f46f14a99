"""What is read from the outline of a model is what a real one is drawn with."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lowrank_kit.scaling.initial import initial_stds
from tests.families import FAMILIES, WEIGHT_STD
from tests.more_families import MORE, tiny_config


@pytest.mark.parametrize("family", [*(name for name in FAMILIES if name != "gpt_oss"), "olmoe", "bloom", "mpt", "gptj"])
def test_stds_are_those_of_a_model_that_is_drawn(family: str) -> None:
    if family in MORE and family not in CONFIG_MAPPING:
        pytest.skip("a newer transformers has it")
    config = FAMILIES[family]() if family in FAMILIES else tiny_config(family, MORE[family][1])
    with torch.device("meta"):
        found = initial_stds(AutoModelForCausalLM.from_config(config))
    torch.manual_seed(0)
    for name, parameter in AutoModelForCausalLM.from_config(config).named_parameters():
        if parameter.ndim > 1:
            # Of n numbers: within five standard errors, and the row of a padding token, which is zero.
            error = 5 / (2 * parameter.numel()) ** 0.5 + 0.01
            assert parameter.square().mean().sqrt().item() == pytest.approx(found[name], rel=error), name


def test_the_ends_of_gpt2_s_branches_go_with_the_depth() -> None:
    with torch.device("meta"):
        found = initial_stds(AutoModelForCausalLM.from_config(FAMILIES["gpt2"](n_layer=8)))
    assert found["transformer.h.7.mlp.c_fc.weight"] == WEIGHT_STD
    assert found["transformer.h.7.mlp.c_proj.weight"] == WEIGHT_STD / 4
    assert found["transformer.h.0.attn.c_proj.weight"] == WEIGHT_STD / 4
