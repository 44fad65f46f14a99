"""Floating point operations of a forward pass, counted from a checkpoint's headers: what a speed stands beside.

A product counts 2 for each number that a token meets. Norms, activations, softmax and routers are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import PreTrainedModel

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.stored import StoredMatrix
from lowrank_kit.matrices import token_share


@dataclass(frozen=True)
class TokenFlops:
    """Floating point operations that one token takes.

    Args:
        matrices: in the matrices: 2 m n of a dense one, 2 r (m + n) of two factors, 2 (r n + (m - r) r) of a pivoted
            one, and of experts those that a token goes to.
        head: in the LM head.
        attention: in scores and sums of values, for each position that is attended to.
    """

    matrices: float
    head: float
    attention: float

    def prefill(self, prompt: int) -> float:
        """Of a prompt and the logits of its last token; attention is over the whole square, as kernels are counted."""
        return prompt * (self.matrices + prompt * self.attention) + self.head

    def decode(self, prompt: int, new_tokens: int) -> float:
        """Of each token on average, from the second new one on, attending to all before it and to itself."""
        return self.matrices + self.head + (prompt + new_tokens / 2) * self.attention


def token_flops(checkpoint: Checkpoint) -> TokenFlops:
    """Count a model, dense or compressed, from its headers.

    Raises:
        UsageError: no causal LM, no matrix in it, or a quantized checkpoint.
        LowRankError: config and tensors disagree, or a newer format version.
    """
    model, matrices = checkpoint.meta_model(), checkpoint.matrices()
    inputs = sum(stored.matrix.shape[1] for stored in matrices if stored.matrix.role == "o")
    return TokenFlops(
        matrices=sum(token_share(model, stored.matrix) * _product(checkpoint, stored) for stored in matrices),
        head=_head(checkpoint, model),
        attention=4.0 * inputs,
    )


def _product(checkpoint: Checkpoint, stored: StoredMatrix) -> float:
    out, inputs = stored.matrix.shape
    if not stored.compressed:
        return 2.0 * out * inputs
    rank = checkpoint.headers[stored.A].shape[-2]
    made = out - rank if stored.form.startswith("pivoted") else out
    # The halves of a fused gate_up have one A.
    return 2.0 * rank * (inputs / stored.parts + made)


def _head(checkpoint: Checkpoint, model: PreTrainedModel) -> float:
    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    if not {f"{name}.A.weight", f"{name}.A.codes"}.isdisjoint(checkpoint.headers):
        return _product(checkpoint, checkpoint.with_head().matrices()[-1])
    return 2.0 * math.prod(head.weight.shape)
