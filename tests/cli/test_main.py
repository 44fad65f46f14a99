"""The shell around every verb: laziness, exit codes, and how an error is told."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from cli.main import VERBS, run
from lowrank_kit.errors import CheckFailedError, DoesNotFitError, LowRankError, UsageError

Install = Callable[[Callable[..., Any]], None]
HEAVY = ("accelerate", "datasets", "lm_eval", "matplotlib", "numpy", "pandas", "tokenizers", "torch", "transformers")


def raising(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


def python(code: str, *arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, where `lowrank_kit.cli` is the installed package."""
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, **kwargs)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["trian"], *([verb, "--help"] for verb in VERBS)])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = "import sys; from lowrank_kit.cli.main import run; run(sys.argv[1:]); print(*sys.modules)"
    loaded = python(code, *arguments, check=True).stdout.splitlines()[-1].split()
    assert not set(HEAVY) & set(loaded)


def test_group_help_imports_no_verb() -> None:
    code = "import sys; from lowrank_kit.cli.main import run; run(['--help']); print(*sys.modules)"
    loaded = python(code, check=True).stdout.splitlines()[-1].split()
    assert not {f"lowrank_kit.cli.{verb.module}" for verb in VERBS.values()} & set(loaded)


def test_help_answers_at_once() -> None:
    seconds = []
    for _ in range(5):  # processor time, and the best of five: a busy machine is no fault of ours
        before = os.times()
        python("from lowrank_kit.cli.main import main; main()", "--help")
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < 0.3


@pytest.mark.parametrize("name", VERBS)
def test_the_table_says_what_the_verb_says(name: str) -> None:
    command = importlib.import_module(f"cli.{VERBS[name].module}").command
    assert isinstance(command, click.Command)
    assert command.name == name
    assert (command.help or "").splitlines()[0] == VERBS[name].help


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [word for line in lines for word in line.split()[:1] if word in VERBS] == list(VERBS)


def test_no_verb_at_all_shows_help_as_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "quickstart" in captured.err


@pytest.mark.parametrize(("word", "meant"), [("evn", "env"), ("analyse", "analyze"), ("compres", "compress")])
def test_mistyped_verb(word: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([word]) == 2
    assert capsys.readouterr().err == f'error: no such verb "{word}"\nhint: did you mean "{meant}"?\n'


def test_mistyped_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["env", "--jsno"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: No such option '--jsno'. Did you mean '--json'?")
    assert captured.err.endswith("hint: lowrank env --help\n")
    assert captured.out == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LowRankError("w is not finite", hint="look at it"), 1),
        (UsageError("keep is 2", hint="--keep 0.5"), 2),
        (DoesNotFitError("9 GiB > 8 GiB", hint="--keep 0.4"), 3),
        (CheckFailedError("worse by 2 %", hint="none"), 4),
    ],
)
def test_our_errors(error: LowRankError, code: int, fake_verb: Install, capsys: pytest.CaptureFixture[str]) -> None:
    fake_verb(raising(error))
    assert run(["fake"]) == code
    assert capsys.readouterr() == ("", f"error: {error.message}\nhint: {error.hint}\n")


def test_an_error_without_a_hint(fake_verb: Install, capsys: pytest.CaptureFixture[str]) -> None:
    fake_verb(raising(LowRankError("bad")))
    assert run(["fake"]) == 1
    assert capsys.readouterr().err == "error: bad\n"


def test_a_bug_is_one_line(fake_verb: Install, capsys: pytest.CaptureFixture[str]) -> None:
    fake_verb(raising(ValueError("first\nsecond")))
    assert run(["fake"]) == 1
    expected = "error: ValueError: first\nhint: this is a bug; run again with --debug for the traceback\n"
    assert capsys.readouterr() == ("", expected)


@pytest.mark.parametrize("error", [MemoryError(), type("OutOfMemoryError", (RuntimeError,), {})("2 GiB wanted")])
def test_out_of_memory_does_not_fit(error: Exception, fake_verb: Install, capsys: pytest.CaptureFixture[str]) -> None:
    fake_verb(raising(error))
    assert run(["fake"]) == 3
    assert capsys.readouterr().err.startswith("error: out of memory: ")


def test_trouble_of_the_system_is_no_bug(fake_verb: Install, capsys: pytest.CaptureFixture[str]) -> None:
    fake_verb(raising(OSError(errno.ENOSPC, "No space left on device", "out/model.safetensors")))
    assert run(["fake"]) == 1
    told = capsys.readouterr().err
    assert "No space left on device: 'out/model.safetensors'" in told
    assert "this is a bug" not in told


@pytest.mark.parametrize("arguments", [["--debug", "fake"], ["fake", "--debug"]])
@pytest.mark.parametrize("error", [ValueError("oops"), UsageError("oops")])
def test_debug_shows_the_traceback(
    arguments: list[str], error: Exception, fake_verb: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_verb(raising(error))
    assert run(["fake"]) == run(arguments)
    told = capsys.readouterr().err
    assert told.count("Traceback (most recent call last)") == 1  # of two runs


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False), ("", False)])
def test_debug_variable(
    value: str,
    shown: bool,
    fake_verb: Install,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LOWRANK_DEBUG", value)
    fake_verb(raising(ValueError("oops")))
    run(["fake"])
    assert ("Traceback" in capsys.readouterr().err) == shown


def test_interrupted(fake_verb: Install, capsys: pytest.CaptureFixture[str]) -> None:
    fake_verb(lambda: os.kill(os.getpid(), signal.SIGINT))
    # A shell starts jobs in the background with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run(["fake"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "\ninterrupted\n"  # the first newline ends the terminal's ^C


def test_an_interrupted_verb_can_say_how_to_go_on(fake_verb: Install, capsys: pytest.CaptureFixture[str]) -> None:
    stop = KeyboardInterrupt()
    stop.add_note("lowrank train -o run --resume")
    fake_verb(raising(stop))
    assert run(["fake"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\nhint: lowrank train -o run --resume\n"


def test_exit_code_of_a_verb_is_kept(fake_verb: Install) -> None:
    fake_verb(lambda: click.get_current_context().exit(4))
    assert run(["fake"]) == 4


def test_a_reader_that_leaves_is_no_noise() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "from lowrank_kit.cli.main import main; main()", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()  # long before the child writes: it finds a broken pipe
    told = child.stderr.read()
    child.stderr.close()
    assert (child.wait(), told) == (1, "")


def test_the_installed_command() -> None:
    done = subprocess.run([Path(sys.executable).with_name("lowrank"), "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("lowrank-kit ")


def test_the_name_cli_is_left_to_others(tmp_path: Path) -> None:
    code = "from importlib.util import find_spec; print(find_spec('cli'), find_spec('lowrank_kit.cli').name)"
    assert python(code, cwd=tmp_path, check=True).stdout == "None lowrank_kit.cli\n"
