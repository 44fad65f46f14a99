"""One compression: a dense folder and settings in, a compressed folder out."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_kit.checkpoint.beside import copy_beside
from lowrank_kit.checkpoint.folder import CONFIG_FILE, Checkpoint
from lowrank_kit.checkpoint.loading import load_model
from lowrank_kit.checkpoint.writer import Shard, write_shards
from lowrank_kit.compression.auto import Choice, choose
from lowrank_kit.compression.calibration import Calibration
from lowrank_kit.compression.forecast import forecast
from lowrank_kit.compression.job import Job
from lowrank_kit.compression.needs import check_disk, planned_needs
from lowrank_kit.compression.plan import Plan, evidence_needed, make_plan, output_name
from lowrank_kit.compression.record import make_report, write_documents
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.compression.statistics import mean_loss
from lowrank_kit.compression.targets import targeted
from lowrank_kit.compression.texts import Texts
from lowrank_kit.compression.work import Kept, WorkFolder
from lowrank_kit.config import to_dict
from lowrank_kit.device import resolve_device, resolve_dtype, return_freed_memory
from lowrank_kit.processes import connect, num_processes, on_first, process_index
from lowrank_kit.report.environment import PACKAGES, environment
from lowrank_kit.report.tables import duration

logger = logging.getLogger(__name__)

LOG_FILE = "compression.jsonl"


def compress(
    model: str | Path,
    output: str | Path,
    settings: CompressSettings,
    *,
    calibration: Calibration | None = None,
    device: str = "auto",
    dtype: str = "float32",
    resume: bool = False,
    spill: str | Path | None = None,
) -> dict[str, Any]:
    """Factorize the matrices of a checkpoint and write the compressed folder.

    The model is in memory one block at a time, but for refinement end to end, and for a model whose blocks cannot be
    run one by one. What is finished is kept beside the output, under its name with `.partial`, until that is whole.

    Args:
        model: a folder, or the name of a model on the hub; dense.
        output: folder to make; appears whole or not at all.
        settings: see `CompressSettings`.
        calibration: from `calibrate` with this model; None gathers block by block what the settings ask for.
        device: where the text is run.
        dtype: number format of the runs, but for refinement; the weights on disk keep theirs.
        resume: go on with what an earlier run of the same settings has left.
        spill: folder for hidden states on their way through the blocks; None keeps them in memory. What is freed is
            given back at once, too, which takes time.

    Returns:
        The contents of compression.json.

    Raises:
        UsageError: no such model, not a dense causal LM, an output that is not empty, too little text, another process
            at the same output, an unfinished compression with other settings.
        DoesNotFitError: a budget below the smallest possible, or too little disk.
        LowRankError: a broken shard, NaN or Inf in a matrix, an activation or a loss.
    """
    checkpoint, work = targeted(Checkpoint.open(model), settings), WorkFolder(Path(output))
    return_freed_memory(at_any_cost=spill is not None)
    where, number = connect(resolve_device(device)), resolve_dtype(dtype)
    with work.open(resume=resume):
        if on_first(work.is_whole):
            return on_first(work.finish)
        choice = on_first(lambda: _choice(checkpoint, settings, where, work))
        needed = evidence_needed(checkpoint, choice.settings)
        if not resume:  # what is finished has its disk
            _check_disk(checkpoint, choice.settings, number, Path(output), spill)
        hashes = on_first(checkpoint.verify)
        job = Job(checkpoint, choice.settings, needed, work, calibration=calibration, device=where, dtype=number)
        fingerprint = _fingerprint(checkpoint, hashes, settings, job.texts, device=str(where), dtype=dtype)
        on_first(lambda: work.begin(fingerprint, choice.kept()))
        _tell(choice)
        with _spilled(spill, work.output.name, fingerprint) as folder:
            plan, evidence = job.plan(folder)
            expected = forecast(plan.matrices, evidence, choice.settings.refine or "none")
            if expected is not None:
                logger.info("forecast: +%.3g nats per token, within a factor of %g (%s)", *expected.values())
            kept = job.fold(plan, folder)
        told = {"choice": choice.record(), "forecast": expected}
        return on_first(lambda: _finish(job, plan, kept, str(model), told, device=device, dtype=dtype))


def _finish(
    job: Job, plan: Plan, kept: Kept, model: str, told: Mapping[str, Any], *, device: str, dtype: str
) -> dict[str, Any]:
    """Write the result with its report and give it its name; `told` is in the report, too."""
    work, made = job.work, kept.as_made(plan)
    _write(made, kept, work.result)
    report = make_report(made, model, job.texts, kept, job.seconds, device=device, dtype=dtype)
    report |= told
    write_documents(work.result, made, report)
    if report["check"] is not None:
        report["check"] |= _losses(report["check"], job, work.result, resolve_dtype(dtype))
        write_documents(work.result, made, report)
    if work.log.exists():
        shutil.copyfile(work.log, work.result / LOG_FILE)
    work.finish()
    return report


def _check_disk(
    checkpoint: Checkpoint, settings: CompressSettings, dtype: torch.dtype | str, output: Path, spill: str | Path | None
) -> None:
    plan = make_plan(checkpoint, replace(settings, allocation="uniform"))
    needs = planned_needs(plan, settings, dtype=dtype, spill=spill is not None)
    check_disk(needs, output, None if spill is None else Path(spill))


def _choice(checkpoint: Checkpoint, settings: CompressSettings, device: torch.device, work: WorkFolder) -> Choice:
    """As it was made when the work was begun: another time of day, another speed."""
    manifest = work.manifest()
    return choose(checkpoint, settings, device) if manifest is None else Choice.of(manifest["choice"])


def _tell(choice: Choice) -> None:
    for reason in choice.reasons:
        logger.info("chosen: %s", reason)
    for name, stage in choice.stages.items():
        if stage["tokens"]:
            logger.info("%s: %s tokens, %s", name, f"{stage['tokens']:,.0f}", duration(stage["seconds"]))


def _fingerprint(
    checkpoint: Checkpoint,
    hashes: Mapping[str, str],
    settings: CompressSettings,
    texts: Texts | None,
    **run: str,
) -> dict[str, Any]:
    """All that decides the bytes of the output."""
    found, versions = environment(), (*PACKAGES, "commit", "python")
    config = hashlib.sha256((checkpoint.path / CONFIG_FILE).read_bytes()).hexdigest()
    return {
        "files": {CONFIG_FILE: config, **hashes},
        "settings": to_dict(settings),
        "texts": {} if texts is None else {name: blocks.sha256 for name, blocks in texts.sets.items()},
        # The order of sums goes by the processes and their threads, and shows in the last digits.
        "run": {**run, "processes": num_processes(), "threads": torch.get_num_threads()},
        "versions": {name: found[name] for name in versions},
    }


@contextmanager
def _spilled(spill: str | Path | None, name: str, fingerprint: Mapping[str, Any]) -> Iterator[Path | None]:
    """A folder of this compression's and this process's own, removed once it has gone well."""
    if spill is None:
        yield None
        return
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:12]
    shared = Path(spill) / f"{name}-{digest}"
    folder = shared / f"process-{process_index()}"
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    shutil.rmtree(folder)
    with suppress(OSError):  # of another process something is still there
        shared.rmdir()


def _write(plan: Plan, kept: Kept, folder: Path) -> None:
    """All files but the documents."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_shards(folder, list(plan.shards), _filler(plan, kept))
    copy_beside(plan.checkpoint.path, folder)


def _filler(plan: Plan, kept: Kept) -> Callable[[Shard], Iterator[tuple[str, Tensor]]]:
    """Gives the tensors of a shard: what was made, in the dtype that was planned, and the rest read from the source."""
    factorized = {m.stored.tensors[0]: m for m in plan.matrices if m.rank is not None}
    source_of = {output_name(name, factorized): name for name in plan.checkpoint.headers}
    made = kept.places(plan)

    def fill(shard: Shard) -> Iterator[tuple[str, Tensor]]:
        names = [header.name for header in shard.headers]
        yield from kept.read({name: made[name] for name in names if name in made})
        wanted = {source_of[name]: name for name in names if name not in made}
        for source, tensor in plan.checkpoint.tensors(wanted):
            yield wanted[source], tensor

    return fill


def _losses(known: Mapping[str, float], job: Job, folder: Path, dtype: torch.dtype | str) -> dict[str, float]:
    """Losses on the check text that folding has not told, or that are of what refinement has changed since."""
    found = {} if job.calibration is None else {"loss_dense": job.calibration.check_loss}
    if "loss_compressed" not in known or job.settings.refine in ("e2e", "both"):
        assert job.texts is not None
        model = load_model(Checkpoint.open(folder), device=job.device, dtype=dtype)
        found["loss_compressed"] = mean_loss(model, job.texts.check, batch_size=job.settings.batch_size)
    return found
