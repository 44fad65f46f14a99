"""Small models of several widths and depths, with vectors that are not at their neutral values."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

from lowrank_kit.scaling.mup import MuP

VOCABULARY, HEAD_DIM = 50, 8
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
LLAMA_LIKE: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen3": (Qwen3Config, {}),
    "granite": (GraniteConfig, {"attention_multiplier": HEAD_DIM**-0.5}),
    "gemma2": (Gemma2Config, {"query_pre_attn_scalar": HEAD_DIM, "pad_token_id": 0}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (Qwen3MoeConfig, {"num_experts": 4, "num_experts_per_tok": 2}),
}


def config(family: str, width: int = 32, depth: int = 4, *, tied: bool = False, **others: Any) -> PreTrainedConfig:
    """A config of a family, all its sizes in proportion to the width, which is a multiple of 16."""
    heads = width // HEAD_DIM
    if family == "gpt2":
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        sizes = {"n_embd": width, "n_layer": depth, "n_head": heads, "n_positions": 32}
        return GPT2Config(**TOKENS | sizes | dropout | others, tie_word_embeddings=tied)
    kind, given = LLAMA_LIKE[family]
    sizes = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 32,
    }
    if family == "qwen3_moe":
        sizes["moe_intermediate_size"] = width
    made = kind(**TOKENS | sizes | given | others, tie_word_embeddings=tied)
    made._experts_implementation = "eager"  # the others know no float64
    return made


def folded(rule: MuP, seed: int = 1) -> PreTrainedModel:
    """The target in float64, its vectors moved by a tenth."""
    torch.manual_seed(seed)
    model = rule.build(dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * rule.fold(name) * torch.randn_like(parameter))
    return model


def tokens(batch: int = 4, length: int = 16) -> torch.Tensor:
    """The next batch of torch's generator."""
    return torch.randint(0, VOCABULARY, (batch, length))
