"""lm-eval tasks on a model in memory: lm-eval makes the requests and the scores, nothing is computed here."""

from __future__ import annotations

import contextlib
import difflib
import logging
import math
import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_kit.errors import LowRankError, UsageError, did_you_mean
from lowrank_kit.evaluation.forward import evaluating, model_name

logger = logging.getLogger(__name__)

# Means, such as accuracies, get their standard error in closed form (0 would switch that off too); the few metrics
# that lm-eval can only bootstrap, such as F1, get this many draws, enough for two digits.
_BOOTSTRAP_ITERS = 1000


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, as lm-eval reports it. `stderr` is None where lm-eval knows none."""

    task: str
    metric: str
    value: float
    stderr: float | None
    num_docs: int


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> list[TaskScore]:
    """Score a model on lm-eval tasks, zero-shot unless a task says otherwise.

    Tasks that all lie under `include_path` need no network and no index of lm-eval's own tasks, which takes ten
    seconds to build. Python's, numpy's and torch's global generators are set to the seed. lm-eval's warnings are
    shown when the `lowrank_kit` logger is at DEBUG; what it prints goes to stderr.

    Args:
        tasks: names of tasks, groups or tags.
        include_path: a folder with task YAML files, searched before lm-eval's own.
        limit: score only the first documents of each task.
        batch_size: requests in one forward pass.
        seed: for tasks that draw few-shot examples.

    Returns:
        In the order lm-eval reports them; a filter's name is appended to its metric: "exact_match,strict-match".

    Raises:
        UsageError: no task is named, a task is unknown, the limit is below 1, or there is no folder `include_path`.
        LowRankError: the data of a task cannot be loaded, or the model gives a likelihood that is not finite.
    """
    if not tasks:
        raise UsageError("no task was named", hint="name tasks by their lm-eval names, such as arc_easy")
    if limit is not None and limit < 1:
        raise UsageError(f"the limit is at least 1 document, got {limit}")
    if include_path is not None and not Path(include_path).is_dir():
        raise UsageError(f"no such folder of tasks: {include_path}", hint="name the folder that holds the task's .yaml")
    with _quiet(), evaluating(model):
        from lm_eval.evaluator import evaluate

        loaded = _load_tasks(list(tasks), include_path)
        _set_seeds(seed)
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=seed)
        # Not simple_evaluate, which also asks pip, git and lscpu about the machine: two seconds a call.
        results = evaluate(
            lm=_language_model(model, tokenizer, batch_size),
            task_dict=loaded,
            limit=limit,
            bootstrap_iters=_BOOTSTRAP_ITERS,
            log_samples=False,
        )
    return _scores(results)


def _load_tasks(tasks: list[str], include_path: str | Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):
        logger.info("building the index of lm-eval's own tasks")
        manager = TaskManager(include_path=include_path)
    for task in tasks:
        if task not in manager.all_tasks:
            # All names would be pages: lm-eval has over ten thousand.
            close = difflib.get_close_matches(task, manager.all_tasks, n=3)
            hint = did_you_mean(task, close) if close else "`lm_eval ls tasks` lists the names"
            raise UsageError(f'unknown task "{task}"', hint=hint)
    try:
        return manager.load(tasks)
    # What datasets raises for: no network, no such file, damaged data.
    except (OSError, ValueError) as error:
        # A task that brings its own data can bring its own hint, as a note on the error.
        hint = "\n".join(getattr(error, "__notes__", ())) or (
            "lm-eval's own tasks download their data once; a task from --include-path can bring its own"
        )
        raise LowRankError(f"the data of {', '.join(tasks)} could not be loaded: {error}", hint=hint) from error


def _language_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """lm-eval's wrapper of the model in memory, with progress bars for people only, and NaN refused."""
    from lm_eval.models.huggingface import HFLM

    class InMemory(HFLM):
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            answers = super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())
            self._refuse_non_finite([nats for nats, _ in answers])
            return answers

        def _loglikelihood_tokens(self, requests: Any, *given: Any, **options: Any) -> Any:
            longest = max((len(continuation) for _, _, continuation in requests), default=0)
            if longest > self.max_length:
                raise LowRankError(
                    f"a choice of the task has {longest} tokens, and {model_name(model)} has a context of "
                    f"{self.max_length}",
                    hint="take a model with a longer context, another task, or fewer documents (--limit)",
                )
            return super()._loglikelihood_tokens(requests, *given, **options)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            answers = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())
            self._refuse_non_finite(answers)
            return answers

        def _refuse_non_finite(self, nats: list[float]) -> None:
            # The argmax over NaN is the first choice: a broken model would score like a poor one.
            num_bad = sum(not math.isfinite(value) for value in nats)
            if num_bad:
                raise LowRankError(
                    f"{num_bad} of the {len(nats)} log-likelihoods of {model_name(model)} are not finite",
                    hint="look for NaN or Inf in its weights, or evaluate it in float32",
                )

    return InMemory(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _scores(results: dict[str, Any]) -> list[TaskScore]:
    scores = []
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, _, filter_name = key.partition(",")
            # Beside "acc,none" and "acc_stderr,none" there are entries such as "alias" and "sample_len".
            if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{filter_name}")
            scores.append(
                TaskScore(
                    task=task,
                    metric=metric if filter_name == "none" else key,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    num_docs=int(metrics["sample_len"]),
                )
            )
    return scores


def _set_seeds(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep stdout for results, lm-eval's log for those who debug, and its bootstrap in this process.

    lm-eval bootstraps in a process pool unless told otherwise, and forking after torch has started threads can hang.
    """
    lm_eval_logger = logging.getLogger("lm_eval")
    level = lm_eval_logger.level
    bootstrap_setting = os.environ.get("DISABLE_MULTIPROC")
    if not logger.isEnabledFor(logging.DEBUG):
        lm_eval_logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        lm_eval_logger.setLevel(level)
        if bootstrap_setting is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = bootstrap_setting
