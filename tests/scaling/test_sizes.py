"""What base and target may differ in, and how a base is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lowrank_kit.errors import UsageError
from lowrank_kit.scaling.sizes import check_sizes, depth_of, resolve_configs, set_depth, width_of
from tests.scaling.cases import config


def test_a_base_as_config_folder_file_or_numbers(tmp_path: Path) -> None:
    small, target = config("qwen3", 16, 2), config("qwen3", 32, 4)
    small.save_pretrained(tmp_path)
    numbers = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    for base in (small, tmp_path, tmp_path / "config.json", str(tmp_path), numbers):
        found, large = resolve_configs(base, target)
        assert (width_of(found), depth_of(found), found.intermediate_size) == (16, 2, 32)
        assert (found.num_attention_heads, found.num_key_value_heads, found.head_dim) == (2, 1, 8)
        assert found.layer_types == ["full_attention"] * 2
        assert large.to_dict() == target.to_dict()
        assert large is not target


def test_numbers_by_the_names_of_the_architecture() -> None:
    for names in (("n_embd", "n_layer", "n_head"), ("hidden_size", "num_hidden_layers", "num_attention_heads")):
        found, _ = resolve_configs(dict(zip(names, (16, 2, 2), strict=True)), config("gpt2", 32, 4))
        assert (found.n_embd, found.n_layer, found.n_head) == (16, 2, 2)


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ({"hidden_sise": 16}, 'no "hidden_sise"'),
        ({"hidden_size": "wide"}, "hidden_size 'wide' in the config of the base"),
        ("nowhere", "no config at nowhere"),
    ],
)
def test_a_base_that_is_none(base: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        resolve_configs(base, config("llama"))


def test_a_folder_without_a_model_that_is_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(UsageError, match="no_such_model"):
        resolve_configs(tmp_path, config("llama"))


@pytest.mark.parametrize(
    ("family", "base", "target", "said"),
    [
        ("llama", {"head_dim": 16}, {}, "head dimension: 16 and 8"),
        ("llama", {"num_key_value_heads": 1}, {"num_key_value_heads": 4}, "heads for one key head: 2 and 1"),
        ("mixtral", {"num_local_experts": 8}, {}, "experts: 8 and 4"),
        ("mixtral", {"num_experts_per_tok": 1}, {}, "experts of a token: 1 and 2"),
        ("qwen3_moe", {"num_experts": 8}, {}, "experts: 8 and 4"),
        ("granite", {"residual_multiplier": 0.5}, {}, "residual_multiplier: 0.5 and 1.0"),
        ("gemma2", {"query_pre_attn_scalar": 16}, {}, "query_pre_attn_scalar: 16 and 8"),
    ],
)
def test_what_may_not_differ(family: str, base: dict[str, Any], target: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as error:
        check_sizes(config(family, 16, 2, **base), config(family, 32, 4, **target))
    assert error.value.hint


def test_a_head_dimension_that_follows_from_the_heads() -> None:
    target = config("gpt2", 32, 4)
    with pytest.raises(UsageError, match="head dimension: 4 and 8"):
        check_sizes(resolve_configs({"n_embd": 16}, target)[0], target)


def test_tied_on_one_side_only() -> None:
    with pytest.raises(UsageError, match="tied embeddings: 1 and 0"):
        check_sizes(config("llama", 16, 2, tied=True), config("llama", 32, 4))


def test_other_architectures() -> None:
    with pytest.raises(UsageError, match="the base is a qwen3, the target a llama"):
        check_sizes(config("qwen3", 16, 2), config("llama", 32, 4))


def test_a_base_deeper_than_the_target() -> None:
    with pytest.raises(UsageError, match="the base has 6 blocks, more than the target with 4"):
        check_sizes(config("llama", 16, 6), config("llama", 32, 4))
    target = config("qwen3", 32, 4)
    with pytest.raises(UsageError, match="the base has 6 blocks"):
        check_sizes(resolve_configs({"num_hidden_layers": 6}, target)[0], target)


def test_a_base_wider_than_the_target_is_scaled_down() -> None:
    check_sizes(config("llama", 64, 2), config("llama", 32, 4))


def test_a_depth_leaves_other_lists() -> None:
    model = config("qwen3", 32, 2, eos_token_id=[0, 1])
    for depth in (1, 3):
        set_depth(model, depth)
        assert (len(model.layer_types), model.eos_token_id, depth_of(model)) == (depth, [0, 1], depth)
        set_depth(model, 2)
