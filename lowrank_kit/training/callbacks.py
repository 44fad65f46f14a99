"""What a run shows and writes while it trains: a progress bar on stderr and one JSON line per log step.

What the Trainer gives every callback to log is one dictionary: the figures added to it here reach the trackers, too.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lowrank_kit.optim import routing_table
from lowrank_kit.report.files import write_text
from lowrank_kit.training.effective_rank import by_role

logger = logging.getLogger(__name__)


def rank_figures(optimizer: Any) -> dict[str, float | None]:
    """Rank fraction of the last NuMuon step, and the least ratio to the exact step among the groups; None without."""
    groups = [group for group in optimizer.param_groups if group.get("rule") == "numuon"]
    ratios = [group["lmo_ratio"] for group in groups if group["lmo_ratio"] is not None]
    return {
        "rank_fraction": groups[0]["rank_fraction"] if groups else None,
        "lmo_ratio": min(ratios) if ratios else None,
    }


class ProgressLog(TrainerCallback):
    """Progress bar with loss, rank fraction and tokens/s, and a JSONL log with the same numbers.

    Its own figures go into the numbers that are logged, for the trackers that stand after it.

    Args:
        path: JSONL file, appended to; lines past the step a run resumes from are dropped.
        step_tokens: tokens in an optimizer step.

    Of several processes the first one shows and writes.
    """

    def __init__(self, path: Path, step_tokens: int) -> None:
        self.path = path
        self.step_tokens = step_tokens
        self.bar: tqdm[Any] | None = None
        self.validation_loss: float | None = None
        self.validated_at: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say what steps what, open the bar at the step the run starts from and cut the log there."""
        self.first_step, self.started = state.global_step, 0.0
        if not state.is_world_process_zero:
            return
        logger.info("what steps what:\n%s", routing_table(kwargs["model"], kwargs["optimizer"]))
        # A run that starts over logs its first validation again.
        kept = [line for line in _read_lines(self.path) if line["step"] <= (state.global_step or -1)]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        for line in kept:
            if "validation_loss" in line and line["step"] == state.global_step:
                self.validation_loss, self.validated_at = line["validation_loss"], line["step"]
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=None, dynamic_ncols=True)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock, at the first step."""
        self.started = self.started or time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the bar; validate after the last step while the trackers still listen."""
        if self.bar is not None:
            self.bar.update(1)
        if state.global_step == state.max_steps:
            control.should_evaluate = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Write a line and show its numbers; the Trainer's closing summary is left out."""
        if not logs or "train_runtime" in logs:
            return
        line: dict[str, Any] = {"step": state.global_step}
        if "loss" in logs:
            line |= {"loss": logs["loss"], "lr": logs["learning_rate"], "grad_norm": logs.get("grad_norm")}
            elapsed = time.perf_counter() - self.started
            own = rank_figures(optimizer) if optimizer is not None else {}
            sent = getattr(getattr(optimizer, "optimizer", optimizer), "bytes_sent", 0)
            own |= {"optimizer_bytes_sent": sent} if args.world_size > 1 else {}
            own["tokens_per_s"] = round((state.global_step - self.first_step) * self.step_tokens / elapsed, 1)
            line |= own | by_role(logs)
            if "spectra_share" in logs:
                line["spectra_share"] = logs["spectra_share"]
            logs.update({name: figure for name, figure in own.items() if figure is not None})
        if "eval_loss" in logs:
            line["validation_loss"] = self.validation_loss = logs["eval_loss"]
            self.validated_at = state.global_step
        if not state.is_world_process_zero:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._show(line)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None  # a validation may follow, and would draw it again

    def _show(self, line: dict[str, Any]) -> None:
        if self.bar is None:
            return
        shown = {"loss": f"{line['loss']:.3f}"} if "loss" in line else {}
        if line.get("rank_fraction") is not None:
            shown["rank"] = f"{line['rank_fraction']:.2f}"
        if "tokens_per_s" in line:
            shown["tok/s"] = f"{line['tokens_per_s']:,.0f}"
        if self.validation_loss is not None:
            shown["val"] = f"{self.validation_loss:.3f}"
        self.bar.set_postfix(shown)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that was damaged, or only half written when the run was killed, is left out."""
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines() if path.exists() else [], start=1):
        try:
            line = json.loads(text)
            whole = isinstance(line, dict) and isinstance(line["step"], int)
        except (ValueError, KeyError, RecursionError):
            whole = False
        if whole:
            lines.append(line)
        else:
            logger.warning("%s:%d is damaged and left out", path, number)
    return lines
