"""Verbs made up for a test, and the process as it was after each."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import click
import pytest

from cli.main import VERBS, Verb


@pytest.fixture(autouse=True)
def _same_process_after(same_process_after: None) -> None:
    """After every test of the command line."""


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
