"""Runs of one or several processes without a start-up each: one import, then forks that see what torchrun would set.

`python -m tests.training.launch PLAN.json`; a plan is a list of `Run`s as JSON, made one after the other. What a
process raises goes to `OUTPUT.RANK.error`.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import LlamaConfig, LlamaForCausalLM

from lowrank_kit.training.callbacks import ProgressLog
from lowrank_kit.training.run import train
from lowrank_kit.training.settings import TrainSettings


@dataclass(frozen=True)
class Run:
    """One run of a plan.

    Args:
        output: its folder.
        settings: of `TrainSettings`; RANK in the text's name stands for the number of the process.
        processes: how many.
        resume: go on from a checkpoint.
        copy_of: a folder to copy first.
        stop: ends it at the end of that step, as Ctrl-C does.
        full: step after which the last process can write no file of more than 20 kB.
        signal: which the last process sends itself, at the end of step `after`, or at the file it then is the
            `sync`-th to bring to the disk.
    """

    output: str
    settings: dict[str, Any]
    processes: int = 1
    resume: bool = False
    copy_of: str | None = None
    stop: int | None = None
    full: int | None = None
    signal: int | None = None
    after: int = 0
    sync: int = 0


def launch_all(runs: list[Run], plan: Path) -> None:
    """Make the runs of a plan, in a Python of their own."""
    plan.write_text(json.dumps([asdict(run) for run in runs]))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(plan)],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def errors_of(output: Path) -> list[str]:
    """What the processes of a run raised."""
    return [file.read_text() for file in sorted(output.parent.glob(f"{output.name}.*.error"))]


def shard_on_the_cpu() -> None:
    """accelerate shards on accelerators only; with this it takes the CPU for one. For tests: nothing else does it."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)


def at_step(step: int, act: Callable[[], None]) -> None:
    """Have something done at the end of a step."""
    on_step_end = ProgressLog.on_step_end

    def acting(self: ProgressLog, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == step:
            act()

    ProgressLog.on_step_end = acting  # type: ignore[method-assign]


def interrupt() -> None:
    raise KeyboardInterrupt


def signal_itself(number: int, sync: int) -> None:
    """Send a signal now, or at the `sync`-th call of fsync from now on."""
    if not sync:
        os.kill(os.getpid(), number)
        return
    fsync, calls = os.fsync, itertools.count(1)

    def signalling(descriptor: Any) -> None:
        if next(calls) == sync:
            os.kill(os.getpid(), number)
        fsync(descriptor)

    os.fsync = signalling  # type: ignore[assignment]


def fill_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def work(run: Run, rank: int) -> None:
    if run.settings.get("fsdp"):
        shard_on_the_cpu()
    if run.stop is not None:
        at_step(run.stop, interrupt)
    if rank == run.processes - 1:
        if run.full is not None:
            at_step(run.full, fill_disk)
        if run.signal is not None:
            at_step(run.after, partial(signal_itself, run.signal, run.sync))
    mine = {key: value.replace("RANK", str(rank)) if key == "text" else value for key, value in run.settings.items()}
    train(TrainSettings(**mine), Path(run.output), resume=run.resume, device="cpu")


def become(run: Run, rank: int, port: int) -> int:
    """Be one of the processes of a run; its exit code."""
    if run.processes > 1:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": run.processes}
        where |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": run.processes}
        os.environ.update({name: str(value) for name, value in where.items()})
    try:
        work(run, rank)
    except BaseException as error:
        Path(f"{run.output}.{rank}.error").write_text(f"{type(error).__name__}: {error}")
        return 1
    return 0


def launch(run: Run) -> None:
    """Fork the processes of a run, and wait for them."""
    if run.copy_of is not None:
        shutil.copytree(run.copy_of, run.output)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(run.processes):
        child = os.fork()
        if not child:
            os._exit(become(run, rank, port))
        children.append(child)
    for _ in run.processes * [0]:
        _, status = os.wait()
        if os.WIFSIGNALED(status):  # as a launcher does when a process has died
            for child in children:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)


def warm_up() -> None:
    """Do once what each process would do for itself: transformers builds tables when it first saves a model."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)).save_pretrained(folder)
    gc.freeze()


if __name__ == "__main__":
    torch.set_num_threads(1)
    warm_up()
    for line in json.loads(Path(sys.argv[1]).read_text()):
        launch(Run(**line))
