"""A text to calibrate on."""

from __future__ import annotations

import pytest

from tests.pages import write_pages


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Forty pages, some 2,500 tokens."""
    return str(write_pages(tmp_path_factory.mktemp("text") / "pages.jsonl", num_pages=40))
