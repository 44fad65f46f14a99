"""What is found in folders, and every refusal: another version, damage, nothing there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.summary.find import MOST_LEVELS, find_documents
from tests.results import EXPERIMENT

EVAL = {"schema_version": 1, "models": [{"model": "a", "bytes": 1}], "settings": {}}


def put(path: Path, document: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def test_documents_are_known_by_schema_name_and_what_they_hold(tmp_path: Path) -> None:
    put(tmp_path / "a" / "results.json", EXPERIMENT)
    put(tmp_path / "scores.json", EVAL)
    put(tmp_path / "notes.json", {"schema_version": 1, "models": ["somebody's"], "settings": {}})
    put(tmp_path / "run.json", {"of": "another program"})
    (tmp_path / "broken.json").write_text("{")
    found = find_documents([tmp_path, tmp_path / "a"])
    assert [(one.kind, one.shown) for one in found] == [
        ("eval", f"{tmp_path.name}/scores.json"),
        ("experiment", f"{tmp_path.name}/a/results.json"),
    ]


def test_hidden_unfinished_and_deep_folders_are_passed_over(tmp_path: Path) -> None:
    for folder in (".hidden", "out.partial", "checkpoints", "/".join("abcdefgh"[: MOST_LEVELS + 1])):
        put(tmp_path / folder / "scores.json", EVAL)
    with pytest.raises(UsageError, match=r"nothing that lowrank wrote in .* \(0 JSON files"):
        find_documents([tmp_path])
    put(tmp_path / "/".join("abcdefgh"[:MOST_LEVELS]) / "scores.json", EVAL)
    assert len(find_documents([tmp_path])) == 1


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("results.json", {**EXPERIMENT, "schema": "lowrank-experiment/2"}),
        ("scores.json", {**EVAL, "schema_version": 2}),
        ("compression.json", {"schema_version": 2}),
    ],
)
def test_results_of_another_version_are_refused(name: str, document: dict[str, Any], tmp_path: Path) -> None:
    put(tmp_path / "good.json", EVAL)
    put(tmp_path / name, document)
    with pytest.raises(UsageError, match=rf"{name}: results of version 2; this lowrank-kit reads version 1"):
        find_documents([tmp_path])


def test_damaged_files_of_ours_are_told(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"schema_version": 1, "sett')
    with pytest.raises(LowRankError, match=r"run\.json is damaged: Unterminated string"):
        find_documents([tmp_path])
    put(tmp_path / "run.json", {"schema_version": 1, "settings": {}, "finished": True, "num_steps": 3})
    with pytest.raises(LowRankError, match=r"run\.json is damaged: it has no parameters"):
        find_documents([tmp_path])


def test_a_folder_that_is_not_there_and_one_with_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no folder .*nowhere"):
        find_documents([tmp_path / "nowhere"])
    put(tmp_path / "full" / "scores.json", EVAL)
    put(tmp_path / "empty" / "config.json", {})
    with pytest.raises(UsageError, match=r"nothing that lowrank wrote in .*empty"):
        find_documents([tmp_path / "full", tmp_path / "empty"])


def test_a_file_may_be_named_itself(tmp_path: Path) -> None:
    assert [one.shown for one in find_documents([put(tmp_path / "any.json", EVAL)])] == ["any.json"]
