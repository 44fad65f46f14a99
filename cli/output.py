"""What a verb says: the result on stdout, logs and progress on stderr."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from lowrank_kit.errors import UsageError

SCHEMA_VERSION = 1
CHATTY = (
    "accelerate",
    "datasets",
    "filelock",
    "fsspec",
    "httpcore2",
    "httpx",
    "httpx2",
    "huggingface_hub",
    "lm_eval",
    "matplotlib",
    "py.warnings",
    "onnx_ir",
    "onnxscript",
    "torch",
    "torch.onnx._internal.exporter._registration",  # which torch does not silence with the rest of it
    "transformers",
    "urllib3",
)
# The libraries read these while they are imported, so the wish has to be in the environment by then.
LEVEL_VARIABLES = ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY", "LMEVAL_LOG_LEVEL")
BAR_VARIABLES = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")


class _StderrHandler(logging.Handler):
    """Writes to the stderr of the moment, above a progress bar if one is being drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.set_name("lowrank")

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        origin = "" if record.name.startswith("lowrank_kit") else f"{record.name}: "
        message = f"{prefix}{origin}{self.format(record)}"
        if "tqdm" in sys.modules:  # a bar exists only if tqdm is loaded; do not load it for a log line
            sys.modules["tqdm"].tqdm.write(message, file=sys.stderr)
        else:
            click.echo(message, err=True)


def setup_logging(verbosity: int) -> None:
    """Send logs to stderr and quiet the libraries below. Call it before they are imported.

    Args:
        verbosity: 0 tells what lowrank-kit does and the libraries' errors; -1 warnings only, -2 errors only;
            1 adds our details and the libraries' own messages, 2 everything. Of several processes, the others tell
            errors only.
    """
    if os.environ.get("RANK", "0") != "0":
        verbosity = -2
    ours = {-1: logging.WARNING, 0: logging.INFO}.get(verbosity, logging.DEBUG if verbosity > 0 else logging.ERROR)
    theirs = {1: logging.INFO}.get(verbosity, logging.DEBUG if verbosity > 1 else logging.ERROR)
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if handler.get_name() == "lowrank"]:
        root.removeHandler(handler)
    root.addHandler(_StderrHandler())
    root.setLevel(min(ours, theirs, logging.WARNING))
    logging.getLogger("lowrank_kit").setLevel(ours)
    for name in CHATTY:
        logging.getLogger(name).setLevel(theirs)
    for variable in LEVEL_VARIABLES:
        os.environ.setdefault(variable, logging.getLevelName(theirs).lower())
    if verbosity < 0 or not sys.stderr.isatty():  # theirs, unlike ours, would be drawn into a file or pipe too
        for variable in BAR_VARIABLES:
            os.environ.setdefault(variable, "1")
    logging.captureWarnings(True)


def emit(result: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Print a verb's result on stdout: `text` for a person, or `result` as one JSON document with `schema_version`.

    Numbers that are not finite become null, which is all JSON has for them.
    """
    if as_json:
        from lowrank_kit.report.files import json_text

        text = json_text(result, schema_version=SCHEMA_VERSION).rstrip("\n")
    click.echo(text)


def check_new_folder(path: Path) -> None:
    """Refuse an output folder that would mix new files with old ones. Creates nothing.

    Raises:
        UsageError: `path`, or a parent of it, is a file, or `path` is a folder with something in it.
    """
    blocked = next((parent for parent in (path, *path.parents) if parent.exists() and not parent.is_dir()), None)
    if blocked is not None:
        raise UsageError(f"output folder {path}: {blocked} is a file", hint="give another folder with -o")
    if path.is_dir() and any(path.iterdir()):
        entries = sum(1 for _ in path.iterdir())
        raise UsageError(
            f"output folder {path} is not empty ({entries} entries)",
            hint=f"give another folder with -o, or remove this one: rm -r {path}",
        )
