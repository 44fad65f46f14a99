"""How far a model's next-token distributions are from those of a reference, usually the dense model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from lowrank_kit.checkpoint.loading import check_blocks
from lowrank_kit.data.blocks import TokenBlocks
from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.evaluation.forward import evaluating, model_name, next_token_logits


@dataclass(frozen=True)
class Divergence:
    """KL(reference || model) over `num_tokens` predictions, and how often the two agree on the likeliest token."""

    kl_nats: float
    kl_nats_p99: float
    top1_agreement: float
    num_tokens: int


def divergence(
    model: PreTrainedModel, reference: PreTrainedModel, blocks: TokenBlocks, *, batch_size: int = 8
) -> Divergence:
    """Compare two models with one vocabulary on the same token blocks.

        KL = sum over the vocabulary of p_reference (ln p_reference - ln p_model), per predicted token, in nats

    Log-probabilities are float32; the mean over tokens and the 99th percentile (the tail that a mean hides) are
    taken in float64. The predictions are those that `perplexity` scores.

    Args:
        blocks: [N, T].
        batch_size: blocks in one forward pass.

    Raises:
        UsageError: the vocabularies differ in size, or the blocks do not suit one of the models.
        LowRankError: a divergence is not finite; the first such block is named.
    """
    sizes = {name: _vocabulary(one) for name, one in (("model", model), ("reference", reference))}
    if sizes["model"] != sizes["reference"]:
        raise UsageError(
            f"{model_name(model)} has {sizes['model']} tokens and the reference {model_name(reference)} "
            f"{sizes['reference']}: their distributions cannot be compared",
            hint="the reference must have the same tokenizer, such as the dense model a compressed one was made from",
        )
    check_blocks(model, blocks)
    check_blocks(reference, blocks)
    divergences: list[np.ndarray] = []
    num_agreeing = 0
    with evaluating(model), evaluating(reference):
        for start in tqdm(range(0, len(blocks), batch_size), desc="divergence", disable=None, leave=False):
            ids = blocks.ids[start : start + batch_size]
            batch = zip(next_token_logits(model, ids), next_token_logits(reference, ids), strict=True)
            for offset, (logits, reference_logits) in enumerate(batch):
                reference_logits = reference_logits.to(logits.device)
                kl = _kl_nats(reference_logits, logits)
                if not kl.isfinite().all():
                    raise LowRankError(
                        f"the divergence of {model_name(model)} from {model_name(reference)} is not finite "
                        f"on block {start + offset} of {len(blocks)}",
                        hint="look for NaN or Inf in the weights of the two, or evaluate them in float32",
                    )
                divergences.append(kl.double().cpu().numpy())
                num_agreeing += int((logits.argmax(-1) == reference_logits.argmax(-1)).sum())
    nats = np.concatenate(divergences)
    return Divergence(
        kl_nats=float(nats.mean()),
        kl_nats_p99=float(np.quantile(nats, 0.99)),
        top1_agreement=num_agreeing / nats.size,
        num_tokens=nats.size,
    )


def _kl_nats(reference_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || model) of each row of logits, [T, V] each, as float32 [T]."""
    reference_log_p = torch.log_softmax(reference_logits.float(), dim=-1)
    log_p = torch.log_softmax(logits.float(), dim=-1)
    return (reference_log_p.exp() * (reference_log_p - log_p)).sum(-1)


def _vocabulary(model: PreTrainedModel) -> int:
    return model.config.get_text_config().vocab_size
