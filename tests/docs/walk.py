"""Runs the commands of a page as a user would, on models that take seconds."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import click

from cli.main import lowrank, run
from cli.names import PRESETS
from tests.docs.blocks import ROOT, Command
from tests.process import same_process

# What is put behind the arguments of a verb, where it wins over the page's: how much it works on, never how.
SCALE = {
    "train": "--batch-size 2 --block-tokens 32 --eval-blocks 2 --max-bytes 60000 --vocab-size 384 --log-every 1",
    "compress": "--calibration-blocks 4 --check-blocks 2 --refine-blocks 4 --block-tokens 32 --max-bytes 60000",
    "eval": "--blocks 2 --block-tokens 32",
    "bench": "--prompt 8 --new-tokens 2 --batch 1 --rounds 1 --warmup 0",
    "scale check": "--steps 2 --widths 32,64 --depths 1,2",
    "scale sweep": "--steps 2 --widths 64 --depths 2 --lrs -9:-7 --seeds 1 --control-seeds 0 --batch-size 2",
}
# Option -> what becomes of its value; a preset is a model of 2 blocks, 32 wide, and 64 where it is a target.
SCALED_VALUES: dict[str, Callable[[str], str]] = {
    "--steps": lambda value: "2",
    "--tokens": lambda value: "128",
    "--save-every": lambda value: "1",
    "--spectra-every": lambda value: "1",
    "--model-config": lambda value: "tiny.json" if value in PRESETS else value,
    "--mup-base": lambda value: "base.json" if value in PRESETS else value,
    "--size": lambda value: "70KB",
    "--params": lambda value: "15k",
}
# Verbs that would read all of the standard library's text: they get a page of it.
READERS = ("eval", "scale check", "scale sweep")
# Run on the first page that has it, in this process: a picture is a picture.
ONCE = ("lowrank report . -o report.html", "lowrank analyze model -o model-spectra")
# Left out: a compiler takes longer than all else here.
LEFT_OUT = ("--compile",)
# At this scale the verdict of a check says nothing.
CODES = {"scale check": (0, 4), "scale sweep": (0, 4)}
# A run of two steps is finished before anybody stops it, and says so if it is to be resumed.
FINISHED = "nothing to resume"

# What is not run, by how it begins, and why. Options of lowrank and of what can be asked are parsed all the same.
NOT_RUN = {
    "python3 -m venv": "makes a virtual environment",
    "pip install": "needs a network; CI runs README's",
    "python -m pytest": "the tests themselves; test_adding.py runs what pages ask for",
    "lowrank quickstart": "a minute or more; tests/test_quickstart.py runs it with two steps",
    "torchrun": "several processes; tests/training and tests/compression run them",
    "accelerate launch": "several processes; tests/training runs it",
    "lm_eval": "indexes all of lm-eval's tasks; tests/test_lm_eval.py",
    "python -m lowrank_kit.lm_eval": "indexes all of lm-eval's tasks; tests/test_lm_eval.py",
    "vllm serve": "vLLM is not installed",
    "python evals/run.py": "data that is not in the repository",
    "python examples/": "tests/test_examples.py runs each",
    "lowrank export model-half --to onnx": "seconds, and packages of its own; tests/serving/test_export_onnx.py",
    "lowrank eval quickstart": "a folder of lowrank quickstart; tests/cli/test_eval.py scores such tasks",
    "eval": "of the shell itself; tests/cli/test_completion.py",
}


class Walk:
    """The commands of one page, in a folder of their own.

    Args:
        folder: where they are run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.printed, self.names = folder, "", dict[str, Any]()

    done: ClassVar[dict[str, str]] = {}

    def python(self, place: str, text: str) -> None:
        """Run a block of Python after those before it."""
        with self._here(()) as told:
            exec(compile(text, place, "exec"), self.names)
        self.printed += told.getvalue()

    def shell(self, command: Command) -> str | None:
        """Run a command, or see that it could be run; the entry of `NOT_RUN` that it is one of."""
        listed = next((one for one in NOT_RUN if f"{command.text} ".startswith(one)), None)
        if listed is not None:
            check_arguments(command)
            return listed
        program, *arguments = command.words
        assert program == "lowrank", f"{command.place}: {command.text}: neither run here nor in NOT_RUN"
        verb, errors = verb_of(arguments), io.StringIO()
        if command.text in ONCE and command.text in self.done:
            self.printed += self.done[command.text]
            return None
        with self._here(command.variables) as told, contextlib.redirect_stderr(errors):
            code = run(scaled(verb, arguments))
        resumed = verb == "train" and "--resume" in arguments and FINISHED in errors.getvalue()
        assert resumed or code in CODES.get(verb, (0,)), (
            f"{command.place}: {command.text}: exit code {code}\n{errors.getvalue()[-2000:]}"
        )
        self.done[command.text] = f"{told.getvalue()}\n{errors.getvalue()}\n"
        self.printed += self.done[command.text]
        if command.output:
            (self.folder / command.output).write_text(told.getvalue())
        return None

    @contextlib.contextmanager
    def _here(self, variables: tuple[tuple[str, str], ...]) -> Iterator[io.StringIO]:
        """Inside, the folder is the current one, and what is printed is kept."""
        told = io.StringIO()
        with same_process(), contextlib.chdir(self.folder), contextlib.redirect_stdout(told):
            os.environ.update(variables)
            yield told


def verb_of(arguments: list[str]) -> str:
    """The verb of a command line, with that of a group."""
    return " ".join(arguments[: 2 if arguments[0] == "scale" else 1])


def scaled(verb: str, arguments: list[str]) -> list[str]:
    """The command line for a model that takes seconds: the same options, other amounts."""
    if "--dry-run" in arguments and verb == "train":  # of shapes alone
        return arguments
    words = [word for word in arguments if word not in LEFT_OUT]
    for place, word in enumerate(words[:-1]):
        if word in SCALED_VALUES:
            words[place + 1] = SCALED_VALUES[word](words[place + 1])
    more = SCALE.get(verb, "").split()
    if verb in READERS and "--text" not in words:
        more += ["--text", "other.txt"]
    if "--no-perplexity" in words:
        more = []
    return [*words, *more]


def check_arguments(command: Command) -> None:
    """See that a command that is not run has options that there are."""
    words = list(command.words)
    launched = {"torchrun": _torchrun, "accelerate": _accelerate}
    if words[0] in launched:
        words = launched[words[0]](words[1:])
    if words[0] == "lowrank":
        parse(words[1:])
    elif words[:3] == ["python", "-m", "lowrank_kit.lm_eval"]:
        _lm_eval(words[3:])
    elif words[0] == "lm_eval":
        _lm_eval(words[1:])
    elif words[:2] == ["python", "evals/run.py"]:
        _evals_run(words[2:])
    elif words[:3] == ["python", "-m", "pytest"] and len(words) > 3 and not words[3].startswith("-"):
        assert (ROOT / words[3]).exists(), f"{command.place}: {words[3]}"
    elif words[0] == "python" and words[1] != "-m":
        assert (ROOT / words[1]).is_file(), f"{command.place}: {words[1]}"


def parse(arguments: list[str]) -> None:
    """Parse a command line of lowrank without running it.

    Raises:
        click.ClickException: an option that there is not, or a value that it does not take.
    """
    command: click.Command = lowrank
    context = click.Context(lowrank, info_name="lowrank")
    words = list(arguments)
    while isinstance(command, click.Group):
        name = words.pop(0)
        found = command.get_command(context, name)
        assert found is not None, f"no verb {name}"
        command = found
    command.make_context(name, words, parent=context)


def _torchrun(words: list[str]) -> list[str]:
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(words)
    return [parsed.training_script, *parsed.training_script_args]


def _accelerate(words: list[str]) -> list[str]:
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    parsed = launch_command_parser().parse_args(words[1:])
    return [parsed.training_script, *parsed.training_script_args]


def _lm_eval(words: list[str]) -> None:
    from lm_eval._cli.run import Run

    made = argparse.ArgumentParser(exit_on_error=False)
    Run.create(made.add_subparsers())
    made.parse_args(["run", *words])


def _evals_run(words: list[str]) -> None:
    sys.path.insert(0, str(ROOT / "evals"))
    try:
        import experiments

        spec = importlib.util.spec_from_file_location("evals_run", ROOT / "evals" / "run.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "evals"))
    parsed = module.parser().parse_args(words)
    assert parsed.name is None or parsed.name in experiments.names(), parsed.name
    assert parsed.form in experiments.FORMS
