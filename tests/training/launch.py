"""Runs of several processes without a launcher's start-up: one import, then forks that see what torchrun would set.

`python -m tests.training.launch PLAN.json`; a plan is a list of runs, made one after the other:
`{"processes": 2, "settings": {...}, "output": "...", "resume": false, "stop": null}`. `stop` ends the run, as Ctrl-C
does, at the end of that step. What a process raises goes to `OUTPUT.RANK.error`.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from lowrank_kit.training.callbacks import ProgressLog
from lowrank_kit.training.run import train
from lowrank_kit.training.settings import TrainSettings


def shard_on_the_cpu() -> None:
    """accelerate shards on accelerators only; with this it takes the CPU for one. For tests: nothing else does it."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)


def stop_at(step: int) -> None:
    on_step_end = ProgressLog.on_step_end

    def stopping(self: ProgressLog, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise KeyboardInterrupt

    ProgressLog.on_step_end = stopping  # type: ignore[method-assign]


def run_one(run: dict[str, Any]) -> None:
    if run["settings"].get("fsdp"):
        shard_on_the_cpu()
    if run.get("stop"):
        stop_at(run["stop"])
    settings = TrainSettings(**run["settings"])
    train(settings, Path(run["output"]), resume=run.get("resume", False), device="cpu")


def launch(run: dict[str, Any]) -> None:
    """Fork the processes of a run, and wait for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(run["processes"]):
        child = os.fork()
        if child:
            children.append(child)
            continue
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": run["processes"]}
        where |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": run["processes"]}
        os.environ.update({name: str(value) for name, value in where.items()} if run["processes"] > 1 else {})
        code = 1
        try:
            run_one(run)
            code = 0
        except BaseException as error:
            Path(f"{run['output']}.{rank}.error").write_text(f"{type(error).__name__}: {error}")
        finally:
            sys.stderr.flush()
            os._exit(code)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for plan in json.loads(Path(sys.argv[1]).read_text()):
        launch(plan)
