"""Tiny random models of many families, built from configs with no download: what the tests of everything run on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB_SIZE = 100
BLOCKS = 2
# Weights of about 1 / sqrt(hidden), so that every branch is as loud as the residual stream and an error in one of
# them moves the logits. The default 0.02 is meant for a hidden size in the thousands.
WEIGHT_STD = 0.18
# Special tokens inside the vocabulary, all different: no family warns about them.
TOKENS: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# Hidden 32, inner 48, queries and keys of their own size: a shape read the wrong way round does not fit.
COMMON: dict[str, Any] = TOKENS | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": WEIGHT_STD,
}
GROUPED = COMMON | {"num_key_value_heads": 2}
OPT = {key: value for key, value in COMMON.items() if key != "intermediate_size"} | {"init_std": WEIGHT_STD}
GPT2 = TOKENS | {"n_embd": 32, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64, "initializer_range": WEIGHT_STD}

FAMILIES: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": partial(LlamaConfig, **GROUPED),
    "llama_tied": partial(LlamaConfig, **GROUPED, tie_word_embeddings=True),
    "mistral": partial(MistralConfig, **GROUPED, sliding_window=8),
    "qwen2": partial(Qwen2Config, **GROUPED),
    "qwen2_tied": partial(Qwen2Config, **GROUPED, tie_word_embeddings=True),
    "qwen3": partial(Qwen3Config, **GROUPED, head_dim=12),
    "gpt2": partial(GPT2Config, **GPT2),
    "gpt_neox": partial(GPTNeoXConfig, **COMMON),
    "phi3": partial(Phi3Config, **GROUPED),
    "gemma": partial(GemmaConfig, **GROUPED, head_dim=12),
    "gemma2": partial(Gemma2Config, **GROUPED, head_dim=12),
    "gemma3": partial(
        Gemma3TextConfig,
        **GROUPED,
        head_dim=12,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "mixtral": partial(MixtralConfig, **GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": partial(
        Qwen3MoeConfig, **GROUPED, head_dim=12, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2
    ),
    "opt": partial(OPTConfig, **OPT, ffn_dim=48, word_embed_proj_dim=32),
    "opt_projected": partial(OPTConfig, **OPT, ffn_dim=48, word_embed_proj_dim=16),
    "granite": partial(GraniteConfig, **GROUPED),
    "gpt_oss": partial(
        GptOssConfig,
        **GROUPED,
        head_dim=12,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A random float32 model of a family.

    Args:
        name: a key of `FAMILIES`.
        seed: of all its parameters.
    """
    return build_from(FAMILIES[name](), seed)


def build_from(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random float32 model in eval mode, with norms and biases that are not at their neutral values.

    Args:
        config: of a causal LM.
        seed: of all its parameters.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1 or parameter_name.endswith("_bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def token_ids(batch: int = 2, length: int = 16, seed: int = 0) -> torch.Tensor:
    """Random ordinary tokens, [batch, length] int64."""
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The blocks of a model: its one list of `BLOCKS` modules outside of the blocks themselves."""
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == BLOCKS)
