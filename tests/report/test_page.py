"""The page of tables and pictures, as text; how a browser shows it is in test_page_browser."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lowrank_kit.report import page
from lowrank_kit.report.lines import LinePanel, lines_plot
from lowrank_kit.report.page import Fold, Measured, Picture, Section, Table, Text, make_page, picture_uri


def lines(count: int) -> Picture:
    panel = LinePanel("a", "step", "loss", {"run": [(float(i), 1.0 / (i + 1)) for i in range(count)]})
    return Picture(lines_plot([panel], title="lines"), "some lines")


def test_the_page_names_no_other_place() -> None:
    text = make_page("title", "lead", [Section("one", [Text("said", "PASS"), Fold("more", [lines(3)])])])
    outside = re.sub(r"data:image/[a-z+]+;base64,[A-Za-z0-9+/=]+", "", text)
    assert re.findall(r"(?:https?:)?//[a-z]", outside.partition("<script>")[0]) == []
    assert "default-src 'none'; img-src data:; style-src 'sha256-" in text.replace("&#39;", "'")


def test_all_text_is_escaped() -> None:
    bad = "<script>alert(1)</script>\"'&"
    rows = [{bad: bad}]
    picture = Picture(lines(3).figure, bad)
    text = make_page(bad, bad, [Section(bad, [Text(bad), Table(rows, caption=bad), Fold(bad, [picture])])])
    assert text.count("<script>") == 1
    assert bad not in text


def test_numbers_are_sorted_by_all_their_digits() -> None:
    rows: list[dict[str, Any]] = [
        {"n": 1234567, "x": 0.123456789, "task": Measured(0.25, 0.0125), "word": "a"},
        {"n": None, "x": 2.0, "task": Measured(1.0, None), "word": None},
    ]
    text = make_page("t", "", [Section("s", [Table(rows)])])
    for cell in (
        '<td class="number" data-by="1234567">1,234,567</td>',
        '<td class="number" data-by="">-</td>',
        '<td class="number" data-by="0.123456789">0.123</td>',
        '<td class="number" data-by="0.25">0.250 ±0.013</td>',
        '<td class="short">a</td>',
    ):
        assert cell in text


def test_long_tables_and_many_pictures_are_cut_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MOST_PICTURES", 2)
    rows = [{"n": i} for i in range(page.MOST_ROWS + 7)]
    text = make_page("t", "", [Section("s", [Table(rows), *[lines(2)] * 3])])
    assert text.count("<tr>") == page.MOST_ROWS + 1
    assert "7 more rows are left out here." in text
    assert text.count("<img") == 2
    assert "Left out, there are 2 pictures: some lines" in text


def test_titles_alike_have_ids_of_their_own() -> None:
    text = make_page("t", "", [Section("a b", (), [Section("A-B"), Section("<>")])])
    assert re.findall(r'<section id="([^"]*)"', text) == ["a-b", "a-b-2", "section"]


def test_few_points_are_vectors_and_many_are_pixels() -> None:
    assert picture_uri(lines(10).figure).startswith("data:image/svg+xml;base64,")
    assert picture_uri(lines(page.VECTOR_POINTS + 1).figure).startswith("data:image/png;base64,")
    assert picture_uri(lines(10).figure) == picture_uri(lines(10).figure)
