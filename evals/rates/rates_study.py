"""The models of `compressibility`, each optimizer at several learning rates; nothing is folded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from experiments import Step
from matplotlib.figure import Figure

from lowrank_kit.report.tables import markdown_table

sys.path.insert(0, str(Path(__file__).parents[1] / "compressibility"))
from compressibility_study import model_name, prepare, train_model

TITLE = "Learning rates of the folding study"


def steps(settings: Mapping[str, Any]) -> list[Step]:
    """Tokenizer and config, then each model."""
    return [
        Step("prepare", prepare),
        *(
            Step(f"train-{model_name(optimizer, seed)}", partial(train_model, optimizer, seed), ("prepare",))
            for optimizer in settings["optimizers"]
            for seed in settings["seeds"]
        ),
    ]


def results(settings: Mapping[str, Any], done: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """A row for each optimizer, rate and seed."""
    rows = []
    for optimizer, given in settings["optimizers"].items():
        for seed in settings["seeds"]:
            of = done[f"train-{model_name(optimizer, seed)}"]
            found = {key: round(of[key], 4) for key in ("validation_loss", "effective_rank_share")}
            rows.append({"name": optimizer, "seed": seed, **given, **found})
    return {"rows": rows}


def tables(document: Mapping[str, Any]) -> str:
    """Of all."""
    keys = ("name", "optimizer", "lr", "spectral_decay", "rank", "validation_loss", "effective_rank_share")
    shown = [{key.replace("_", " "): row.get(key) for key in keys[1:]} for row in document["rows"]]
    return markdown_table(shown)


def pictures(document: Mapping[str, Any]) -> dict[str, Figure]:
    """None: a table tells it."""
    return {}
