"""Running a model over token blocks: what perplexity and divergence share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_kit.data.blocks import TokenBlocks
from lowrank_kit.errors import UsageError


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode and no autograd inside; every module's own training flag is put back at the end."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        # Not module.train(), which would set the children too.
        for module in training:
            module.training = True


def model_name(model: PreTrainedModel) -> str:
    """What to call a model in a message: where it was loaded from, or else its class."""
    return model.name_or_path or type(model).__name__


def check_blocks(model: PreTrainedModel, blocks: TokenBlocks) -> None:
    """Refuse token ids that the model has no embedding for, and blocks longer than its context.

    Raises:
        UsageError: one of the two, with both numbers.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    largest = int(blocks.ids.max())
    if largest >= vocabulary:
        raise UsageError(
            f"the text has the token id {largest}, but {model_name(model)} knows {vocabulary} tokens",
            hint="make the blocks with the model's own tokenizer",
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and blocks.block_tokens > context:
        raise UsageError(
            f"blocks of {blocks.block_tokens} tokens are longer than the context of {model_name(model)}, {context}",
            hint=f"make blocks of at most {context} tokens",
        )


def next_token_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The logits of each token from those before it.

    Args:
        ids: integer [B, T], on any device.

    Returns:
        [B, T - 1, V], in the model's dtype and on its device; row t predicts ids[:, t + 1].
    """
    return model(input_ids=ids.to(model.device, torch.long), use_cache=False).logits[:, :-1]
