"""What every parameter is to the rules."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowrank_kit.errors import UsageError
from lowrank_kit.scaling import find_parts
from lowrank_kit.scaling.parts import key_of
from tests.families import FAMILIES
from tests.more_families import MORE, tiny_config


def outline(family: str) -> PreTrainedModel:
    config = FAMILIES[family]() if family in FAMILIES else tiny_config(family, MORE[family][1])
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


# Written by hand from the architectures: name -> kind, role, fans, inside, ends a branch. Hidden 32, inner 48.
EXPECTED = {
    "llama": {
        "model.embed_tokens.weight": ("input", "embedding", (1, 32), False, False),
        "model.layers.1.self_attn.q_proj.weight": ("hidden", "q", (32, 32), True, False),
        "model.layers.1.self_attn.k_proj.weight": ("hidden", "k", (32, 16), True, False),
        "model.layers.1.self_attn.o_proj.weight": ("hidden", "o", (32, 32), True, True),
        "model.layers.1.mlp.up_proj.weight": ("hidden", "up", (32, 48), True, False),
        "model.layers.1.mlp.down_proj.weight": ("hidden", "down", (48, 32), True, True),
        "model.layers.1.input_layernorm.weight": ("vector", "gain", (1, 32), True, False),
        "model.norm.weight": ("vector", "gain", (1, 32), False, False),
        "lm_head.weight": ("output", "head", (32, 1), False, False),
    },
    "gpt2": {  # stored [in, out]; qkv as its parts; positions are an input, too
        "transformer.wpe.weight": ("input", "embedding", (1, 32), False, False),
        "transformer.h.0.attn.c_attn.weight": ("hidden", "qkv", (32, 32), True, False),
        "transformer.h.0.attn.c_attn.bias": ("vector", "bias", (1, 96), True, False),
        "transformer.h.0.mlp.c_fc.weight": ("hidden", "up", (32, 128), True, False),
        "transformer.h.0.mlp.c_proj.weight": ("hidden", "down", (128, 32), True, True),
        "transformer.h.0.mlp.c_proj.bias": ("vector", "bias", (1, 32), True, True),
        "transformer.ln_f.bias": ("vector", "bias", (1, 32), False, False),
    },
    "qwen3_moe": {  # fused experts [experts, out, in], the router beside them, gains of one head's size
        "model.layers.0.self_attn.q_norm.weight": ("vector", "gain", (1, 12), True, False),
        "model.layers.0.mlp.experts.gate_up_proj": ("hidden", "gate_up", (32, 24), True, False),
        "model.layers.0.mlp.experts.down_proj": ("hidden", "down", (24, 32), True, True),
        "model.layers.0.mlp.gate.weight": ("hidden", "router", (32, 4), True, False),
    },
    "qwen2_moe": {  # one weight for the shared expert
        "model.layers.0.mlp.shared_expert.down_proj.weight": ("hidden", "down", (24, 32), True, True),
        "model.layers.0.mlp.shared_expert_gate.weight": ("hidden", "router", (32, 1), True, False),
    },
    "phi": {  # a head with a bias
        "lm_head.weight": ("output", "head", (32, 1), False, False),
        "lm_head.bias": ("vector", "bias", (1, 1), False, False),
    },
}


@pytest.mark.parametrize("family", EXPECTED)
def test_parts(family: str) -> None:
    model = outline(family)
    parts = find_parts(model)
    assert list(parts) == [name for name, _ in model.named_parameters()]
    for name, expected in EXPECTED[family].items():
        part = parts[name]
        assert (part.kind, part.role, part.fans, part.inside, part.ends_branch) == expected, name


def test_a_tied_head_is_the_embeddings() -> None:
    kinds = {name: part.kind for name, part in find_parts(outline("llama_tied")).items()}
    assert kinds["model.embed_tokens.weight"] == "input"
    assert "output" not in kinds.values()


@pytest.mark.parametrize(
    ("family", "named"),
    [
        ("opt_projected", "model.decoder.project_out.weight, 16 x 32, of Linear: it is a matrix outside of the blocks"),
        ("gpt_oss", "self_attn.sinks, 4, of GptOssAttention"),
        ("mamba", "A_log"),
        ("lfm2_moe", "conv.weight, 32 x 1 x 3, of Conv1d"),
    ],
)
def test_what_there_is_no_rule_for(family: str, named: str) -> None:
    with pytest.raises(UsageError, match=named) as error:
        find_parts(outline(family))
    assert "--mup-base" in str(error.value.hint)


def test_keys_are_names_without_numbers() -> None:
    assert key_of("model.layers.11.mlp.experts.3.w2.weight") == "model.layers.*.mlp.experts.*.w2.weight"
    assert key_of("transformer.h.0.ln_1.weight") == "transformer.h.*.ln_1.weight"
