"""Verbs made up for a test, and the process as it was after each."""

from __future__ import annotations

import logging
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import click
import pytest

from cli.main import VERBS, Verb
from cli.output import CHATTY


@pytest.fixture(autouse=True)
def _same_process_after() -> Iterator[None]:
    """`setup_logging` changes the environment, the loggers and the warnings hook; put them back."""
    environment, show = dict(os.environ), warnings.showwarning
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    levels = {name: logging.getLogger(name).level for name in (*CHATTY, "lowrank_kit")}
    yield
    logging.captureWarnings(False)
    warnings.showwarning = show
    root.setLevel(level)
    root.handlers[:] = handlers
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def fake_verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """`fake_verb(function)` makes a verb `fake` of a function, or of a click command, for one test."""

    def install(body: Callable[..., Any]) -> None:
        module = types.ModuleType("cli.fake")
        command = body if isinstance(body, click.Command) else click.command("fake")(body)
        monkeypatch.setattr(module, "command", command, raising=False)
        monkeypatch.setitem(sys.modules, "cli.fake", module)
        monkeypatch.setitem(VERBS, "fake", Verb("fake", "Made up."))

    return install
