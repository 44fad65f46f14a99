"""Compressed folders to export, made once, and what is loaded from them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from tests.families import build, token_ids

# Family -> form of storage and number format: two factors and pivoted, transposed, fused qkv and gate_up, biases, tied,
# experts apart and fused on disk, a factorized head.
KINDS = {
    "llama": ("factors", torch.float32),
    "llama_tied": ("pivoted", torch.bfloat16),
    "qwen2_tied": ("pivoted", torch.float32),
    "gpt2": ("factors", torch.float32),
    "gpt_neox": ("factors", torch.bfloat16),
    "phi3": ("pivoted", torch.float16),
    "mixtral": ("factors", torch.float32),
    "mixtral_fused": ("factors", torch.bfloat16),
    "llama_head": ("pivoted", torch.float32),
}
HEAD = ("lm_head", "*_proj")


def make_compressed(name: str, folder: Path) -> None:
    """A compressed folder of one of `KINDS`; the dense one it was made of lies beside it under NAME-dense."""
    form, dtype = KINDS[name]
    dense = folder.with_name(f"{name}-dense")
    family = name.removesuffix("_fused").removesuffix("_head")
    build(family).to(dtype).save_pretrained(dense, save_original_format=not name.endswith("_fused"))
    include = HEAD if name.endswith("_head") else ()
    compress(dense, folder, CompressSettings(keep=0.6, objective="plain", form=form, include=include))


def logits(folder: Path) -> Tensor:
    """Of the test's tokens, in the folder's number format."""
    return AutoModelForCausalLM.from_pretrained(folder)(input_ids=token_ids()).logits.detach()
