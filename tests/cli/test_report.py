"""`lowrank report`: the page, what was found as JSON, and every refusal with its exit code and hint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.main import run
from tests.results import EXPERIMENT


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "results.json").write_text(json.dumps(EXPERIMENT))
    return tmp_path / "study"


def test_the_page_is_written_and_what_was_found_is_told(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "pages" / "page.html"
    assert run(["report", str(results), "-o", str(page), "--title", "Mine", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["bytes"] == page.stat().st_size
    assert [(one["kind"], one["file"]) for one in document["found"]] == [("experiment", str(results / "results.json"))]
    assert page.read_text().startswith("<!doctype html>")
    assert "<h1>Mine</h1>" in page.read_text()
    assert [file.name for file in page.parent.iterdir()] == ["page.html"]


def test_the_text_names_the_files(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(results), "-o", str(tmp_path / "page.html")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["experiment", str(results / "results.json")]
    assert lines[-1].startswith(f"wrote {tmp_path}/page.html (")


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = run(["report", *words])
    return code, capsys.readouterr().err


def test_a_page_that_exists_stays(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "page.html").write_text("old")
    code, told = refused([str(results), "-o", str(tmp_path / "page.html")], capsys)
    assert code == 2
    assert told == f"error: {tmp_path}/page.html exists\nhint: give another file with -o, or remove this one\n"
    assert (tmp_path / "page.html").read_text() == "old"


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"schema": "lowrank-experiment/3"}, 2, "results of version 3; this lowrank-kit reads version 1"),
        ({"schema": "other/1"}, 2, "nothing that lowrank wrote in"),
        ({"rows": {"a": 1}}, 1, "is damaged: its rows are no list of rows"),
        ({"front": {"x": "bytes"}}, 1, "is damaged (KeyError: 'y')"),
    ],
)
def test_bad_results_are_one_message_and_no_page(
    change: dict[str, object],
    code: int,
    message: str,
    results: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (results / "results.json").write_text(json.dumps({**EXPERIMENT, **change}))
    found, told = refused([str(results), "-o", str(tmp_path / "page.html")], capsys)
    assert found == code
    assert message in told
    assert [line.partition(":")[0] for line in told.splitlines()] == ["error", "hint"]
    assert not (tmp_path / "page.html").exists()


def test_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = refused([str(tmp_path / "nowhere"), "-o", str(tmp_path / "page.html")], capsys)
    assert code == 2
    assert f"no folder {tmp_path}/nowhere" in told


def test_where_no_file_can_be_made(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    code, told = refused([str(results), "-o", str(tmp_path / "file" / "page.html")], capsys)
    assert code in (1, 2)
    assert "file" in told.splitlines()[0]
