"""One training run: text and settings in, a model folder with its log and everything needed to repeat it out."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, set_seed

from lowrank_kit.checkpoint.loading import check_blocks
from lowrank_kit.config import settings_difference, to_dict
from lowrank_kit.data.answers import AnswerTokens
from lowrank_kit.device import resolve_device
from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.matrices import find_matrices
from lowrank_kit.optim import NuMuonFactory
from lowrank_kit.processes import check_same, is_first, num_processes, on_first
from lowrank_kit.report.environment import environment
from lowrank_kit.report.files import new_folder, room_for, write_json
from lowrank_kit.scaling.mup import MuP
from lowrank_kit.scaling.sidecar import check_rule, save_rule
from lowrank_kit.training.checkpoints import newest_whole, rotate
from lowrank_kit.training.compressed import take_along
from lowrank_kit.training.data import RunData, load_data
from lowrank_kit.training.estimate import Estimate, check_memory, estimate_run
from lowrank_kit.training.guard import last_good_checkpoint_named
from lowrank_kit.training.model import build_model, outline_model, scaling_rule
from lowrank_kit.training.processes import batch_per_process, check_launch, launched_with_fsdp, unchanged_environment
from lowrank_kit.training.settings import PLACEMENT, TrainSettings
from lowrank_kit.training.sharding import check_can_shard
from lowrank_kit.training.state import model_tensors
from lowrank_kit.training.tracking import run_trackers
from lowrank_kit.training.trainer import RunTrainer, StopWhenTerminated, Terminated
from lowrank_kit.training.wiring import CHECKPOINTS, make_trainer, optimizer_options

RUN_FILE = "run.json"
_AGAIN = "restore it from a copy, or start again in a new folder"


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
        UsageError: settings or text that cannot be trained on; a resume with other settings or other text; a tracker
            that is not there; a launch that cannot train this.
        NonFiniteError: a loss, gradient or matrix that is not finite; it names the last good checkpoint.
        LowRankError: a checkpoint that cannot be written, or no whole one to resume.
        Terminated: SIGTERM, after a checkpoint where the run saves them.
        DoesNotFitError: more memory is needed than the device has left.
    """
    torch_device = resolve_device(device)
    check_launch(fsdp=settings.fsdp, replicas=settings.replicas)
    batch_per_process(settings.batch_size)
    if settings.fsdp or launched_with_fsdp():
        check_can_shard()
        if settings.lora is not None:
            raise UsageError("adapters are not sharded", hint="launch without FSDP, or leave out --lora")
    check_memory(estimate(settings).memory, settings, torch_device)
    with run_trackers(settings.trackers, output) as trackers:
        return _train(settings, output, resume, torch_device, trackers)


def _train(
    settings: TrainSettings, output: Path, resume: bool, torch_device: torch.device, trackers: list[TrainerCallback]
) -> dict[str, Any]:
    previous = _previous_run(output, settings) if resume else None
    set_seed(settings.seed)
    data = load_data(settings, saved_tokenizer=output if previous else None)
    if previous and previous["corpus"]["sha256"] != data.corpus.sha256:
        raise UsageError(
            f"the text of {data.corpus.source} has changed since the run in {output} started "
            f"(sha256 {previous['corpus']['sha256'][:12]} -> {data.corpus.sha256[:12]})",
            hint="restore the text, or start again in a new folder",
        )
    rule = scaling_rule(settings, data.tokenizer)
    if previous:
        check_rule(rule, output)
    model = build_model(settings, data.tokenizer, rule)
    check_blocks(model, data.train)
    check_blocks(model, data.heldout)
    if settings.checkpoint_activations and not model.supports_gradient_checkpointing:
        raise UsageError(f"{type(model).__name__} cannot checkpoint activations", hint="leave out that setting")
    if num_processes() > 1 and len(data.train) < settings.batch_size:  # accelerate would fill it up with repetitions
        raise UsageError(
            f"the text has {len(data.train)} sequences of {settings.block_tokens} tokens, fewer than a batch of "
            f"{settings.batch_size}",
            hint="take more text, a smaller --batch-size, or one process",
        )
    checkpoint = newest_whole(output / CHECKPOINTS) if previous else None
    if checkpoint is not None:  # the run may have been killed when one was saved and not yet another removed
        on_first(lambda: rotate(output / CHECKPOINTS, settings.keep_checkpoints))
    record = {**previous, "settings": to_dict(settings)} if previous else _start(output, settings, data, model, rule)
    stop = StopWhenTerminated(saves=settings.save_every > 0)
    trainer, log = make_trainer(settings, output, data, model, torch_device, trackers, rule, first=checkpoint is None)
    trainer.add_callback(stop)
    check_same({"text": data.train.sha256, "held-out text": data.heldout.sha256})
    with stop.listening(), last_good_checkpoint_named(trainer, output, output / CHECKPOINTS):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if stop.stopped:
            raise Terminated
        if log.validated_at != trainer.state.global_step:
            trainer.evaluate()
    record = {**record, "finished": True, "step": trainer.state.global_step, "validation_loss": log.validation_loss}
    _save_model(trainer, output, merge=settings.lora is not None)
    on_first(lambda: write_json(output / RUN_FILE, record))
    return record


def estimate(settings: TrainSettings) -> Estimate:
    """What `train` would take, from shapes alone: no text is read, nothing written, no weight made.

    Raises:
        UsageError: settings that no model or optimizer can be made of.
        DoesNotFitError: a tensor has more numbers than torch can count.
    """
    model = outline_model(settings)
    scaling_rule(settings, None)  # one that cannot be is refused here, too
    optimizer = NuMuonFactory()(model, **optimizer_options(settings))
    processes = num_processes()
    shards = processes // settings.replicas if settings.fsdp or launched_with_fsdp() else 1
    return estimate_run(model, optimizer, settings, processes=processes, shards=shards)


def stored_settings(output: Path) -> dict[str, Any]:
    """The settings a run was started with.

    Raises:
        UsageError: the folder holds no run.
    """
    return _read_run(output)["settings"]


def _read_run(output: Path) -> dict[str, Any]:
    try:
        record = json.loads((output / RUN_FILE).read_bytes())
    except FileNotFoundError:
        raise UsageError(
            f"nothing to resume in {output}: it has no {RUN_FILE}", hint="leave out --resume to start"
        ) from None
    except (ValueError, RecursionError) as error:
        raise LowRankError(f"{output / RUN_FILE} is damaged: {error}", hint=_AGAIN) from error
    match record:
        case {"schema_version": _, "settings": {}, "finished": bool(), "step": _, "corpus": {"sha256": str()}}:
            del record["schema_version"]  # the file's, not the run's
            return record
    lacking = "it lacks settings, finished, step or corpus"
    raise LowRankError(f"{output / RUN_FILE} is damaged: {lacking}", hint=_AGAIN)


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


def _start(
    output: Path, settings: TrainSettings, data: RunData, model: PreTrainedModel, rule: MuP | None
) -> dict[str, Any]:
    """Make the folder and its first run.json; returns the record."""
    matrices = find_matrices(model)
    adapters = 0 if settings.lora is None else sum(p.numel() for p in model.parameters() if p.requires_grad)
    record = {
        "settings": to_dict(settings),
        "finished": False,
        "step": 0,
        "validation_loss": None,
        "num_steps": settings.num_steps,
        "step_tokens": data.step_tokens(settings),
        "peak_lr": settings.peak_lr,
        "peak_adamw_lr": settings.peak_adamw_lr,
        "chosen": {name: settings.chosen(name) for name in ("momentum", "nesterov", "spectral_decay", "rank")},
        "parameters": sum(p.numel() for p in model.parameters()) - adapters,
        "matrix_parameters": sum(m.shape[0] * m.shape[1] for m in matrices),
        "corpus": {
            "source": data.corpus.source,
            "sha256": data.corpus.sha256,
            "train_blocks_sha256": data.train.sha256,
            "heldout_blocks_sha256": data.heldout.sha256,
            "train_tokens": data.train.num_tokens,
            "bytes_per_token": data.heldout.bytes_per_token,
        }
        | _chat_figures(data),
        "environment": environment(),
    }
    if settings.lora is not None:
        record |= {"lora_alpha": settings.chosen_lora_alpha, "adapter_parameters": adapters}
    if not is_first():
        return record
    if output.exists() and any(output.iterdir()):
        raise UsageError(f"output folder {output} is not empty", hint="give a new one, or resume the run that is in it")
    sizes = (len(data.tokenizer), len(json.dumps(record)))  # a token takes some 30 bytes in tokenizer.json
    # Killed before the folder is whole, the run is not begun.
    with new_folder(output) as folder, room_for(output, 30 * sizes[0] + sizes[1]):
        data.tokenizer.save_pretrained(folder)
        if rule is not None:
            save_rule(rule, folder)
        take_along(settings, model, folder)
        write_json(folder / RUN_FILE, record)
    return record


def _chat_figures(data: RunData) -> dict[str, int]:
    """How much of the corpus is learned; nothing to tell of plain text, all of which is."""
    if not isinstance(data.train, AnswerTokens):
        return {}
    return {"train_conversations": len(data.train), "train_answer_tokens": data.train.num_answer_tokens}


def _save_model(trainer: RunTrainer, output: Path, *, merge: bool) -> None:
    """Weights and config beside run.json, the weights last: a folder with weights is whole. `merge`: of adapters."""
    staging = output / ".saving"
    on_first(lambda: shutil.rmtree(staging, ignore_errors=True))
    try:
        with room_for(output / "model.safetensors", sum(t.nbytes for t in model_tensors(trainer.model).values())):
            trainer.save_pretrained(staging, merge=merge)
    except LowRankError as error:
        on_first(lambda: shutil.rmtree(staging, ignore_errors=True))
        again = f"{error.hint}; then lowrank train --resume -o {shlex.quote(str(output))}"
        raise LowRankError(error.message, hint=again) from error

    def move() -> None:
        files = sorted(staging.iterdir(), key=lambda file: (file.suffix == ".safetensors", file.name))
        for file in files:
            shutil.rmtree(output / file.name, ignore_errors=True)  # adapters, of a save that was interrupted
            os.replace(file, output / file.name)
        staging.rmdir()

    on_first(move)
