"""A text to calibrate on, and folders of dense models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.families import build
from tests.pages import write_pages


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Forty pages, some 2,500 tokens."""
    return str(write_pages(tmp_path_factory.mktemp("text") / "pages.jsonl", num_pages=40))


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`dense(family, dtype)`: a folder, made once."""
    root = tmp_path_factory.mktemp("dense")

    def folder(family: str, dtype: torch.dtype = torch.float32) -> Path:
        path = root / f"{family}-{dtype}"
        if not path.exists():
            build(family).to(dtype).save_pretrained(path)
        return path

    return folder
