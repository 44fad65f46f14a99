"""The settings of a run as transformers' Trainer takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from lowrank_kit.config import to_dict
from lowrank_kit.data.answers import AnswerTokens
from lowrank_kit.optim import NuMuonFactory, parse_overrides
from lowrank_kit.processes import num_processes
from lowrank_kit.scaling.mup import MuP
from lowrank_kit.training.answers import AnswerTrainer
from lowrank_kit.training.callbacks import ProgressLog
from lowrank_kit.training.data import RunData
from lowrank_kit.training.effective_rank import EffectiveRanks
from lowrank_kit.training.processes import batch_per_process, replicas
from lowrank_kit.training.settings import TrainSettings
from lowrank_kit.training.sharding import sharding_arguments
from lowrank_kit.training.tracking import RunArguments
from lowrank_kit.training.trainer import RunTrainer

LOG_FILE = "log.jsonl"
CHECKPOINTS = "checkpoints"
# What transformers called "gradient checkpointing" before it renamed it.
_NEW_NAME = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
CHECKPOINT_ACTIVATIONS = "activation_checkpointing" if _NEW_NAME else "gradient_checkpointing"


def make_trainer(
    settings: TrainSettings,
    output: Path,
    data: RunData,
    model: PreTrainedModel,
    device: torch.device,
    trackers: list[TrainerCallback],
    rule: MuP | None = None,
    *,
    first: bool,
) -> tuple[RunTrainer, ProgressLog]:
    """The Trainer of a run, and its log.

    Args:
        settings: of the run.
        output: its folder.
        data: what it reads.
        model: what it trains.
        device: where.
        trackers: callbacks that are to see the figures of the log.
        rule: that carries the settings over from a smaller model.
        first: whether it starts, and does not resume.
    """
    args = _arguments(settings, output, data, model, device, first=first)
    step_tokens = data.step_tokens(settings)
    log = ProgressLog(output / LOG_FILE, step_tokens)
    ranks = [EffectiveRanks(settings.spectra_every, step_tokens // num_processes())] if settings.spectra_every else []
    trainer = (AnswerTrainer if isinstance(data.train, AnswerTokens) else RunTrainer)(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.heldout,
        optimizer_cls_and_kwargs=(NuMuonFactory, optimizer_options(settings, rule) | {"process_group": replicas()}),
        callbacks=[*ranks, log, *trackers],
    )
    trainer.remove_callback(PrinterCallback)
    if rule is not None:
        trainer.follow(rule)
    return trainer, log


def _arguments(
    settings: TrainSettings, output: Path, data: RunData, model: PreTrainedModel, device: torch.device, *, first: bool
) -> RunArguments:
    num_steps = settings.num_steps
    batch = batch_per_process(settings.batch_size)
    args = RunArguments(
        output_dir=str(output / CHECKPOINTS),
        max_steps=num_steps,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=_even_batch(len(data.heldout), batch),
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.peak_lr,
        **settings.scheduler(),
        max_grad_norm=settings.clip,
        bf16=settings.bf16,
        torch_compile=settings.compile,
        **{CHECKPOINT_ACTIVATIONS: settings.checkpoint_activations},
        # Told to use the CPU, accelerate would shard nothing; see `check_can_shard`.
        use_cpu=device.type == "cpu" and not settings.fsdp,
        seed=settings.seed,
        logging_steps=settings.log_every,
        # A loss that is not finite shows as it is; the filter would log a running mean instead.
        logging_nan_inf_filter=False,
        # A validation that cannot be made shows before anything is lost. A resumed run has been through it.
        eval_on_start=first,
        eval_strategy="steps" if settings.eval_every else "no",
        eval_steps=settings.eval_every or None,
        prediction_loss_only=True,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or num_steps,
        save_total_limit=settings.keep_checkpoints,
        dataloader_pin_memory=device.type == "cuda",
        # Every step takes whole batches, so that the same settings train the same on any number of processes.
        dataloader_drop_last=len(data.train) >= settings.batch_size,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        # Trackers are added below: they stand after the callbacks whose figures they are to see.
        report_to=[],
        **sharding_arguments(model, fsdp=settings.fsdp, replicas=settings.replicas),
        run_name=output.absolute().name,
        run_settings=to_dict(settings),
    )
    args._n_gpu = min(args.n_gpu, 1)  # a process has one device: the Trainer would take all it sees
    return args


def optimizer_options(settings: TrainSettings, rule: MuP | None = None) -> dict[str, Any]:
    """What `NuMuonFactory` takes of the settings, and of the rule that scales them."""
    return {
        "scaled": None if rule is None else rule.scaled,
        "rule": settings.optimizer,
        "lr": settings.peak_lr,
        "adamw_lr": settings.peak_adamw_lr,
        "weight_decay": settings.weight_decay,
        "spectral_decay": settings.chosen("spectral_decay"),
        "momentum": settings.chosen("momentum"),
        "nesterov": settings.chosen("nesterov"),
        "rank_schedule": settings.chosen("rank"),
        "topk": settings.topk,
        "overrides": parse_overrides(settings.overrides),
        "total_steps": settings.num_steps,
    }


def _even_batch(sequences: int, largest: int) -> int:
    """The largest batch that leaves no smaller one at the end, so that the mean over batches is that over sequences."""
    return next(size for size in range(largest, 0, -1) if sequences % (size * num_processes()) == 0 or size == 1)
