"""Granite: Llama's weights, with the multipliers in the config. The explicit form, and a way out of the folded one."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from transformers import GraniteConfig, GraniteForCausalLM, PreTrainedConfig, PreTrainedModel

from lowrank_kit.errors import UsageError

if TYPE_CHECKING:
    from lowrank_kit.scaling.mup import MuP

# What Llama's config shares with Granite's.
_SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters"),
    *("attention_bias", "attention_dropout", "mlp_bias"),
)


def has_multipliers(config: PreTrainedConfig) -> bool:
    """Whether the architecture multiplies branches by residual_multiplier and divides logits by logits_scaling."""
    return config.model_type.startswith("granite") and hasattr(config, "residual_multiplier")


def with_multipliers(config: PreTrainedConfig, *, branch: float, output: float) -> PreTrainedConfig:
    """A copy with more of both: branches and logits are multiplied by these besides what the config has."""
    made = copy.deepcopy(config)
    made.residual_multiplier *= branch
    made.logits_scaling /= output
    return made


def to_granite(rule: MuP, model: PreTrainedModel) -> GraniteForCausalLM:
    """A Granite of the same function: multipliers in its config, the weights without what is folded into them.

    Args:
        rule: that the model was built and trained with, in the folded form.
        model: a Llama, in the dtype that the copy will have. Ratios that are no powers of two are rounded in it.

    Raises:
        UsageError: a model that is no Llama, or not the rule's; a rule of the explicit form.
    """
    if model.config.model_type != "llama" or rule.form != "folded":
        raise UsageError(
            f"a {model.config.model_type} in the {rule.form} form cannot become a Granite",
            hint="it has the blocks of Llama: give a folded Llama",
        )
    config = GraniteConfig(
        **{name: getattr(model.config, name) for name in _SHARED},
        attention_multiplier=model.config.head_dim**-0.5,
        embedding_multiplier=1.0,
    )
    config = with_multipliers(config, branch=rule.amounts["branch"], output=rule.amounts["output"])
    made = GraniteForCausalLM(config).to(model.dtype)
    theirs = dict(made.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            theirs[name].copy_(rule.unfolded(name, parameter))
    return made
