"""`lowrank completion`: the script that makes a shell complete."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

PROGRAM = "lowrank"
# click's name for it; a shell sets it to ask what fits.
VARIABLE = "_LOWRANK_COMPLETE"


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print what makes a shell complete verbs, options and names.

    \b
    bash:  eval "$(lowrank completion bash)"          in ~/.bashrc (bash 4.4 or newer)
    zsh:   eval "$(lowrank completion zsh)"           in ~/.zshrc, after compinit
    fish:  lowrank completion fish | source           in ~/.config/fish/config.fish

    Then Tab completes. The names of objectives, optimizers and presets are offered, files and folders where one is
    wanted.
    """
    from .main import lowrank

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(lowrank, {}, PROGRAM, VARIABLE).source())
