"""One training run: text and settings in, a model folder with its log and everything needed to repeat it out."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from lowrank_kit.checkpoint.loading import check_blocks
from lowrank_kit.config import settings_difference, to_dict
from lowrank_kit.device import resolve_device
from lowrank_kit.errors import UsageError
from lowrank_kit.matrices import find_matrices
from lowrank_kit.optim import NuMuonFactory, parse_overrides
from lowrank_kit.report.environment import environment
from lowrank_kit.report.files import write_json
from lowrank_kit.training.callbacks import ProgressLog
from lowrank_kit.training.checkpoints import newest_whole
from lowrank_kit.training.data import RunData, load_data
from lowrank_kit.training.model import build_model
from lowrank_kit.training.processes import (
    batch_per_process,
    check_launch,
    check_same,
    is_first,
    launched_with_fsdp,
    num_processes,
    on_first,
    replicas,
    unchanged_environment,
)
from lowrank_kit.training.settings import LR_SCHEDULES, PLACEMENT, TrainSettings
from lowrank_kit.training.sharding import check_can_shard, sharding_arguments
from lowrank_kit.training.trainer import RunTrainer, StopWhenTerminated, Terminated

RUN_FILE = "run.json"
LOG_FILE = "log.jsonl"
CHECKPOINTS = "checkpoints"


@unchanged_environment()
def train(settings: TrainSettings, output: Path, *, resume: bool = False, device: str = "auto") -> dict[str, Any]:
    """Train a model from scratch or fine-tune one, and save it as a Hugging Face folder.

    The folder appears with run.json (settings, hashes, versions), log.jsonl and the tokenizer; the weights are added
    when training is done, so a folder with weights is a finished run.

    Started by torchrun or accelerate launch, every process calls this: the batch is spread over them, and the first one
    writes.

    Args:
        settings: see `TrainSettings`.
        output: folder to make; with `resume` the folder of the interrupted run.
        resume: go on from the newest whole checkpoint, saved by as many processes or not; by as many, the result is
            that of an uninterrupted run, bit for bit on CPU.
        device: `auto`, `cpu`, `cuda` or `mps`.

    Returns:
        The contents of run.json.

    Raises:
        UsageError: settings or text that cannot be trained on; a resume with other settings or other text; a launch
            that cannot train this.
        LowRankError: a gradient that is not finite; a checkpoint that cannot be written, or no whole one to resume.
        Terminated: SIGTERM, after a checkpoint where the run saves them.
    """
    torch_device = resolve_device(device)
    check_launch(fsdp=settings.fsdp, replicas=settings.replicas)
    batch_per_process(settings.batch_size)
    if settings.fsdp or launched_with_fsdp():
        check_can_shard()
    previous = _previous_run(output, settings) if resume else None
    set_seed(settings.seed)
    data = load_data(settings, saved_tokenizer=output if previous else None)
    if previous and previous["corpus"]["sha256"] != data.corpus.sha256:
        raise UsageError(
            f"the text of {data.corpus.source} has changed since the run in {output} started "
            f"(sha256 {previous['corpus']['sha256'][:12]} -> {data.corpus.sha256[:12]})",
            hint="restore the text, or start again in a new folder",
        )
    model = build_model(settings, data.tokenizer)
    check_blocks(model, data.train)
    check_blocks(model, data.heldout)
    if num_processes() > 1 and len(data.train) < settings.batch_size:  # accelerate would fill it up with repetitions
        raise UsageError(
            f"the text has {len(data.train)} sequences of {settings.block_tokens} tokens, fewer than a batch of "
            f"{settings.batch_size}",
            hint="take more text, a smaller --batch-size, or one process",
        )
    NuMuonFactory()(model, **_optimizer_options(settings))  # refuses, if it does, before the folder is made
    checkpoint = newest_whole(output / CHECKPOINTS) if previous else None
    record = {**previous, "settings": to_dict(settings)} if previous else _start(output, settings, data, model)
    stop = StopWhenTerminated(saves=settings.save_every > 0)
    trainer, log = _trainer(settings, output, data, model, torch_device)
    trainer.add_callback(stop)
    check_same({"text": data.train.sha256, "held-out text": data.heldout.sha256})
    with stop.listening():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stop.stopped:
        raise Terminated
    if log.validated_at != trainer.state.global_step:
        trainer.evaluate()
    record = {**record, "finished": True, "step": trainer.state.global_step, "validation_loss": log.validation_loss}
    _save_model(trainer, output)
    on_first(lambda: write_json(output / RUN_FILE, record))
    return record


def stored_settings(output: Path) -> dict[str, Any]:
    """The settings a run was started with.

    Raises:
        UsageError: the folder holds no run.
    """
    return _read_run(output)["settings"]


def _read_run(output: Path) -> dict[str, Any]:
    try:
        record = json.loads((output / RUN_FILE).read_text())
    except FileNotFoundError:
        raise UsageError(
            f"nothing to resume in {output}: it has no {RUN_FILE}", hint="leave out --resume to start"
        ) from None
    del record["schema_version"]  # the file's, not the run's
    return record


def _previous_run(output: Path, settings: TrainSettings) -> dict[str, Any]:
    """run.json of the run to resume, after checking that it is the same run and not finished."""
    record = _read_run(output)
    placed = {name: getattr(settings, name) for name in PLACEMENT}
    difference = settings_difference({**record["settings"], **placed}, to_dict(settings))
    if difference:
        raise UsageError(
            f"the run in {output} was started with other settings: {'; '.join(difference)}",
            hint="resume with the same settings, or start in a new folder",
        )
    if record["finished"]:
        raise UsageError(f"the run in {output} is finished at step {record['step']}: nothing to resume")
    return record


def _start(output: Path, settings: TrainSettings, data: RunData, model: PreTrainedModel) -> dict[str, Any]:
    """Make the folder and its first run.json; returns the record."""
    matrices = find_matrices(model)
    record = {
        "settings": to_dict(settings),
        "finished": False,
        "step": 0,
        "validation_loss": None,
        "num_steps": settings.num_steps,
        "step_tokens": settings.step_tokens,
        "peak_lr": settings.peak_lr,
        "peak_adamw_lr": settings.peak_adamw_lr,
        "chosen": {name: settings.chosen(name) for name in ("momentum", "nesterov", "spectral_decay", "rank")},
        "parameters": sum(p.numel() for p in model.parameters()),
        "matrix_parameters": sum(m.shape[0] * m.shape[1] for m in matrices),
        "corpus": {
            "source": data.corpus.source,
            "sha256": data.corpus.sha256,
            "train_blocks_sha256": data.train.sha256,
            "heldout_blocks_sha256": data.heldout.sha256,
            "train_tokens": data.train.num_tokens,
            "bytes_per_token": data.heldout.bytes_per_token,
        },
        "environment": environment(),
    }
    if not is_first():
        return record
    if output.exists() and any(output.iterdir()):
        raise UsageError(f"output folder {output} is not empty", hint="give a new one, or resume the run that is in it")
    output.mkdir(parents=True, exist_ok=True)
    data.tokenizer.save_pretrained(output)
    write_json(output / RUN_FILE, record)
    return record


def _trainer(
    settings: TrainSettings, output: Path, data: RunData, model: PreTrainedModel, device: torch.device
) -> tuple[RunTrainer, ProgressLog]:
    num_steps = settings.num_steps
    batch = batch_per_process(settings.batch_size)
    args = TrainingArguments(
        output_dir=str(output / CHECKPOINTS),
        max_steps=num_steps,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=_even_batch(len(data.heldout), batch),
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.peak_lr,
        lr_scheduler_type=LR_SCHEDULES[settings.lr_schedule],
        warmup_steps=round(settings.warmup * num_steps),
        max_grad_norm=settings.clip,
        bf16=settings.bf16,
        # Told to use the CPU, accelerate would shard nothing; see `check_can_shard`.
        use_cpu=device.type == "cpu" and not settings.fsdp,
        seed=settings.seed,
        logging_steps=settings.log_every,
        # A loss that is not finite shows as it is; the filter would log a running mean instead.
        logging_nan_inf_filter=False,
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
        report_to=[],
        **sharding_arguments(model, fsdp=settings.fsdp, replicas=settings.replicas),
    )
    args._n_gpu = min(args.n_gpu, 1)  # a process has one device: the Trainer would take all it sees
    log = ProgressLog(output / LOG_FILE, settings.step_tokens)
    trainer = RunTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.heldout,
        optimizer_cls_and_kwargs=(NuMuonFactory, _optimizer_options(settings) | {"process_group": replicas()}),
        callbacks=[log],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, log


def _optimizer_options(settings: TrainSettings) -> dict[str, Any]:
    """What `parameter_groups` takes of the settings."""
    return {
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


def _save_model(trainer: RunTrainer, output: Path) -> None:
    """Weights and config beside run.json, the weights last: a folder with weights is whole."""
    staging = output / ".saving"
    on_first(lambda: shutil.rmtree(staging, ignore_errors=True))
    trainer.save_pretrained(staging)

    def move() -> None:
        files = sorted(staging.iterdir(), key=lambda file: (file.suffix == ".safetensors", file.name))
        for file in files:
            os.replace(file, output / file.name)
        staging.rmdir()

    on_first(move)
