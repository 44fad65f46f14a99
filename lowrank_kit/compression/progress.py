"""How far a compression is: on stderr, and as JSON lines."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lowrank_kit.report.files import finite
from lowrank_kit.report.tables import duration

logger = logging.getLogger(__name__)


class Progress:
    """A bar over the sections of each stage, and a line for each matrix.

    Args:
        path: JSON lines are added to this file; None writes none.
        device: whose memory is told.
        quiet: nothing on stderr.
    """

    def __init__(self, path: Path | None = None, device: torch.device | None = None, *, quiet: bool = False) -> None:
        self.path, self.device, self.quiet = path, device, quiet
        self._bar: tqdm[Any] | None = None
        self._worst = ""
        self._stage, self._total, self._done, self._since, self._before = "", 0, 0, 0.0, 0

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[None]:
        """Inside, `section` counts.

        Args:
            name: of the stage.
            total: sections.
            done: of them, by an earlier run.
        """
        self._stage, self._total, self._done, self._before = name, total, done, done
        self._since = time.perf_counter()
        with tqdm(
            total=total, initial=done, desc=name, unit="block", disable=True if self.quiet else None
        ) as self._bar:
            yield
        self._bar = None

    def matrix(self, name: str) -> None:
        """This matrix is begun; beside it stands what the last section came to."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"{name}{self._worst}, {_gigabytes(peak_memory(self.device))}")

    def section(self, path: str, rows: Sequence[dict[str, Any]] = ()) -> None:
        """A section is done.

        Args:
            path: of the block.
            rows: one for each matrix.
        """
        self._done += 1
        left = (time.perf_counter() - self._since) / (self._done - self._before) * (self._total - self._done)
        peak = peak_memory(self.device)
        if self._bar is not None:
            self._bar.update()
        errors = [row["error"] for row in rows if row.get("error") is not None]
        self._worst = f", error up to {max(errors):.3g}" if errors else ""
        logger.log(
            logging.DEBUG if self.quiet else logging.INFO,
            "%s %d/%d: %s%s, %s, %s left",
            *(self._stage, self._done, self._total, path, self._worst, _gigabytes(peak), duration(left)),
        )
        common = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "stage": self._stage,
            "section": path,
            "done": self._done,
            "of": self._total,
            "peak_memory": peak,
            "seconds_left": round(left, 1),
        }
        if self.path is not None:
            lines = [json.dumps(finite({**common, **row})) for row in rows or [{}]]
            with self.path.open("a") as file:
                file.write("".join(f"{line}\n" for line in lines))


def peak_memory(device: torch.device | None = None) -> int:
    """Most bytes that this process has held: of a CUDA device where it runs on one, else of the machine's memory."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
