"""A text and a model config that train in a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowrank_kit.training import effective_rank
from lowrank_kit.training.settings import TrainSettings
from tests.pages import write_pages

# Dropout, so that resuming has to bring the random state back as well.
MODEL_CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "attention_dropout": 0.1,
    "tie_word_embeddings": True,
}


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    return write_pages(tmp_path / "pages.jsonl")


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(MODEL_CONFIG))
    return path


@pytest.fixture
def measured_at_any_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Effective ranks of all matrices, whatever the share of the time: a step of the tiny model costs nothing."""
    monkeypatch.setattr(effective_rank, "SHARE", 100.0)


@pytest.fixture
def settings_for(text_file: Path, config_file: Path) -> Callable[..., TrainSettings]:
    """`settings_for(**changes)`: eight steps of four sequences of 32 tokens, from scratch."""

    def make(**changes: Any) -> TrainSettings:
        settings = {
            "model_config": None if "model" in changes else str(config_file),
            "text": str(text_file),
            "vocab_size": 384,
            "steps": 8,
            "batch_size": 2,
            "accumulate": 2,
            "block_tokens": 32,
            "eval_blocks": 8,
            "log_every": 1,
            "lr": 1e-2,
        }
        return TrainSettings(**(settings | changes))

    return make
