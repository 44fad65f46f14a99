"""Running a model over token blocks: what perplexity and divergence share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_kit.checkpoint.loading import in_evaluation


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode and no autograd inside; every module's own training flag is put back at the end."""
    with in_evaluation(model), torch.inference_mode():
        yield


def model_name(model: PreTrainedModel) -> str:
    """What to call a model in a message: where it was loaded from, or else its class."""
    return model.name_or_path or type(model).__name__


def next_token_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The logits of each token from those before it.

    Args:
        ids: integer [B, T], on any device.

    Returns:
        [B, T - 1, V], in the model's dtype and on its device; row t predicts ids[:, t + 1].
    """
    return model(input_ids=ids.to(model.device, torch.long), use_cache=False).logits[:, :-1]
