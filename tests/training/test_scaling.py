"""Runs with settings of a smaller model: what they train with, what they leave behind, and how they go on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_kit.errors import UsageError
from lowrank_kit.scaling.mup import MuP
from lowrank_kit.scaling.sidecar import SIDECAR, load_rule
from lowrank_kit.training.run import estimate, train
from lowrank_kit.training.settings import TrainSettings
from tests.training.conftest import MODEL_CONFIG
from tests.training.runs import equal, log_of, weights, without_clock

Make = Callable[..., TrainSettings]
BASE = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def base_file(tmp_path: Path) -> Path:
    """Half as wide and half as deep as what is trained."""
    path = tmp_path / "base.json"
    path.write_text(json.dumps({**MODEL_CONFIG, **BASE, "num_key_value_heads": 1}))
    return path


def test_from_a_base_of_its_own_size_it_is_the_plain_run(settings_for: Make, config_file: Path, tmp_path: Path) -> None:
    train(settings_for(steps=3), tmp_path / "plain", device="cpu")
    train(settings_for(steps=3, mup_base=str(config_file)), tmp_path / "scaled", device="cpu")
    assert equal(weights(tmp_path / "plain"), weights(tmp_path / "scaled"))
    logs = [without_clock(log_of(tmp_path / name)) for name in ("plain", "scaled")]
    for one, other in zip(*logs, strict=True):
        assert one == pytest.approx(other, rel=1e-5)  # the norm is summed in another order


@pytest.mark.parametrize("optimizer", ["numuon", "adamw", "sgd"])
def test_a_run(optimizer: str, settings_for: Make, base_file: Path, tmp_path: Path) -> None:
    settings = settings_for(
        optimizer=optimizer, mup_base=str(base_file), adamw_lr=3e-3, lr_schedule="constant", warmup=0
    )
    train(settings, tmp_path / "run", device="cpu")
    steps = [line for line in log_of(tmp_path / "run") if "loss" in line]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    assert {line["lr"] for line in steps} == {1e-2}  # as it was given
    rule = load_rule(tmp_path / "run")
    assert (rule.optimizer, rule.width_ratio, rule.depth_ratio) == (optimizer, 2, 2)
    assert rule.multipliers["model.layers.1.mlp.down_proj.weight"] == 0.5
    assert rule.multipliers["model.norm.weight"] == 0.5  # tied


def test_it_starts_from_scaled_weights_and_takes_scaled_steps(
    settings_for: Make, base_file: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"optimizer": "adamw", "steps": 1, "lr_schedule": "constant", "warmup": 0, "clip": 0}
    still = {"lr": 1e-12, "adamw_lr": 1e-12}
    runs: dict[str, dict[str, Any]] = {
        "plain": still,
        "scaled": {**still, "mup_base": str(base_file)},
        "stepped": {"mup_base": str(base_file), "lr": 1e-3, "adamw_lr": 1e-3},
    }
    for name, more in runs.items():
        train(settings_for(**changes | more), tmp_path / name, device="cpu")
    plain, scaled, stepped = (weights(tmp_path / name) for name in ("plain", "scaled", "stepped"))
    for name, ratio, rate in (
        ("model.embed_tokens.weight", 1, 1),
        ("model.layers.0.self_attn.q_proj.weight", 0.5**0.5, 0.5),
        ("model.layers.0.mlp.down_proj.weight", 0.5 * 0.5**0.5, 0.25),
        ("model.norm.weight", 0.5, 0.5),
        ("model.layers.1.input_layernorm.weight", 1, 1),
    ):
        torch.testing.assert_close(scaled[name], ratio * plain[name], rtol=1e-5, atol=1e-8)
        moved = (stepped[name] - scaled[name]).abs()
        assert moved.median() == pytest.approx(1e-3 * rate, rel=0.02)  # the first step of AdamW is the sign


def test_gradients_are_clipped_by_the_norm_of_the_model_with_multipliers(
    settings_for: Make, base_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, found = MuP.clip_grad_norm_, []

    def seen(rule: MuP, model: nn.Module, max_norm: float) -> Tensor:
        raw = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        found.append((raw.item(), clip(rule, model, max_norm).item()))
        left = clip(rule, model, math.inf).item()
        assert left == pytest.approx(min(max_norm, found[-1][1]), rel=1e-4)
        return torch.tensor(found[-1][1])

    monkeypatch.setattr(MuP, "clip_grad_norm_", seen)
    train(settings_for(mup_base=str(base_file), clip=0.05), tmp_path / "run", device="cpu")
    assert [norm for _, norm in found] == [line["grad_norm"] for line in log_of(tmp_path / "run") if "loss" in line]
    assert all(abs(raw / norm - 1) > 0.01 for raw, norm in found)


def test_resuming(settings_for: Make, base_file: Path, tmp_path: Path) -> None:
    settings = settings_for(mup_base=str(base_file), save_every=3)
    train(settings, tmp_path / "whole", device="cpu")
    stopped = tmp_path / "stopped"
    train(settings, stopped, device="cpu")
    record = json.loads((stopped / "run.json").read_text())
    (stopped / "run.json").write_text(json.dumps({**record, "finished": False}))
    (stopped / "model.safetensors").unlink()
    base_file.write_text(json.dumps({**json.loads(base_file.read_text()), "intermediate_size": 48}))
    with pytest.raises(UsageError, match=r"another base or to another target: base: intermediate_size: 40 -> 48"):
        train(settings, stopped, resume=True, device="cpu")
    base_file.write_text(json.dumps({**json.loads(base_file.read_text()), "intermediate_size": 40}))
    train(settings, stopped, resume=True, device="cpu")
    assert equal(weights(stopped), weights(tmp_path / "whole"))
    other = settings_for(mup_base=str(base_file), mup_depth_rule="k1", save_every=3)
    (stopped / "run.json").write_text(json.dumps({**record, "finished": False}))
    with pytest.raises(UsageError, match='other settings: mup_depth_rule: "k2" -> "k1"'):
        train(other, stopped, resume=True, device="cpu")
    (stopped / SIDECAR).unlink()
    with pytest.raises(UsageError, match=r"no mup\.json: it was not trained with --mup-base"):
        train(settings, stopped, resume=True, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "somewhere", "mup_base": "1m"}, "--mup-base is for training from scratch"),
        ({"mup_base": "1m", "mup_depth_rule": "k3"}, 'unknown depth rule "k3"'),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str, settings_for: Make) -> None:
    with pytest.raises(UsageError, match=message):
        settings_for(**changes)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("nowhere", 'no model config "nowhere"'),
        ("qwen3-1m", "the base is a qwen3, the target a llama"),
        ("1m", "differ in head dimension: 32 and 8"),
    ],
)
def test_a_base_that_is_none(base: str, message: str, settings_for: Make, tmp_path: Path) -> None:
    settings = settings_for(mup_base=base)
    with pytest.raises(UsageError, match=message):
        estimate(settings)
    with pytest.raises(UsageError, match=message):
        train(settings, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
