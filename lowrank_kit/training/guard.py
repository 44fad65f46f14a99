"""Stops a run at the first number that is not finite, and says where it can go on."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from transformers import Trainer

from lowrank_kit.errors import NonFiniteError
from lowrank_kit.processes import are_connected
from lowrank_kit.training.checkpoints import step_of, whole_checkpoints


class GuardedTrainer(Trainer):
    """A Trainer that stops at a loss that is not finite before a step is made of it. Gradients the optimizer refuses.

    Raises:
        NonFiniteError: a loss of training or validation is not finite.
    """

    _step_loss: Tensor | None = None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As transformers'; looks at the loss of a step once its last forward pass is through."""
        loss: Tensor = super().training_step(*args, **kwargs)
        # Summed where it is: on a GPU it is read once a step, just before the optimizer waits for the gradients anyway.
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        if self.accelerator.sync_gradients:
            total, self._step_loss = self._step_loss.clone(), None
            if are_connected():  # all stop, and none waits for the others
                dist.all_reduce(total)
            _refuse(total.item(), "loss", self.state.global_step)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As transformers', of numbers that are finite."""
        _refuse(logs.get("eval_loss", 0.0), "validation loss", self.state.global_step)
        super().log(logs, *args, **kwargs)


def _refuse(loss: float, name: str, step: int) -> None:
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"the {name} is not finite at step {step} ({loss}); no step was made of it",
            hint="lower the learning rate, or resume from the last checkpoint",
        )


@contextmanager
def last_good_checkpoint_named(trainer: Trainer, output: Path, checkpoints: Path) -> Iterator[None]:
    """Add to a `NonFiniteError` the last good checkpoint of the run, and how to go on from it.

    Good is one whose next step was made: what a checkpoint of this very step holds gave the number that is not finite.

    Args:
        trainer: that of the run.
        output: folder of the run.
        checkpoints: folder that holds `checkpoint-STEP`.
    """
    try:
        yield
    except NonFiniteError as error:
        step = trainer.state.global_step
        found = {step_of(checkpoint): checkpoint for checkpoint in whole_checkpoints(checkpoints)}
        good = [folder for made, folder in sorted(found.items()) if made < step]
        if not good:
            hint = "lower the learning rate, with --lr or a longer --warmup; --save-every keeps checkpoints"
            raise NonFiniteError(f"{error.message}; there is no good checkpoint", hint=hint) from error
        resume = f"lowrank train --resume -o {shlex.quote(str(output))}"
        if step in found:
            resume = f"rm -r {shlex.quote(str(found[step]))} && {resume}"
        raise NonFiniteError(
            f"{error.message}; the last good checkpoint is {good[-1]}",
            hint=f"{resume}; should it stop there again, start anew with a lower --lr",
        ) from error
