"""What the settings of a run say of the optimizer reaches it, and what the run tells of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lowrank_kit.errors import UsageError
from lowrank_kit.training.run import train
from lowrank_kit.training.settings import TrainSettings

Make = Callable[..., TrainSettings]
QUERY, OUT, DOWN, EMBEDDING = (
    *(f"model.layers.0.{path}.weight" for path in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")),
    "model.embed_tokens.weight",
)


def saved_groups(folder: Path) -> dict[str, dict[str, Any]]:
    """The optimizer group of each parameter, as the checkpoint holds it."""
    (file,) = folder.glob("checkpoints/*/optimizer.json")
    groups = json.loads(file.read_text())["groups"]
    return {name: group for group in groups for name in group["param_names"]}


def log_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_the_settings_reach_the_optimizer(settings_for: Make, tmp_path: Path) -> None:
    settings = settings_for(
        steps=2,
        save_every=1,
        warmup=0.0,
        lr=2e-3,
        adamw_lr=1e-3,
        lr_schedule="constant",
        weight_decay=0.2,
        spectral_decay=0.4,
        momentum=0.8,
        nesterov=True,
        rank="fixed:0.25",
        topk="exact",
        overrides=("*.o_proj.*=adamw", "*.down_proj.*=rank_schedule=fixed:0.5", "*.down_proj.*=topk=krylov"),
    )
    record = train(settings, tmp_path / "run", device="cpu")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["overrides"] == [*settings.overrides]
    assert record["settings"]["topk"] == "exact"
    matrix = {"weight_decay": 0.2, "spectral_decay": 0.4, "momentum": 0.8, "nesterov": True, "total_steps": 2}
    expected: dict[str, dict[str, Any]] = {
        QUERY: matrix | {"rule": "numuon", "lr": 2e-3, "rank_schedule": "fixed:0.25", "topk": "exact"},
        DOWN: matrix | {"rule": "numuon", "lr": 2e-3, "rank_schedule": "fixed:0.5", "topk": "krylov"},
        OUT: matrix | {"rule": "adamw", "lr": 1e-3},
        EMBEDDING: {"rule": "adamw", "lr": 1e-3, "weight_decay": 0.2, "spectral_decay": 0.0},
        "model.norm.weight": {"rule": "adamw", "lr": 1e-3, "weight_decay": 0.0, "spectral_decay": 0.0},
    }
    groups = saved_groups(tmp_path / "run")
    assert {name: {key: groups[name][key] for key in keys} for name, keys in expected.items()} == expected


def test_spectral_decay_shrinks_the_matrices_and_only_these(settings_for: Make, tmp_path: Path) -> None:
    for name, decay in (("plain", 0.0), ("decayed", 2.0)):
        train(settings_for(steps=1, warmup=0.0, spectral_decay=decay), tmp_path / name, device="cpu")
    plain, decayed = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "decayed"))
    assert torch.equal(plain[EMBEDDING], decayed[EMBEDDING])
    # Every singular value by about lr times decay, 0.02; five Newton-Schulz steps give .65 to 1.25 of that.
    lost = torch.linalg.svdvals(plain[QUERY]) - torch.linalg.svdvals(decayed[QUERY])
    assert lost.max() < 0.025
    assert lost.median() > 0.013


@pytest.mark.parametrize(
    ("changes", "known"),
    [({"rank": "fixed:0.25"}, True), ({"rank": "fixed:0.95"}, False), ({"optimizer": "muon"}, False)],
    ids=["rank-k", "full-rank", "muon"],
)
def test_the_log_says_how_good_the_step_was(
    changes: dict[str, Any], known: bool, settings_for: Make, tmp_path: Path
) -> None:
    train(settings_for(steps=2, **changes), tmp_path / "run", device="cpu")
    ratios = [line["lmo_ratio"] for line in log_of(tmp_path / "run")]
    assert len(ratios) == 2
    # A cold start makes up for the step before that it lacks; none is better than the exact step by more than rounding.
    assert all(0.98 < ratio < 1.001 for ratio in ratios) if known else ratios == [None, None]


def test_what_steps_what_is_told_once(settings_for: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lowrank_kit"):
        train(settings_for(steps=2, warmup=0.5, overrides=("*.o_proj.*=sgd",)), tmp_path / "run", device="cpu")
    (told,) = (record for record in caplog.records if "what steps what" in record.message)
    assert told.levelno == logging.INFO
    rows = [line.split() for line in told.message.splitlines()]
    assert ["o", "2", "32", "x", "32", "sgd", "0.01", "-"] in rows
    assert ["down", "2", "32", "x", "80", "numuon", "0.01", "23", "of", "32"] in rows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("*.o_prj.*=adamw", r'the pattern "\*\.o_prj\.\*" matches none of 20 trainable parameters'),
        ("*=numuon", '"model.embed_tokens.weight" is no matrix'),
        ("*.o_proj.*=numoun", 'unknown rule "numoun" .*\nhint: did you mean "numuon"?'),
        ("*.o_proj.*=rank_schedule=fixed:2", r"rank fraction must be in \(0, 1\], got 2"),
        ("*.o_proj.*=topk=wram", 'unknown topk "wram"'),
    ],
)
def test_an_override_that_makes_no_sense_leaves_no_folder(
    line: str, message: str, settings_for: Make, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        train(settings_for(overrides=(line,)), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
