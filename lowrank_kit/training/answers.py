"""Training on conversations: losses are means over answer tokens, however they are spread over batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from lowrank_kit.data.answers import padded
from lowrank_kit.training.trainer import RunTrainer


class AnswerTrainer(RunTrainer):
    """A Trainer for `AnswerTokens`: the loss of a step is the mean over the answer tokens of all its batches, that of a
    validation the mean over those of the whole held-out part. Arguments as those of `RunTrainer`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A loss of our own: not every model of transformers divides its by the tokens of the whole step.
        super().__init__(*args, data_collator=padded, compute_loss_func=_answer_loss, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss of a batch, such that the mean over conversations is the mean over answer tokens.

        That mean is what Trainer takes; batches have answers of different length.
        """
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        share = self.eval_dataset.num_answer_tokens / len(self.eval_dataset)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = _answer_loss(model(**inputs), labels, num_items_in_batch=len(labels) * share)
        return loss, None, None


def _answer_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | float | None = None) -> Tensor:
    return ForCausalLMLoss(outputs.logits, labels, outputs.logits.shape[-1], num_items_in_batch)
