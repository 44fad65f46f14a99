"""The command line's surface, recorded: a change of a verb, an option or a default has to be meant.

After a change that is meant: LOWRANK_RECORD_SURFACE=1 python -m pytest tests/cli/test_surface.py
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from cli.main import VERBS, lowrank

RECORD = Path(__file__).with_name("surface.txt")


def surface() -> str:
    """One line for every parameter of every verb: its names, what it takes, and its default."""
    context = click.Context(lowrank, info_name="lowrank")
    lines = ["lowrank", *(parameter_line(parameter) for parameter in lowrank.params)]
    for name in VERBS:
        command = lowrank.get_command(context, name)
        assert command is not None
        with click.Context(command, info_name=name, parent=context):
            members = {f"{name} {word}": each for word, each in getattr(command, "commands", {}).items()}
            for words, each in {name: command, **members}.items():
                lines += ["", f"lowrank {words}", *(parameter_line(parameter) for parameter in each.params)]
    return "\n".join(lines) + "\n"


def parameter_line(parameter: click.Parameter) -> str:
    words = ["  " + ", ".join([*parameter.opts, *parameter.secondary_opts])]
    if isinstance(parameter, click.Argument):
        words = [f"  {parameter.human_readable_name}"]
    words.append("flag" if getattr(parameter, "is_flag", False) else type_text(parameter))
    if parameter.required:
        words.append("required")
    if parameter.multiple or parameter.nargs != 1:
        words.append("many")
    default = parameter.get_default(click.get_current_context(silent=True) or click.Context(lowrank))
    if not parameter.required and not callable(default) and is_value(default):
        words.append(f"default {default}")
    return "  ".join(words)


def type_text(parameter: click.Parameter) -> str:
    if getattr(parameter, "count", False):
        return "count"
    if isinstance(parameter.type, click.Choice):
        return "|".join(map(str, parameter.type.choices))
    return parameter.type.name


def is_value(default: Any) -> bool:
    """Not click's sentinel for "no default", nor a default that says nothing."""
    return default is not None and type(default).__name__ != "Sentinel" and default is not False and default != ()


def test_surface_is_as_recorded() -> None:
    if os.environ.get("LOWRANK_RECORD_SURFACE"):
        RECORD.write_text(surface())
    assert surface() == RECORD.read_text(), "if this is meant, see the head of this file"
