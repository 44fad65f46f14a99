"""The plan for a person: what is the same in neighbouring blocks is one row, and lines are short."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from cli.main import run
from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.compression.preview import plan_rows, preview
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.report.tables import text_table


def rows_of(folder: Path, **given: Any) -> list[dict[str, Any]]:
    asked: dict[str, Any] = {"keep": 0.5, "objective": "plain"}
    found = preview(Checkpoint.open(folder), CompressSettings(**asked | given), torch.device("cpu"))
    return list(found["matrices"])


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., LlamaForCausalLM]) -> Path:
    """A hundred blocks."""
    folder = tmp_path_factory.mktemp("deep")
    tiny_llama(num_hidden_layers=100, hidden_size=8, intermediate_size=24, vocab_size=16).save_pretrained(folder)
    return folder


def test_bytes_before_and_after(dense: Callable[..., Path]) -> None:
    for row in rows_of(dense("llama", torch.bfloat16)):
        assert row["bytes_before"] == 2 * row["out"] * row["in"]
        assert row["bytes_after"] == 2 * (row["rank"] * (row["out"] + row["in"]) + 1)


def test_equal_rows_of_neighbouring_blocks_are_one(deep: Path) -> None:
    rows = rows_of(deep, exclude=("*.4.self_attn.q_proj", "*.7.self_attn.q_proj", "*.8.self_attn.q_proj"))
    grouped = plan_rows(rows, grouped=True)
    excluded = {row["matrix"] for row in grouped if row["note"] == "excluded"}
    assert excluded == {"model.layers.4.self_attn.q_proj", "model.layers.7-8.self_attn.q_proj"}
    assert len(plan_rows(rows)) == len(rows) == 700
    # Every row is in one group, and is as the group says.
    by_name = {row["matrix"]: row for row in plan_rows(rows)}
    for group in grouped:
        first, last = re.search(r"layers\.(\d+)(?:-(\d+))?\.", group["matrix"]).groups()  # type: ignore[union-attr]
        for block in range(int(first), int(last or first) + 1):
            row = by_name.pop(re.sub(r"layers\.[\d-]+", f"layers.{block}", group["matrix"]))
            assert {**row, "matrix": group["matrix"]} == group
    assert by_name == {}


def test_the_text_groups_from_a_hundred_blocks_on(
    deep: Path, capsys: pytest.CaptureFixture[str], same_process_after: None
) -> None:
    words = ["compress", str(deep), "--keep", "0.5", "--objective", "plain", "--align", "1", "--dry-run"]
    assert run(words) == 0
    out = capsys.readouterr().out
    assert sum(line.startswith("model.layers.") and " factors " in line for line in out.splitlines()) < 30
    assert re.search(r"^model\.layers\.0-\d+\.self_attn\.q_proj ", out, re.MULTILINE)
    assert "model.layers.0 to model.layers.99 " in out
    assert run([*words, "-v"]) == 0
    assert sum(" factors " in line for line in capsys.readouterr().out.splitlines()) == 700


def test_lines_are_short() -> None:
    """Rows as a 7B model has them, with the longest notes."""
    rows = [
        {
            "matrix": "model.layers.31.self_attn.q_proj",
            "role": "q",
            "block": 31,
            "out": 11008,
            "in": 4096,
            "rank": 1504,
            "form": form,
            "kept": 0.5,
            "bytes_before": 90177536,
            "bytes_after": 45432834,
            "note": note,
        }
        for form, note in (("pivoted", ""), ("dense", "kept whole by the recipe"), ("dense", "its share buys it whole"))
    ]
    assert max(map(len, text_table(plan_rows(rows)).splitlines())) <= 120
