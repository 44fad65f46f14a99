"""Trackers of a run (tensorboard, wandb, trackio, ...): transformers' own, beside the log that is always written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from lowrank_kit.errors import UsageError, did_you_mean

# Packages that are not called as the tracker is.
PACKAGES = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "flyte": "flytekit"}
# What tells a tracker where its files go, and where that is in the folder of a run. wandb adds a folder of its own.
FOLDERS = {"TENSORBOARD_LOGGING_DIR": "tensorboard", "WANDB_DIR": ""}


@dataclass
class RunArguments(TrainingArguments):  # type: ignore[misc, unused-ignore]
    """transformers' arguments and the settings of the run: trackers record all of it.

    Args:
        run_settings: as in run.json.
    """

    run_settings: dict[str, Any] = field(default_factory=dict)


@contextmanager
def run_trackers(names: Sequence[str], output: Path) -> Iterator[list[TrainerCallback]]:
    """The trackers of a run as callbacks. Meanwhile those with files of their own put them into the run's folder.

    Args:
        names: as `report_to` of transformers takes them.
        output: folder of the run. An environment variable of the tracker that is set wins over it.

    Raises:
        UsageError: an unknown tracker, or one whose package is missing.
    """
    added = {name: str(output.absolute() / folder) for name, folder in FOLDERS.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield [_tracker(name) for name in dict.fromkeys(names)]
    finally:
        for name in added:
            os.environ.pop(name, None)


def _tracker(name: str) -> TrainerCallback:
    if name not in INTEGRATION_TO_CALLBACK:
        raise UsageError(f'unknown tracker "{name}"', hint=did_you_mean(name, INTEGRATION_TO_CALLBACK))
    try:
        (callback,) = get_reporting_integration_callbacks([name])
        return callback()
    except (RuntimeError, ImportError) as error:
        raise UsageError(
            f'the tracker "{name}" cannot be used: {error}', hint=f"pip install {PACKAGES.get(name, name)}"
        ) from error
