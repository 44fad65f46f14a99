"""Configs of base and target, and what may differ between them."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from lowrank_kit.errors import UsageError, did_you_mean

_HEADS = "keep it, and add heads with the width"
_EXPERTS = "experts are not scaled"
_MULTIPLIER = re.compile(r"multiplier|logits_scaling|logit_scale|scale_emb|scale_depth|pre_attn_scalar")
Config: TypeAlias = PreTrainedConfig | str | Path


def resolve_configs(base: Config | Mapping[str, Any], target: Config) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """Both configs; numbers of the base stand for the target with these.

    Raises:
        UsageError: no such folder or config, a number of the base that the target's config does not know.
    """
    large = _read(target)
    if not isinstance(base, Mapping):
        return _read(base), large
    small = copy.deepcopy(large)
    text = small.get_text_config()
    for name, value in base.items():
        if not hasattr(text, name):
            raise UsageError(
                f'the config of {small.model_type} has no "{name}" that a base could have another of',
                hint=did_you_mean(name, text.to_dict()),
            )
        if text.attribute_map.get(name, name) == text.attribute_map.get("num_hidden_layers", "num_hidden_layers"):
            set_depth(small, int(value))
        else:
            _set(text, name, value)
    return small, large


def _set(config: PreTrainedConfig, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except (TypeError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{name} {value!r} in the config of the base: {reason}") from error


def set_depth(config: PreTrainedConfig, depth: int) -> None:
    """Give a config so many blocks, in place; what it says of each block is cut, or its pattern repeated."""
    text = config.get_text_config()
    for name, value in list(vars(text).items()):
        of_blocks = name != "architectures" and not name.endswith("token_id")
        if of_blocks and isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, name, [value[i % len(value)] for i in range(depth)])
    text.num_hidden_layers = depth


def cut_vocabulary(config: PreTrainedConfig, most: int) -> None:
    """Leave so many tokens of a config at most, in place; special ones become the first."""
    text = config.get_text_config()
    if text.vocab_size > most:
        text.vocab_size = most
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(text, name, None) is not None:
                setattr(text, name, 0)


def depth_of(config: PreTrainedConfig) -> int:
    """Blocks."""
    return int(config.get_text_config().num_hidden_layers)


def width_of(config: PreTrainedConfig) -> int:
    """Size of the residual stream."""
    return int(config.get_text_config().hidden_size)


def check_sizes(base: PreTrainedConfig, target: PreTrainedConfig) -> None:
    """Refuse base and target that differ in what the rules do not carry over.

    Raises:
        UsageError: another architecture, head dimension, share of key heads, number of experts, tied on one side only,
            other multipliers of the architecture's own; a base deeper than the target.
    """
    if base.model_type != target.model_type:
        raise UsageError(f"the base is a {base.model_type}, the target a {target.model_type}", hint="one architecture")
    for what, found, hint in (
        ("head dimension", _head_dim, _HEADS),
        ("heads for one key head", _group, _HEADS),
        ("experts", _experts, _EXPERTS),
        ("experts of a token", _active_experts, _EXPERTS),
        ("tied embeddings", lambda config: bool(config.tie_word_embeddings), "tie both or none"),
    ):
        small, large = found(base.get_text_config()), found(target.get_text_config())
        if small != large:
            raise UsageError(f"base and target differ in {what}: {small:g} and {large:g}", hint=hint)
    theirs = _multipliers(target.get_text_config())
    for name, value in _multipliers(base.get_text_config()).items():
        if value != theirs.get(name):
            raise UsageError(
                f"base and target differ in {name}: {value} and {theirs.get(name)}",
                hint="the scaling has multipliers of its own: keep those of the config",
            )
    if depth_of(base) > depth_of(target):
        raise UsageError(
            f"the base has {depth_of(base)} blocks, more than the target with {depth_of(target)}",
            hint="tune on the shallow model: a rate found on a deep one says nothing of how stable a shallow one is",
        )


def _read(config: Config) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return copy.deepcopy(config)
    path = Path(config)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"no config at {path}", hint="a folder with config.json, or that file")
    try:
        return AutoConfig.from_pretrained(file, trust_remote_code=False)
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file}: {' '.join(str(error).split())}") from error


def _multipliers(config: Any) -> dict[str, Any]:
    """What a config has for factors in the forward pass, as Granite's residual_multiplier."""
    return {name: value for name, value in vars(config).items() if _MULTIPLIER.search(name)}


def _head_dim(config: Any) -> float:
    heads = getattr(config, "num_attention_heads", None)
    if not heads:  # of state spaces, which `find_parts` refuses
        return 0.0
    return float(getattr(config, "head_dim", None) or config.hidden_size / heads)


def _group(config: Any) -> float:
    heads = getattr(config, "num_attention_heads", None) or 1
    return float(heads / (getattr(config, "num_key_value_heads", None) or heads))


def _experts(config: Any) -> float:
    return float(getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0)


def _active_experts(config: Any) -> float:
    return float(getattr(config, "num_experts_per_tok", None) or 0)
