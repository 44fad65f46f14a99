"""The checks that read the code: style, format, types, and the floors of the house."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINT_IMPORTS = "import sys; from importlinter.cli import lint_imports_command as c; sys.exit(c(['--no-logo']))"


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("ruff", ["-m", "ruff", "check", "."]),
        ("ruff", ["-m", "ruff", "format", "--check", "."]),
        ("mypy", ["-m", "mypy"]),
        ("importlinter", ["-c", LINT_IMPORTS]),
    ],
    ids=["ruff check", "ruff format", "mypy", "lint-imports"],
)
def test_the_code_passes(module: str, arguments: list[str]) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install -c constraints.txt -e '.[test]'")
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("folder", ["lowrank_kit", "cli"])
def test_the_command_is_imported_relatively(folder: str) -> None:
    """`lowrank_kit.cli` exists only once installed, so import-linter and mypy cannot follow an import of it."""
    absolute = re.compile(r"^\s*((from|import) (lowrank_kit\.)?cli\b|from lowrank_kit import .*\bcli\b)", re.MULTILINE)
    assert [str(file) for file in (ROOT / folder).rglob("*.py") if absolute.search(file.read_text())] == []


def test_no_file_is_longer_than_400_lines() -> None:
    files = [file for folder in ("lowrank_kit", "cli") for file in (ROOT / folder).rglob("*.py")]
    assert [str(file) for file in files if len(file.read_text().splitlines()) > 400] == []
