"""The options that verbs share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from cli.main import run
from cli.options import common_options, given_parameters, output_option

Install = Callable[[Callable[..., Any]], None]


@pytest.fixture
def received(fake_verb: Install) -> dict[str, Any]:
    """What the verb `fake`, with all shared options, was called with last."""
    values: dict[str, Any] = {}

    @click.command("fake")
    @output_option(required=False)
    @common_options
    @click.pass_context
    def command(context: click.Context, **given: Any) -> None:
        values.update(given, written=given_parameters(context))

    fake_verb(command)
    return values


def test_defaults(received: dict[str, Any]) -> None:
    assert run(["fake"]) == 0
    assert received == {
        "seed": 0,
        "device": "auto",
        "dtype": "auto",
        "as_json": False,
        "verbosity": 0,
        "output": None,
        "written": {},
    }


def test_only_what_was_written_goes_over_a_settings_file(received: dict[str, Any]) -> None:
    assert run(["fake", "--seed", "0", "-o", "out"]) == 0
    assert received["written"] == {"seed": 0, "output": Path("out")}


@pytest.mark.parametrize(
    ("flags", "verbosity"), [(["-q"], -1), (["-v"], 1), (["-vv"], 2), (["-q", "-v"], 0), (["--quiet", "-q"], -2)]
)
def test_verbosity(flags: list[str], verbosity: int, received: dict[str, Any]) -> None:
    assert run(["fake", *flags]) == 0
    assert received["verbosity"] == verbosity


def test_logging_is_set_up_before_the_verb_runs(fake_verb: Install) -> None:
    levels = []

    @click.command("fake")
    @common_options
    def command(**_: Any) -> None:
        levels.append(logging.getLogger("transformers").level)

    fake_verb(command)
    run(["fake"])
    run(["fake", "-v"])
    assert levels == [logging.ERROR, logging.INFO]


@pytest.mark.parametrize("device", ["auto", "cpu", "mps", "cuda", "cuda:3"])
def test_devices(device: str, received: dict[str, Any]) -> None:
    assert run(["fake", "--device", device]) == 0
    assert received["device"] == device


@pytest.mark.parametrize(
    "arguments", [["--device", "gpu"], ["--device", "cuda:"], ["--dtype", "fp32"], ["--seed", "-1"], ["--seed", "x"]]
)
def test_wrong_values_are_wrong_usage(
    arguments: list[str], received: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["fake", *arguments]) == 2
    assert not received
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert arguments[0] in told
