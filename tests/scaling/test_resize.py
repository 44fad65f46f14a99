"""A config at another width and depth."""

from __future__ import annotations

import pytest
from transformers import Gemma2Config, GPT2Config, LlamaConfig

from lowrank_kit.errors import UsageError
from lowrank_kit.scaling.mup import MuP
from lowrank_kit.scaling.resize import resized

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def test_heads_and_mlp_go_with_the_width() -> None:
    base = LlamaConfig(**SIZES, num_hidden_layers=2, vocab_size=64)
    found = resized(base, 128, 6)
    assert (found.hidden_size, found.intermediate_size, found.num_hidden_layers) == (128, 192, 6)
    assert (found.num_attention_heads, found.num_key_value_heads, found.head_dim) == (16, 8, 8)
    assert (base.hidden_size, base.num_hidden_layers, found.vocab_size) == (32, 2, 64)
    MuP(base, found)  # which refuses what may not differ


def test_what_a_config_says_of_each_block_is_as_long_as_it_is_deep() -> None:
    base = Gemma2Config(**SIZES, num_hidden_layers=2, vocab_size=64)
    assert resized(base, 32, 5).layer_types == [*base.layer_types * 2, base.layer_types[0]]
    assert resized(base, 32, 1).layer_types == base.layer_types[:1]


def test_names_of_another_family() -> None:
    found = resized(GPT2Config(n_embd=16, n_head=2, n_layer=1, n_inner=40), 32, 2)
    assert (found.n_embd, found.n_head, found.n_inner, found.n_layer) == (32, 4, 80, 2)


def test_a_width_that_leaves_part_of_a_head() -> None:
    with pytest.raises(UsageError, match="at width 40 num_key_value_heads would be 2.5") as caught:
        resized(LlamaConfig(**SIZES, num_hidden_layers=2), 40, 2)
    assert caught.value.hint == "multiples of 16 are whole"
    with pytest.raises(UsageError, match="of 0 blocks"):
        resized(LlamaConfig(**SIZES, num_hidden_layers=2), 32, 0)
