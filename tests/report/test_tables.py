"""Tables line up, and numbers read well."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_kit.report.tables import format_column, markdown_table, text_table

ROWS = [
    {"model": "dense", "perplexity": 16.234, "parameters": 1_834_560, "ok": True},
    {"model": "keep|0.2", "perplexity": 146.1, "parameters": None, "ok": False},
]


def test_text_table() -> None:
    assert text_table(ROWS).splitlines() == [
        "model     perplexity  parameters  ok",
        "--------  ----------  ----------  ---",
        "dense           16.2   1,834,560  yes",
        "keep|0.2       146.1           -  no",
    ]


def test_markdown_table() -> None:
    assert markdown_table(ROWS, {"model": "Model", "perplexity": "PPL"}).splitlines() == [
        "| Model | PPL |",
        "| --- | ---: |",
        "| dense | 16.2 |",
        "| keep\\|0.2 | 146.1 |",
    ]


def test_markdown_cells_stay_in_their_row() -> None:
    row = markdown_table([{"a": "x\\|y", "b": "two\nlines"}]).splitlines()[2]
    assert row == "| x\\\\\\|y | two<br>lines |"


def test_columns_are_chosen_and_ordered() -> None:
    assert text_table([{"a": 1, "b": 2}, {"c": 3}], ["c", "a"]).splitlines() == ["c  a", "-  -", "-  1", "3  -"]
    assert text_table([{"a": 1}, {"b": 2}]).splitlines()[0] == "a  b"


def test_no_rows() -> None:
    assert text_table([], ["a", "bc"]).splitlines() == ["a  bc", "-  --"]
    assert markdown_table([], ["a"]).splitlines() == ["| a |", "| --- |"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.7234, 0.05], ["0.723", "0.050"]),
        ([1.0], ["1.000"]),
        ([2.34567, None], ["2.346", "-"]),
        ([25.3, 146.23], ["25.3", "146.2"]),
        ([12345.678], ["12,346"]),
        ([25.34, 7.9, 0.7, 1460.2], ["25.3", "7.90", "0.700", "1,460"]),
        ([3.2e-7, 5e-12, 0.0], ["3.2e-07", "5e-12", "0"]),
        ([1.5e30, 25.34, 21.0], ["1.5e+30", "25.34", "21.00"]),
        ([0.00123456, 0.001], ["0.00123", "0.00100"]),
        ([0.0, 0.0], ["0", "0"]),
        ([100.0, 1e-7, -1e-9, 0.0], ["100.0", "1e-07", "-1e-09", "0.0"]),
        ([math.inf, -math.inf, math.nan, 1.5], ["inf", "-inf", "nan", "1.500"]),
        ([1, 1000, -12345], ["1", "1,000", "-12,345"]),
        ([True, False, None, "x"], ["yes", "no", "-", "x"]),
        ([], []),
    ],
)
def test_numbers(values: list[Any], expected: list[str]) -> None:
    assert format_column(values) == expected


CELLS = st.none() | st.booleans() | st.integers() | st.floats() | st.text("ab|é ", max_size=8)


@given(st.lists(st.fixed_dictionaries({"one": CELLS, "two": CELLS, "three": st.floats() | st.none()}), max_size=5))
@settings(deadline=None, derandomize=True)
def test_every_line_has_the_columns_of_the_rule(rows: list[dict[str, Any]]) -> None:
    heading, rule, *body = text_table(rows, ["one", "two", "three"]).split("\n")
    assert len(body) == len(rows)
    assert max(map(len, (heading, *body))) <= len(rule)
    gaps = [i for i, mark in enumerate(rule) if mark == " "]
    assert all(line.ljust(len(rule))[gap] == " " for line in (heading, *body) for gap in gaps)
    assert all(
        line.count("|") - line.count("\\|") == 4 for line in markdown_table(rows, ["one", "two", "three"]).split("\n")
    )


@given(st.lists(st.floats(1e-6, 1e9), min_size=1, max_size=6))
@settings(deadline=None, derandomize=True)
def test_the_largest_number_keeps_three_digits(values: list[float]) -> None:
    largest = max(values)
    text = format_column(values)[values.index(largest)]
    assert math.isclose(float(text.replace(",", "")), largest, rel_tol=5e-3)
