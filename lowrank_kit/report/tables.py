"""Rows in, aligned text or Markdown out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Columns = Sequence[str] | Mapping[str, str]

MISSING = "-"
# Numbers from the first to below the second are written without an exponent.
PLAIN = (1e-4, 1e9)
_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")
_CLASSES = {60: "seconds", 3600: "minutes", 86_400: "hours", math.inf: "days"}


def text_table(rows: Sequence[Row], columns: Columns | None = None) -> str:
    """An aligned table in plain text: headings, a rule, one line for each row.

    Args:
        rows: key -> value; a key that is absent or None prints as "-".
        columns: keys in order, or key -> heading; all keys of all rows when None.

    Returns:
        Lines without a trailing newline. Numbers are right-aligned, a column of floats has one number of decimals.
    """
    keys, headings = columns_of(rows, columns)
    cells = {key: format_column([row.get(key) for row in rows]) for key in keys}
    right = {key: is_numeric(rows, key) for key in keys}
    widths = {key: max(len(heading), *map(len, cells[key]), 0) for key, heading in zip(keys, headings, strict=True)}

    def line(values: list[str]) -> str:
        padded = (
            value.rjust(widths[key]) if right[key] else value.ljust(widths[key])
            for key, value in zip(keys, values, strict=True)
        )
        return "  ".join(padded).rstrip()

    body = [line([cells[key][i] for key in keys]) for i in range(len(rows))]
    return "\n".join([line(headings), "  ".join("-" * widths[key] for key in keys), *body])


def markdown_table(rows: Sequence[Row], columns: Columns | None = None) -> str:
    """The same table in GitHub's Markdown."""
    keys, headings = columns_of(rows, columns)
    cells = {key: format_column([row.get(key) for row in rows]) for key in keys}
    rule = ["---:" if is_numeric(rows, key) else "---" for key in keys]
    lines = [headings, rule, *([cells[key][i] for key in keys] for i in range(len(rows)))]
    return "\n".join("| " + " | ".join(map(_escape, line)) + " |" for line in lines)


def duration(seconds: float) -> str:
    """An estimate of time in words: 200 -> "about 3 minutes"."""
    for name, unit in (("years", 365 * 86_400), ("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * unit:
            return f"about {seconds / unit:,.0f} {name}"
    return f"about {max(seconds, 1):.0f} seconds"


def time_class(seconds: float) -> str:
    """What an estimate of time is counted in: seconds, minutes, hours or days."""
    return next(name for limit, name in _CLASSES.items() if seconds < limit)


def amount(number: float, unit: str = "B") -> str:
    """1,234,567 -> "1.23 MB"."""
    place = min(int(math.log10(max(number, 1)) // 3), len(_PREFIXES) - 1)
    number /= 1000**place
    decimals = max(0, 2 - math.floor(math.log10(number))) if place else 0
    return f"{number:,.{decimals}f} {_PREFIXES[place]}{unit}"


def _escape(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")


def format_column(values: Sequence[Any]) -> list[str]:
    """Format the values of one column alike.

    Floats get the decimals with which the largest has four significant digits (three below 1). Beside a number in the
    thousands, where that is none, each keeps three significant digits; what would round to zero keeps two; below 1e-4
    and from 1e9 on there is an exponent. Whole numbers get thousands separators.
    """
    floats = [abs(value) for value in values if isinstance(value, float) and PLAIN[0] <= abs(value) < PLAIN[1]]
    largest = max(floats, default=0.0)
    decimals = 0
    if largest > 0:
        decimals = max(0, (3 if largest >= 1 else 2) - math.floor(math.log10(largest)))
    return [_format(value, decimals) for value in values]


def _format(value: Any, decimals: int) -> str:
    match value:
        case None:
            return MISSING
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float() if not math.isfinite(value):
            return str(value)
        case float() if value and not PLAIN[0] <= abs(value) < PLAIN[1]:
            return f"{value:.3g}"
        case float():
            if value and decimals == 0:
                decimals = max(0, 2 - math.floor(math.log10(abs(value))))
            text = f"{value:,.{decimals}f}"
            return f"{value:.2g}" if value and not text.strip("-0.,") else text
        case _:
            return str(value)


def columns_of(rows: Sequence[Row], columns: Columns | None) -> tuple[list[str], list[str]]:
    """Keys and headings, as `text_table` takes them."""
    if columns is None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
    if isinstance(columns, Mapping):
        return list(columns), list(columns.values())
    return list(columns), list(columns)


def is_numeric(rows: Sequence[Row], key: str) -> bool:
    """Whether a column holds numbers, and nothing else where it holds anything."""
    values = [row.get(key) for row in rows if row.get(key) is not None]
    return bool(values) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
