"""Completion by the shell: what is offered, that it is what there is, and that asking for it costs little."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete

from cli import names
from cli.completion import PROGRAM, VARIABLE
from cli.main import VERBS, lowrank, run
from lowrank_kit.compression.allocation import ALLOCATIONS
from lowrank_kit.compression.forms import FORMS
from lowrank_kit.compression.objectives import OBJECTIVES
from lowrank_kit.compression.settings import AUTO, REFINES
from lowrank_kit.data.blocks import PACKINGS
from lowrank_kit.optim.modes import TOPK
from lowrank_kit.optim.rules import RULES
from lowrank_kit.quickstart import SIZES
from lowrank_kit.scaling.rules import DEPTH_RULES
from lowrank_kit.training.presets import PRESETS
from lowrank_kit.training.settings import LR_SCHEDULES

HEAVY = {"accelerate", "datasets", "lm_eval", "matplotlib", "numpy", "tokenizers", "torch", "transformers"}


def offered(*words: str) -> list[str]:
    """What a shell is told after some words, the last of which is being written."""
    found = ShellComplete(lowrank, {}, PROGRAM, VARIABLE).get_completions(list(words[:-1]), words[-1])
    return [item.value if item.type == "plain" else f"<{item.type}>" for item in found]


def test_the_names_are_those_of_the_tables() -> None:
    assert set(RULES) == set(names.OPTIMIZERS)
    assert set(TOPK) == set(names.TOPK)
    assert set(LR_SCHEDULES) == set(names.LR_SCHEDULES)
    assert set(PACKINGS) == set(names.PACKINGS)
    assert set(DEPTH_RULES) == set(names.DEPTH_RULES)
    assert set(PRESETS) == set(names.PRESETS)
    assert {AUTO, *OBJECTIVES} == set(names.OBJECTIVES)
    assert set(ALLOCATIONS) == set(names.ALLOCATIONS)
    assert {*FORMS, "auto"} - {"stacked"} == set(names.FORMS)
    assert set(REFINES) == set(names.REFINES)
    assert set(SIZES) == set(names.QUICKSTART_SIZES)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["comp"], ["compress", "completion"]),
        (["train", "--opt"], ["--optimizer"]),
        (["train", "--optimizer", "nu"], ["numuon"]),
        (["train", "--model-config", "qwen3-1"], ["qwen3-1m", "qwen3-15m", "qwen3-125m", "qwen3-1b"]),
        (["train", "--model-config", "my.j"], ["<file>"]),
        (["compress", "mod"], ["<dir>"]),
        (["compress", "model", "--scope", ""], ["matrices", "model"]),
        (["compress", "model", "--objective", "anch"], ["anchored", "anchored-two-sided"]),
        (["compress", "model", "--text", "std"], ["stdlib"]),
        (["compress", "model", "--device", "c"], ["cpu", "cuda"]),
        (["export", "model", "--to", "d"], ["dense"]),
        (["scale", "t"], ["table"]),
        (["scale", "table", "--depth-rule", "k"], ["k2", "k1"]),
        (["eval", "one", "two", "--no-p"], ["--no-perplexity"]),
    ],
)
def test_what_is_offered(words: list[str], expected: list[str]) -> None:
    assert offered(*words) == expected


def test_every_verb_is_offered_and_every_option_of_each() -> None:
    assert offered("") == list(VERBS)
    context = click.Context(lowrank)
    for verb in VERBS:
        command = lowrank.get_command(context, verb)
        assert command is not None
        options = {p.opts[-1] for p in command.params if isinstance(p, click.Option)}
        assert options <= set(offered(verb, "--"))


@pytest.mark.parametrize(
    ("line", "verb"),
    [("lowrank tr", None), ("lowrank train --", "train"), ("lowrank compress --objective w", "compress")],
)
def test_asking_imports_nothing_heavy_and_no_other_verb(line: str, verb: str | None) -> None:
    code = (
        "import sys\nfrom lowrank_kit.cli.main import run\n"
        "try: run()\nexcept SystemExit: print(*sys.modules, file=sys.stderr)"
    )
    environment = {**os.environ, VARIABLE: "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    loaded = set(done.stderr.splitlines()[-1].split())
    assert done.stdout
    assert not HEAVY & loaded
    assert {f"lowrank_kit.cli.{each.module}" for each in VERBS.values()} & loaded == (
        {f"lowrank_kit.cli.{verb}"} if verb else set()
    )


# What bash does for a key: the function of `complete -F`, with the words so far. `compopt` is of readline's own call.
PRESS_TAB = """
eval "$(lowrank completion bash)"
compopt() { :; }
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
function=$(complete -p lowrank | sed 's/.*-F \\([^ ]*\\).*/\\1/')
$function lowrank
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes() -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", "--norc", "-c", PRESS_TAB, "bash", "lowrank", "compress", "model", "--allocation", "l"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout.split(), done.stderr) == (["lagrange", "loss"], "")


@pytest.mark.parametrize(
    ("shell", "word"), [("bash", "complete -o"), ("zsh", "#compdef lowrank"), ("fish", "complete")]
)
def test_the_script_of_a_shell(shell: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert word in script
    assert f"{VARIABLE}={shell}_complete" in script
    if executable := shutil.which(shell):
        checked = subprocess.run([executable, "-n"], input=script, capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, "")
