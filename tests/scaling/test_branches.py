"""Where branches end is found by looking at a small twin, in every family; what cannot be scaled is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lowrank_kit.errors import UsageError
from lowrank_kit.scaling import Fold, find_folds
from lowrank_kit.scaling.branches import BLOCKS, VOCABULARY, make_twin
from lowrank_kit.scaling.entry import embedding_scale
from tests.families import FAMILIES
from tests.more_families import MORE, tiny_config
from tests.scaling.cases import config

BRANCH, GAIN = Fold("branch"), Fold("branch", offset=True)
OUT, DOWN, HEAD = "model.layers.*.self_attn.o_proj.weight", "model.layers.*.mlp.down_proj.weight", "lm_head.weight"
LLAMA = {OUT: BRANCH, DOWN: BRANCH, HEAD: Fold("output")}
TIED = {OUT: BRANCH, DOWN: BRANCH, "model.norm.weight": Fold("output")}
EXPERTS = {OUT: BRANCH, "model.layers.*.mlp.experts.down_proj": BRANCH, HEAD: Fold("output")}
GEMMA = {
    "model.layers.*.post_attention_layernorm.weight": GAIN,
    "model.layers.*.post_feedforward_layernorm.weight": GAIN,
    "model.norm.weight": Fold("output", offset=True),
}
EXPECTED = {
    "llama": LLAMA,
    "llama_tied": TIED,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen2_tied": TIED,
    "qwen3": LLAMA,
    "gpt2": {
        "transformer.h.*.attn.c_proj.weight": BRANCH,
        "transformer.h.*.attn.c_proj.bias": BRANCH,
        "transformer.h.*.mlp.c_proj.weight": BRANCH,
        "transformer.h.*.mlp.c_proj.bias": BRANCH,
        "transformer.ln_f.weight": Fold("output"),
        "transformer.ln_f.bias": Fold("output"),
    },
    "gpt_neox": {
        "gpt_neox.layers.*.attention.dense.weight": BRANCH,
        "gpt_neox.layers.*.attention.dense.bias": BRANCH,
        "gpt_neox.layers.*.mlp.dense_4h_to_h.weight": BRANCH,
        "gpt_neox.layers.*.mlp.dense_4h_to_h.bias": BRANCH,
        HEAD: Fold("output"),
    },
    "phi3": LLAMA,
    "gemma": {OUT: BRANCH, DOWN: BRANCH, "model.norm.weight": Fold("output", offset=True)},
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
    "opt": {
        "model.decoder.layers.*.self_attn.out_proj.weight": BRANCH,
        "model.decoder.layers.*.self_attn.out_proj.bias": BRANCH,
        "model.decoder.layers.*.fc2.weight": BRANCH,
        "model.decoder.layers.*.fc2.bias": BRANCH,
        "model.decoder.final_layer_norm.weight": Fold("output"),
        "model.decoder.final_layer_norm.bias": Fold("output"),
    },
    "granite": LLAMA,
}
# Gains after branches, not of 1 + w; experts beside shared ones, and below dense blocks.
MORE_EXPECTED = {
    "olmo2": {
        "model.layers.*.post_attention_layernorm.weight": BRANCH,
        "model.layers.*.post_feedforward_layernorm.weight": BRANCH,
        HEAD: Fold("output"),
    },
    "deepseek_v3": LLAMA | EXPERTS | {"model.layers.*.mlp.shared_experts.down_proj.weight": BRANCH},
    "xglm": {
        "model.layers.*.self_attn.out_proj.weight": BRANCH,
        "model.layers.*.self_attn.out_proj.bias": BRANCH,
        "model.layers.*.fc2.weight": BRANCH,
        "model.layers.*.fc2.bias": BRANCH,
        "model.layer_norm.weight": Fold("output"),
        "model.layer_norm.bias": Fold("output"),
    },
}


@pytest.mark.parametrize("family", EXPECTED)
def test_ends_of_branches_are_found(family: str) -> None:
    assert find_folds(FAMILIES[family]()) == EXPECTED[family]


@pytest.mark.parametrize("family", MORE_EXPECTED)
def test_ends_of_branches_of_others(family: str) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip("a newer transformers has it")
    assert find_folds(tiny_config(family, MORE[family][1])) == MORE_EXPECTED[family]


# family -> what the refusal says.
NO_RULE = {
    "mamba": "no scaling rule for .*A_log",
    "olmo": "tied to the embeddings, and no norm with a gain",
    "openai-gpt": "transformer.h.0 of OpenAIGPTLMHeadModel changes the residual stream",
    "minicpm3": "depends on how many blocks there are",
}


@pytest.mark.parametrize("family", NO_RULE)
def test_what_cannot_be_scaled_is_refused(family: str) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip("a newer transformers has it")
    given = MORE[family][1] | ({"tie_word_embeddings": True} if family == "olmo" else {})
    with pytest.raises(UsageError, match=NO_RULE[family]) as error:
        find_folds(tiny_config(family, given))
    assert error.value.hint


def test_a_twin_is_small_and_in_float64() -> None:
    before = torch.get_rng_state()
    twin = make_twin(config("qwen3", 32, 12, vocab_size=999))
    assert torch.equal(torch.get_rng_state(), before)
    assert twin.dtype == torch.float64
    assert (twin.config.num_hidden_layers, len(twin.config.layer_types)) == (BLOCKS, BLOCKS)
    assert twin.config.vocab_size == VOCABULARY


class OddConfig(LlamaConfig):
    """A Llama whose blocks have one thing more."""

    model_type = "odd_llama"
    odd: str = "branch"


class OddLayer(LlamaDecoderLayer):
    def __init__(self, config: OddConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.kind = config.odd
        self.extra = nn.Linear(config.hidden_size, config.hidden_size, bias=True)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if self.kind == "bias":  # which is 0 as it is drawn
            return super().forward(hidden_states, **kwargs) + self.extra.bias
        if self.kind == "branch":
            return super().forward(hidden_states, **kwargs) + self.extra(hidden_states)
        return hidden_states + torch.tanh(super().forward(hidden_states, **kwargs) - hidden_states)


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.model.layers = nn.ModuleList(OddLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()


@pytest.fixture
def odd() -> Iterator[Any]:
    AutoConfig.register("odd_llama", OddConfig)
    AutoModelForCausalLM.register(OddConfig, OddForCausalLM)
    yield lambda kind: OddConfig(**config("llama").to_dict() | {"odd": kind, "model_type": "odd_llama"})
    CONFIG_MAPPING._extra_content.pop("odd_llama")
    AutoModelForCausalLM._model_mapping._extra_content.pop(OddConfig)


@pytest.mark.parametrize("kind", ["branch", "bias"])
def test_a_branch_that_nobody_knows(odd: Any, kind: str) -> None:
    with pytest.raises(UsageError, match=r"changes the residual stream by .*\.self_attn.o_proj, .*\.mlp.down_proj"):
        find_folds(odd(kind))


def test_a_branch_that_is_linear_in_nothing(odd: Any) -> None:
    with pytest.raises(UsageError, match=r"o_proj.weight of OddForCausalLM: neither it nor a gain"):
        find_folds(odd("tanh"))


@pytest.mark.parametrize(
    ("family", "by"), [("llama", 1.0), ("gpt2", 1.0), ("gemma", 32**0.5), ("gemma3", 32**0.5), ("granite", 12.0)]
)
def test_what_embeddings_are_multiplied_with(family: str, by: float) -> None:
    given = {"embedding_multiplier": 12.0} if family == "granite" else {}
    assert embedding_scale(FAMILIES[family](**given)) == pytest.approx(by, rel=1e-15)


def test_a_norm_of_the_embeddings_makes_their_size_no_matter() -> None:
    assert embedding_scale(tiny_config("bloom", {})) == 1
