"""The page about architectures says what is so."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from lowrank_kit.report.tables import markdown_table
from tests.families import FAMILIES
from tests.more_families import MORE
from tests.scaling.families import PASSED, REFUSED, outcome_of, rows

PAGE = Path(__file__).parents[2] / "docs" / "scaling-architectures.md"
OTHERS = ("olmo2", "deepseek_v3", "xglm", "mamba")
CANNOT = ("opt_projected", "gpt_oss", "mamba")


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_the_page_tells_of_the_family(family: str) -> None:
    if family in MORE and family not in CONFIG_MAPPING:
        pytest.skip("a newer transformers has it")
    outcome = outcome_of(family)
    assert outcome.way == (REFUSED if family in CANNOT else PASSED)
    row = markdown_table(list(rows({family: outcome}))).splitlines()[-1]
    assert row in PAGE.read_text().splitlines(), "python -m evals.scaling.families"


def test_enough_families_can_be_scaled() -> None:
    cells = [[cell.strip() for cell in line.split("|")] for line in PAGE.read_text().splitlines()]
    passed = [row for row in cells if len(row) > 5 and row[3] == PASSED]
    assert len(passed) >= 27
    assert sum("experts" in row[2] or "moe" in row[1] or "mixtral" in row[1] for row in passed) >= 3
