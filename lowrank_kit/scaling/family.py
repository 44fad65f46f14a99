"""One architecture in many sizes: what checks of a scaling rule train."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import NamedTuple

from transformers import PreTrainedConfig

from lowrank_kit.errors import UsageError
from lowrank_kit.scaling.sizes import set_depth, width_of

# Numbers of a text config that go with the width; head dimension and key heads' share stay.
_WIDE = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "ffn_dim",
    "ffn_hidden_size",
    "word_embed_proj_dim",
    "num_attention_heads",
    "num_key_value_heads",
)


class Size(NamedTuple):
    """One member: width of the residual stream, and blocks."""

    width: int
    depth: int


def cross(widths: Iterable[int], depths: Iterable[int]) -> list[Size]:
    """Sizes to see slopes by: all widths at the least depth, all depths at the least width; the base comes first.

    Raises:
        UsageError: a size below 1, or one size alone.
    """
    wide, deep = sorted(set(widths)), sorted(set(depths))
    if not wide or not deep or min(wide[0], deep[0]) < 1:
        raise UsageError(f"widths and depths are whole numbers from 1 on, got {wide} and {deep}")
    if len(wide) == len(deep) == 1:
        raise UsageError(
            f"one size, width {wide[0]} and depth {deep[0]}, has no slope", hint="--widths 32,64,128 --depths 4,8,16"
        )
    return [*(Size(width, deep[0]) for width in wide), *(Size(wide[0], depth) for depth in deep[1:])]


def resized(config: PreTrainedConfig, size: Size) -> PreTrainedConfig:
    """A copy of a config with another width and depth, and the same head dimension, shares and kinds of blocks.

    Raises:
        UsageError: a width that something of the config does not divide by.
    """
    made = copy.deepcopy(config)
    text = made.get_text_config()
    width = width_of(config)
    wide, least = _wide(config), _step(config)
    if size.width % least:
        raise UsageError(
            f"no {config.model_type} of width {size.width} has the shape of this one of width {width}: "
            + ", ".join(f"{name} {value}" for name, value in wide.items() if name != "hidden_size"),
            hint=f"widths that are multiples of {least}, or a --model-config with smaller heads",
        )
    for name, value in wide.items():
        setattr(text, name, value * size.width // width)
    set_depth(made, size.depth)
    return made


def least_widths(config: PreTrainedConfig) -> tuple[int, int, int]:
    """The least width from 32 on that the shape of a config allows, twice and four times it."""
    step = _step(config)
    least = step * math.ceil(32 / step)
    return least, 2 * least, 4 * least


def _wide(config: PreTrainedConfig) -> dict[str, int]:
    """What goes with the width."""
    text = config.get_text_config()
    return {name: value for name in _WIDE if isinstance(value := getattr(text, name, None), int) and value > 0}


def _step(config: PreTrainedConfig) -> int:
    """What a width has to be a multiple of for all that goes with it to be whole."""
    width = width_of(config)
    return math.lcm(*(width // math.gcd(width, value) for value in _wide(config).values()))
