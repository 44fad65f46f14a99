"""Perplexity, and bits per byte, which compares across tokenizers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel

from lowrank_kit.checkpoint.loading import check_blocks
from lowrank_kit.data.blocks import TokenBlocks
from lowrank_kit.errors import LowRankError
from lowrank_kit.evaluation.forward import evaluating, model_name, next_token_logits


@dataclass(frozen=True)
class Perplexity:
    """The mean loss over `num_tokens` predicted tokens, in three units; `sha256` is that of the token blocks."""

    loss_nats: float
    perplexity: float
    bits_per_byte: float
    num_tokens: int
    sha256: str


def perplexity(model: PreTrainedModel, blocks: TokenBlocks, *, batch_size: int = 8) -> Perplexity:
    """Score a model on token blocks, each on its own: the first token of a block is context only.

        loss = -1 / (N (T - 1)) * sum of ln p(token | tokens before it in its block)
        perplexity = exp(loss),  bits per byte = loss / ln 2 / bytes per token

    The loss of a token is computed in float32 from logits of any dtype, and summed in float64.

    Args:
        blocks: [N, T].
        batch_size: blocks in one forward pass.

    Raises:
        UsageError: the blocks do not suit the model's vocabulary or context.
        LowRankError: the loss is not finite; the first such block is named.
    """
    check_blocks(model, blocks)
    total_nats = 0.0
    with evaluating(model):
        for start in tqdm(range(0, len(blocks), batch_size), desc="perplexity", disable=None, leave=False):
            ids = blocks.ids[start : start + batch_size].to(model.device, torch.long)
            # Block by block: a float32 copy of a whole batch of logits can be larger than the model.
            for offset, (logits, block) in enumerate(zip(next_token_logits(model, ids), ids, strict=True)):
                nats = cross_entropy(logits.float(), block[1:], reduction="none").double().sum().item()
                if not math.isfinite(nats):
                    raise LowRankError(
                        f"the loss of {model_name(model)} is {nats} on block {start + offset} of {len(blocks)}",
                        hint="look for NaN or Inf in its weights, or evaluate it in float32",
                    )
                total_nats += nats
    num_tokens = len(blocks) * (blocks.block_tokens - 1)
    loss = total_nats / num_tokens
    return Perplexity(
        loss_nats=loss,
        perplexity=_exp(loss),
        bits_per_byte=loss / math.log(2) / blocks.bytes_per_token,
        num_tokens=num_tokens,
        sha256=blocks.sha256,
    )


def _exp(loss: float) -> float:
    """exp, infinite where a float64 is: a model broken by compression can have a finite loss above 709 nats."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
