"""transformers' Trainer with the checkpoints of this package, and a stop between steps when asked to terminate."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from lowrank_kit.processes import are_connected
from lowrank_kit.scaling.mup import MuP
from lowrank_kit.training.guard import GuardedTrainer
from lowrank_kit.training.lora import save_adapters
from lowrank_kit.training.state import load_random_state, load_state, model_tensors, save_state


class Terminated(KeyboardInterrupt):
    """SIGTERM ended a run between two steps. Exit code 143, as shells report it: 128 + SIGTERM."""

    exit_code = 128 + signal.SIGTERM


class RunTrainer(GuardedTrainer):
    """A Trainer whose checkpoints are those of `lowrank_kit.training.checkpoints`.

    `args.save_total_limit` says how many stay. The last step is not saved: the model itself is, right after it.
    """

    rule: MuP | None = None

    def follow(self, rule: MuP) -> None:
        """Clip and log as the model does whose settings these are.

        Args:
            rule: that the optimizer's groups were scaled by.
        """
        self.rule, accelerator = rule, self.accelerator

        def clip(parameters: Any, max_norm: float, norm_type: int = 2) -> Tensor:
            accelerator.unscale_gradients()
            return rule.clip_grad_norm_(self.model, max_norm)

        accelerator.clip_grad_norm_ = clip

    def _get_learning_rate(self) -> float:
        """Of the matrices, as it was given for the smaller model."""
        if self.rule is None:
            return float(super()._get_learning_rate())
        groups = self.optimizer.param_groups
        group = next((group for group in groups if group["name"].startswith("matrices")), groups[0])
        return float(group["lr"] / group["lr_ratio"])

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Whole batches are for training: a validation leaves nothing out."""
        whole, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = whole

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            return
        self.store_flos()
        save_state(
            Path(self.args.output_dir),
            self.state.global_step,
            self.model,
            self._bare_optimizer(),
            schedules=self._schedules(),
            documents={TRAINER_STATE_NAME: asdict(self.state)},
            keep=self.args.save_total_limit or 1,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Weights are read with the rest, once they lie where they train."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_state(Path(checkpoint), self.model, self._bare_optimizer(), schedules=self._schedules())

    def _load_scaler(self, checkpoint: str | None) -> None:
        """It is among the schedules."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_random_state(Path(checkpoint), self.args.seed)

    def _schedules(self) -> dict[str, Any]:
        scaler = getattr(self.accelerator, "scaler", None)
        return {"scheduler": self.lr_scheduler, **({} if scaler is None else {"scaler": scaler})}

    def _bare_optimizer(self) -> torch.optim.Optimizer:
        bare: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        return bare

    def save_pretrained(self, folder: Path, *, merge: bool = False) -> None:
        """Write the model as a Hugging Face folder, from the first process; called on every process at once.

        Args:
            folder: to make.
            merge: write its LoRA adapters apart, and the model with them merged in.
        """
        model = self.accelerator.unwrap_model(self.model)
        state = None
        if any(isinstance(p, DTensor) for p in model.parameters()):
            state = {}
            for name, tensor in model_tensors(model).items():
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                if self.is_world_process_zero():
                    state[name] = whole.detach().cpu()
        if self.is_world_process_zero():
            model = save_adapters(model, folder) if merge else model
            model.save_pretrained(folder, state_dict=state)


class StopWhenTerminated(TrainerCallback):
    """On SIGTERM to any process, all stop after the step they are in, with a checkpoint if there are any.

    Args:
        saves: whether the run saves checkpoints.
    """

    def __init__(self, saves: bool) -> None:
        self.saves = saves
        self.asked = False
        self.stopped = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM as long as the block runs; a second one ends the process at once."""
        if threading.current_thread() is not threading.main_thread():  # only there Python takes signals
            yield
            return
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop if any process was asked to; after the last step what is left is to save the model."""
        asked = self.asked
        if are_connected():
            anyone = torch.tensor([float(asked)], device=args.device)
            dist.all_reduce(anyone, op=dist.ReduceOp.MAX)
            asked = bool(anyone.item())
        if asked and state.global_step < state.max_steps:
            self.stopped = control.should_training_stop = True
            control.should_save |= self.saves

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
