"""The options that verbs share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from cli.main import run
from cli.options import AmountType, common_options, given_parameters, output_option

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


@pytest.mark.parametrize(
    ("unit", "written", "amount"),
    [
        ("numbers", "1500000", 1_500_000),
        ("numbers", "1.5M", 1_500_000),
        ("numbers", "300k", 300_000),
        ("numbers", "1.2b", 1_200_000_000),
        ("numbers", "7 G", 7 * 10**9),
        ("numbers", "2e6", 2_000_000),
        ("numbers", "1_000", 1_000),
        ("numbers", "0.29M", 290_000),  # not by way of binary
        ("bytes", "120MB", 120_000_000),
        ("bytes", "1.2GiB", 1_288_490_188),  # and not .8 of a byte more
        ("bytes", "64kB", 64_000),
        ("bytes", "64KiB", 65_536),
        ("bytes", "512", 512),
        ("bytes", "512B", 512),
        ("bytes", "2g", 2 * 10**9),
        ("bytes", "1TiB", 2**40),
    ],
)
def test_amounts(unit: str, written: str, amount: int) -> None:
    assert AmountType(unit).convert(written, None, None) == amount


@pytest.mark.parametrize(
    ("unit", "written"),
    [("numbers", "1MiB"), ("numbers", "1MB"), ("bytes", "-1MB"), ("bytes", "MB"), ("bytes", "1,5MB"), ("bytes", "nan")],
)
def test_what_is_no_amount(unit: str, written: str) -> None:
    with pytest.raises(click.BadParameter, match=f"'{written}' is not an amount of {unit}, such as"):
        AmountType(unit).convert(written, None, None)
