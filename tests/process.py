"""The process as it was, after the command line has been run in it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from cli.output import CHATTY


@contextmanager
def same_process() -> Iterator[None]:
    """`setup_logging` changes the environment, the loggers and the warnings hook; put them back."""
    environment, show = dict(os.environ), warnings.showwarning
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    levels = {name: logging.getLogger(name).level for name in (*CHATTY, "lowrank_kit")}
    try:
        yield
    finally:
        logging.captureWarnings(False)
        warnings.showwarning = show
        root.setLevel(level)
        root.handlers[:] = handlers
        for name, before in levels.items():
            logging.getLogger(name).setLevel(before)
        os.environ.clear()
        os.environ.update(environment)
