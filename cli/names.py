"""What a shell offers for an option that takes a name, a model or a text.

The tables of names are in modules that import torch, which takes seconds and a shell asks at each press of Tab: here
the names stand once more, and tests/cli/test_completion.py holds both together.
"""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

OPTIMIZERS = ("numuon", "muon", "adamw", "sgd")
TOPK = ("warm", "krylov", "exact", "filter")
LR_SCHEDULES = ("cosine", "linear", "constant", "wsd")
PACKINGS = ("blocks", "documents")
DEPTH_RULES = ("k2", "k1", "none")
SHAPES = ("1m", "2m", "5m", "15m", "60m", "125m", "350m", "1b")
PRESETS = (*SHAPES, *(f"qwen3-{shape}" for shape in SHAPES))
OBJECTIVES = ("auto", "plain", "scaled", "whiten", "anchored", "two-sided", "anchored-two-sided")
ALLOCATIONS = ("uniform", "erank", "lagrange", "loss")
FORMS = ("factors", "pivoted", "auto")
REFINES = ("none", "block", "e2e", "both")
QUICKSTART_SIZES = ("small", "tiny")
SOURCES = ("stdlib", "hub:")


class OfferedType(click.ParamType):
    """Any text; what a shell offers for it. What is no such name is refused by who uses it, with what was meant.

    Args:
        names: that may be meant.
        files: what else may be: nothing (""), a "file" or a folder, "dir".
    """

    name = "text"

    def __init__(self, *names: str, files: str = "") -> None:
        self.names, self.files = names, files

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The names that begin so; where there are none, files."""
        found = [CompletionItem(name) for name in self.names if name.startswith(incomplete)]
        return found or ([CompletionItem(incomplete, type=self.files)] if self.files else [])


MODEL = OfferedType(files="dir")
SOURCE = OfferedType(*SOURCES, files="file")
PRESET_OR_FILE = OfferedType(*PRESETS, files="file")
