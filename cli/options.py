"""The options verbs have in common, as click decorators. Every one has an explicit default."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from .names import OPTIMIZERS, OfferedType
from .output import setup_logging

DTYPES = ("auto", "float32", "bfloat16", "float16")


class DeviceType(click.ParamType):
    """`auto`, `cpu`, `mps`, `cuda` or `cuda:N`. Whether this machine has it is another question."""

    name = "device"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "[auto|cpu|mps|cuda|cuda:N]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
            self.fail(f"{value!r} is not one of auto, cpu, mps, cuda, cuda:N.", param, ctx)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The names that begin so."""
        return [CompletionItem(name) for name in ("auto", "cpu", "mps", "cuda") if name.startswith(incomplete)]


# Numbers go by thousands; bytes too, and those with an i by 1024.
_THOUSANDS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
AMOUNT_UNITS = {
    "numbers": _THOUSANDS | {"b": 10**9},
    "bytes": _THOUSANDS
    | {f"{prefix}b": factor for prefix, factor in _THOUSANDS.items()}
    | {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)},
}


class AmountType(click.ParamType):
    """A whole amount, such as 1500000, 1.5M or 300k, for bytes also 120MB and 1.2GiB; a part of one is dropped.

    Args:
        unit: what is counted, a key of `AMOUNT_UNITS`.
    """

    def __init__(self, unit: str) -> None:
        self.name = unit

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        units = AMOUNT_UNITS[self.name]
        found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d{1,2})?) ?([a-z]*)", value.strip().lower().replace("_", ""))
        if found is None or found[2] not in units:
            example = "120MB or 1.2GiB" if self.name == "bytes" else "300M or 1.2B"
            self.fail(f"{value!r} is not an amount of {self.name}, such as {example}.", param, ctx)
        return int(Fraction(found[1]) * units[found[2]])


class DurationType(click.ParamType):
    """A time such as 90s, 10m, 1.5h or 2d, or a number of seconds; as seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, int | float):
            return float(value)
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([smhd]?)", value.strip().lower())
        if found is None:
            self.fail(f"{value!r} is not a time, such as 90s, 10m or 1.5h.", param, ctx)
        return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}[found[2]]


seed_option = click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Seed of everything random."
)
device_option = click.option(
    "--device", type=DeviceType(), default="auto", show_default=True, help="Where to compute; auto takes a GPU if any."
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="auto",
    show_default=True,
    help="Number format of the weights.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, default=False, help="Print the result as one JSON document."
)


def output_option(*, required: bool = True) -> Callable[..., Any]:
    """`-o/--output DIR`, passed to the verb as `output: Path` (None if it is not required and not given)."""
    # A default of None counts as given, and is then no error.
    default = {} if required else {"default": None}
    return click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        metavar="DIR",
        required=required,
        **default,
        help="Folder for the result; new or empty.",
    )


def optimizer_option(text: str = "numuon, muon, adamw or sgd.") -> Callable[..., Any]:
    """--optimizer, with what its help says."""
    return click.option(
        "--optimizer",
        type=OfferedType(*OPTIMIZERS),
        metavar="NAME",
        default="numuon",
        show_default=True,
        help=text,
    )


def verbosity_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`-q` and `-v`, counted. Logging is set up before the verb's body runs, hence before its heavy imports;
    the verb gets `verbosity`: 0 normally, below 0 when quiet, above 0 when verbose."""

    @functools.wraps(function)
    def call(*args: Any, verbose: int, quiet: int, **kwargs: Any) -> Any:
        setup_logging(verbose - quiet)
        return function(*args, verbosity=verbose - quiet, **kwargs)

    call = click.option("-v", "--verbose", count=True, default=0, help="Say more (-vv: everything).")(call)
    return click.option("-q", "--quiet", count=True, default=0, help="Say less: no progress, warnings only.")(call)


def common_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a verb that computes takes: --seed, --device, --dtype, --json, -q, -v.

    The verb gets `seed`, `device`, `dtype`, `as_json`, `verbosity`.
    """
    function = verbosity_options(function)
    for option in (json_option, dtype_option, device_option, seed_option):
        function = option(function)
    return function


def whole_numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Callback of an option that takes 32,64,128."""
    try:
        return None if value is None else tuple(int(part) for part in value.split(",") if part.strip())
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers, such as 32,64,128.") from None


def given_parameters(context: click.Context) -> dict[str, Any]:
    """The parameters the user wrote (or set by an environment variable), without those left at their defaults.

    These go over a settings file; a default must not.
    """
    unset = (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)
    return {name: value for name, value in context.params.items() if context.get_parameter_source(name) not in unset}
