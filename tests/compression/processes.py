"""Compressions by several processes: one of them; `RANK` and the like are as torchrun sets them.

`python -m tests.compression.processes JOBS.json`; jobs, [model, output, settings, rest], are made one by one.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.errors import LowRankError
from lowrank_kit.processes import disconnect

Job = tuple[str, str, dict[str, Any], dict[str, Any]]


def launch(jobs: list[Job], plan: Path, processes: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """Make the jobs with so many processes."""
    plan.write_text(json.dumps(jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
    }
    command = [sys.executable, "-m", "tests.compression.processes", str(plan)]
    started = [
        subprocess.Popen(
            command,
            cwd=Path(__file__).parents[2],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    told = [process.communicate(timeout=280) for process in started]
    return [
        subprocess.CompletedProcess(command, process.returncode, *out)
        for process, out in zip(started, told, strict=True)
    ]


def main(plan: str) -> None:
    """One process."""
    for model, output, settings, rest in json.loads(Path(plan).read_text()):
        try:
            compress(model, output, CompressSettings(**settings), device="cpu", **rest)
        except LowRankError as error:
            print(f"{Path(output).name}: {error.message}")
    disconnect()


if __name__ == "__main__":
    main(sys.argv[1])
