"""A model's config at another width and depth."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedConfig

from lowrank_kit.errors import UsageError
from lowrank_kit.scaling.sizes import cut_layers, depth_of, width_of

# What goes with the width, where a config has it: heads of one size, more of them.
_WITH_WIDTH = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "n_inner",
    "ffn_dim",
)


def resized(config: PreTrainedConfig, width: int, depth: int) -> PreTrainedConfig:
    """A copy of another width and depth; head dimension, vocabulary and experts stay.

    Args:
        config: of the base.
        width: of the residual stream.
        depth: blocks.

    Raises:
        UsageError: a width at which the heads or the MLP are no whole number, fewer than one block.
    """
    if depth < 1 or width < 1:
        raise UsageError(f"no model {width} wide of {depth} blocks")
    found = copy.deepcopy(config)
    text = found.get_text_config()
    before, head_dim = width_of(config), getattr(text, "head_dim", None)
    for name in _WITH_WIDTH:
        value = getattr(text, name, None)
        if not isinstance(value, int):
            continue
        if value * width % before:
            raise UsageError(
                f"at width {width} {name} would be {value * width / before:g}: it is {value} at width {before}",
                hint=f"multiples of {_smallest(text, before)} are whole",
            )
        setattr(text, name, value * width // before)
    if head_dim is not None:
        text.head_dim = head_dim
    _deepen(text, depth_of(config), depth)
    cut_layers(found, depth)
    return found


def _smallest(text: Any, width: int) -> int:
    """The smallest width at which all is whole; others are multiples."""
    values = [getattr(text, name, None) for name in _WITH_WIDTH]
    return next(n for n in range(1, width + 1) if all(v * n % width == 0 for v in values if isinstance(v, int)))


def _deepen(text: Any, before: int, depth: int) -> None:
    """What is said of each block is said again of further ones, from the first on."""
    for name, value in list(vars(text).items()):
        if (
            isinstance(value, list)
            and len(value) == before
            and depth > before > 1
            and name.startswith(("layer", "mlp"))
        ):
            setattr(text, name, (value * (depth // before + 1))[:depth])
