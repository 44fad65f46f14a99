"""Sections of tables and pictures in, one self-contained HTML page out."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from lowrank_kit.report.files import PNG_DPI
from lowrank_kit.report.style import styled
from lowrank_kit.report.tables import Columns, Row, columns_of, format_column, is_numeric

MOST_ROWS = 400
MOST_PICTURES = 80
# A picture of more points or bytes than this as vectors is smaller in pixels, and no less sharp.
VECTOR_POINTS = 4000
VECTOR_BYTES = 100_000
SHORT = 40  # letters of a cell that is not broken
CSS_PIXELS = 96  # in an inch


class Measured(NamedTuple):
    """A number with its standard error, sorted by the number."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Text:
    """A paragraph; `verdict` is PASS or FAIL where it is one."""

    text: str
    verdict: str = ""


@dataclass(frozen=True)
class Table:
    """Rows as `tables.text_table` takes them; of more than `most` the first are shown, and how many are left out."""

    rows: Sequence[Row]
    columns: Columns | None = None
    caption: str = ""
    most: int = MOST_ROWS


@dataclass(frozen=True)
class Picture:
    """A figure, and what it shows in words for who does not see it."""

    figure: Figure
    alt: str


@dataclass(frozen=True)
class Fold:
    """Parts that are shown when they are asked for."""

    title: str
    parts: Sequence[Part]


Part = Text | Table | Picture | Fold


@dataclass(frozen=True)
class Section:
    """What stands under a heading, then the sections below it."""

    title: str
    parts: Sequence[Part] = ()
    sections: Sequence[Section] = field(default=())


def make_page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """One HTML page that asks for nothing from elsewhere, and forbids it; all text is escaped.

    Args:
        title: of the page.
        lead: a line below it.
        sections: in order; two levels go into the table of contents.
    """
    style, script = _asset("page.css"), _asset("page.js")
    policy = {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": _digest(style),
        "script-src": _digest(script),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_asset("page.html"))
    return template.render(
        title=title,
        lead=lead,
        sections=list(_sections(sections)),
        policy="; ".join(f"{name} {value}" for name, value in policy.items()),
        style=Markup(style),
        script=Markup(script),
    )


def picture_uri(figure: Figure) -> str:
    """A figure as a data URI: SVG, or PNG where that would be large."""
    vector, pixels = io.BytesIO(), io.BytesIO()
    points = sum(np.size(line.get_xdata()) for axes in figure.axes for line in axes.lines)
    with styled():
        if points <= VECTOR_POINTS:
            figure.savefig(vector, format="svg", metadata={"Date": None, "Creator": None})
            if vector.tell() <= VECTOR_BYTES:
                return _uri("image/svg+xml", vector.getvalue())
            figure.set_layout_engine("none")  # it is done, and takes half of the time
        figure.savefig(pixels, format="png", dpi=PNG_DPI)
    return _uri("image/png", pixels.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _sections(sections: Sequence[Section]) -> Iterator[dict[str, Any]]:
    """What the template takes; ids are of titles, and unlike."""
    taken: set[str] = set()
    room = [MOST_PICTURES]

    def made(section: Section) -> dict[str, Any]:
        return {
            "id": _identifier(section.title, taken),
            "title": section.title,
            "parts": [_part(part, room) for part in section.parts],
            "sections": [made(below) for below in section.sections],
        }

    return map(made, sections)


def _identifier(title: str, taken: set[str]) -> str:
    stem = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    return name


def _part(part: Part, room: list[int]) -> dict[str, Any]:
    match part:
        case Text():
            return {"kind": "text", "text": part.text, "verdict": part.verdict}
        case Table():
            return {"kind": "table", **_table(part)}
        case Fold():
            return {"kind": "fold", "title": part.title, "parts": [_part(below, room) for below in part.parts]}
        case Picture() if room[0] <= 0:
            return {"kind": "text", "text": f"Left out, there are {MOST_PICTURES} pictures: {part.alt}", "verdict": ""}
        case Picture():
            room[0] -= 1
            width, height = (round(CSS_PIXELS * float(inches)) for inches in part.figure.get_size_inches())
            uri = picture_uri(part.figure)
            return {"kind": "picture", "uri": uri, "alt": part.alt, "width": width, "height": height}


def _table(table: Table) -> dict[str, Any]:
    rows = table.rows[: table.most]
    keys, headings = columns_of(rows, table.columns)
    columns = []
    for key, heading in zip(keys, headings, strict=True):
        values = [row.get(key) for row in rows]
        plain = [{key: value.value if isinstance(value, Measured) else value} for value in values]
        if all(value is None or value == "" for value in values):
            continue
        numbers = is_numeric(plain, key)
        texts = format_column([row[key] for row in plain])
        look = "number" if numbers else "short" if max(map(len, texts)) <= SHORT else ""
        cells = [_cell(value, text, numbers) for value, text in zip(values, texts, strict=True)]
        columns.append({"heading": heading, "look": look, "cells": cells})
    return {
        "caption": table.caption,
        "columns": columns,
        "count": len(rows),
        "left_out": len(table.rows) - len(rows),
    }


def _cell(value: Any, text: str, numbers: bool) -> dict[str, str]:
    """What is shown, and what is sorted by: the number in full, nothing where there is none."""
    if value is None:
        return {"text": text, "by": ""}
    if isinstance(value, Measured):
        error = "" if value.stderr is None else f" ±{value.stderr:.3f}"
        return {"text": f"{text}{error}", "by": repr(value.value)}
    return {"text": text, "by": repr(value) if numbers else str(value)}
