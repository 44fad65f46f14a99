"""The command `lowrank`: its verbs, loaded only when called, and what every error looks like and exits with."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import click
from click.shell_completion import CompletionItem

from lowrank_kit.errors import DoesNotFitError, LowRankError, UsageError, did_you_mean

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
DEBUG_VARIABLE = "LOWRANK_DEBUG"


class Verb(NamedTuple):
    """One row of the table of verbs: a module beside this one that holds a click command named `command`."""

    module: str
    help: str


VERBS = {
    "train": Verb("train", "Pretrain or fine-tune a model so that its matrices end up near low rank."),
    "analyze": Verb("analyze", "Measure the singular values of every matrix of a model."),
    "compress": Verb("compress", "Factorize a model's matrices to a target size."),
    "eval": Verb("eval", "Score models, dense or compressed, side by side."),
    "bench": Verb("bench", "Measure speed and memory of models, dense or compressed, side by side."),
    "export": Verb("export", "Write a model in a form that other tools take."),
    "scale": Verb("scale", "Take settings tuned on a small model to a wide and deep one."),
    "report": Verb("report", "Put results side by side, in one HTML page."),
    "quickstart": Verb("quickstart", "Train, analyze, compress and score small models, start to end."),
    "completion": Verb("completion", "Print what makes a shell complete verbs, options and names."),
    "env": Verb("env", "Describe this machine and its packages, to paste into a bug report."),
}


def _remember_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(dict)["debug"] = True


def _debug_option() -> click.Option:
    return click.Option(
        ["--debug"],
        is_flag=True,
        default=False,
        expose_value=False,
        is_eager=True,  # so that it also counts when a later option is the error
        callback=_remember_debug,
        help=f"Show the traceback of an error (also: {DEBUG_VARIABLE}=1).",
    )


class LazyGroup(click.Group):
    """A group that knows its verbs from `VERBS` and imports one only when it runs or its own help is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f".{VERBS[cmd_name].module}", __package__).command
        for each in (command, *getattr(command, "commands", {}).values()):
            if not any("--debug" in parameter.opts for parameter in each.params):
                each.params.append(_debug_option())
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        word = args[0]
        if not word.startswith("-") and word not in VERBS and not ctx.resilient_parsing:
            raise UsageError(f'no such verb "{word}"', hint=did_you_mean(word, VERBS))
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Verbs, from the table alone: no verb is imported; click's own would import every one."""
        verbs = [CompletionItem(name, help=verb.help) for name, verb in VERBS.items() if name.startswith(incomplete)]
        return verbs + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, verb.help) for name, verb in VERBS.items()])


@click.group(
    cls=LazyGroup,
    subcommand_metavar="VERB [OPTIONS]...",
    params=[_debug_option()],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(None, "--version", package_name="lowrank-kit", message="lowrank-kit %(version)s")
def lowrank() -> None:
    """Train causal language models that fold, fold the ones you have, and prove what it cost.

    `lowrank VERB --help` tells a verb's options; `lowrank quickstart` shows the whole way in minutes.
    """


def run(args: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; the one place that decides how an error is told.

    0 done, 1 failed, 2 wrong usage or configuration, 3 does not fit, 4 a check failed, 130 interrupted, 143 terminated.
    Errors go to stderr, as `error: what` and `hint: what to do`.
    """
    state = {"debug": os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")}
    try:
        code = lowrank.main(args, prog_name="lowrank", standalone_mode=False, obj=state)
        return code if isinstance(code, int) else 0
    except click.Abort as abort:  # click's form of KeyboardInterrupt; a verb may have noted how to go on
        code = getattr(abort.__cause__, "exit_code", INTERRUPTED)
        word = "interrupted" if code == INTERRUPTED else "terminated"
        _tell(word, "; ".join(getattr(abort.__cause__, "__notes__", [])), prefix="")
        return code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        _tell(error.format_message(), f"{context.command_path} --help" if context else None)
        return error.exit_code
    except Exception as error:
        if state["debug"]:
            click.echo(traceback.format_exc(), err=True, nl=False)
        return _tell_failure(error)


def main() -> NoReturn:
    """The console script `lowrank`."""
    sys.exit(run())


def _tell_failure(error: Exception) -> int:
    """Tell an exception that came out of a verb; its exit code."""
    if isinstance(error, LowRankError):
        _tell(error.message, error.hint)
        return error.exit_code
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it
        _tell(f"out of memory: {_one_line(error)}", "a smaller batch or model, or another --device")
        return DoesNotFitError.exit_code
    if isinstance(error, OSError):  # a full disk, a missing permission, no network: not a bug of ours
        _tell(_one_line(error), "run again with --debug for the traceback")
        return 1
    name = type(error).__name__
    _tell(f"{name}: {_one_line(error)}", "this is a bug; run again with --debug for the traceback")
    return 1


def _one_line(error: Any) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _tell(message: str, hint: str | None, prefix: str = "error: ") -> None:
    if os.environ.get("RANK", "0") != "0":  # one of several processes
        if not prefix:  # all of them stopped
            return
        prefix = f"process {os.environ['RANK']}: {prefix}"
    click.echo(f"{prefix}{message}", err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)


if __name__ == "__main__":
    main()
