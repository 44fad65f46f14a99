"""What a setting does to the training: accumulation, activations, compiling, schedules, validation and precision."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from lowrank_kit.training import wiring
from lowrank_kit.training.run import train
from lowrank_kit.training.settings import TrainSettings
from lowrank_kit.training.tracking import RunArguments
from tests.training.runs import equal, log_of, weights, without_clock

Make = Callable[..., TrainSettings]


@pytest.fixture
def without_dropout(config_file: Path) -> None:
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"attention_dropout": 0.0}))


def close(one: Path, other: Path, tolerance: float = 1e-6) -> bool:
    """The same log but for the clock, and the same weights."""
    logs = [without_clock(log_of(folder)) for folder in (one, other)]
    numbers = [[(key, n) for line in log for key, n in line.items() if n is not None] for log in logs]
    for (key, expected), (another, number) in zip(*numbers, strict=True):
        assert (another, number) == (key, pytest.approx(expected, rel=tolerance))
    pairs = [(tensor, weights(other)[name]) for name, tensor in weights(one).items()]
    return all(torch.allclose(tensor, another, rtol=0, atol=tolerance) for tensor, another in pairs)


# The same gradients, summed in another order. The polar factor of numuon and the signs of adamw make more of that.
@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-6), (True, 1e-3)], ids=["float32", "bf16"])
@pytest.mark.usefixtures("without_dropout")
def test_accumulating_is_a_larger_batch(bf16: bool, tolerance: float, settings_for: Make, tmp_path: Path) -> None:
    for name, batch_size, accumulate in (("at-once", 8, 1), ("in-parts", 4, 2)):
        settings = {"batch_size": batch_size, "accumulate": accumulate, "bf16": bf16, "overrides": ("*=sgd",)}
        train(settings_for(steps=3, **settings), tmp_path / name, device="cpu")
    assert close(tmp_path / "at-once", tmp_path / "in-parts", tolerance)


def test_activations_are_computed_again(settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[bool] = []
    forward = LlamaMLP.forward

    def counted(self: LlamaMLP, x: Tensor) -> Tensor:
        passes.append(self.training)
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    for name, again in (("kept", False), ("again", True)):
        train(settings_for(steps=2, checkpoint_activations=again), tmp_path / name, device="cpu")
        # Two steps of two forward passes of two blocks.
        assert sum(passes) == (16 if again else 8)
        passes.clear()
    # With dropout, so the random state is brought back for the second pass.
    assert equal(weights(tmp_path / "kept"), weights(tmp_path / "again"))
    configs = [(tmp_path / name / "config.json").read_text() for name in ("kept", "again")]
    assert configs[0] == configs[1]


@pytest.mark.usefixtures("without_dropout")
def test_compiled(
    settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The compiler's front end only: its back end takes a minute."""
    settings = {"steps": 3, "save_every": 2, "optimizer": "sgd"}
    train(settings_for(**settings), tmp_path / "plain", device="cpu")
    monkeypatch.setattr(wiring, "RunArguments", partial(RunArguments, torch_compile_backend="eager"))
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    with caplog.at_level(logging.INFO, logger="lowrank_kit"):
        train(settings_for(**settings, compile=True), tmp_path / "compiled", device="cpu")
    assert graphs["unique_graphs"] > 0
    assert "up" in caplog.text
    assert close(tmp_path / "plain", tmp_path / "compiled")
    for name in ("model.safetensors", "config.json"):
        checkpoint = Path("checkpoints", "checkpoint-2", name)
        assert (tmp_path / "plain" / checkpoint).exists() == (tmp_path / "compiled" / checkpoint).exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "compiled", output_loading_info=True)[1]
    assert not any(model.values())


# How the learning rate goes


def rates(settings: TrainSettings, output: Path) -> list[float]:
    train(settings, output, device="cpu")
    return [line["lr"] / settings.peak_lr for line in log_of(output) if "loss" in line]


def test_learning_rate_schedules(settings_for: Make, tmp_path: Path) -> None:
    common = {"steps": 10, "warmup": 0.2, "optimizer": "sgd", "accumulate": 1}
    wsd = settings_for(lr_schedule="wsd", decay_share=0.4, **common)
    decay = [1 - math.sqrt(i / 4) for i in range(4)]
    assert rates(wsd, tmp_path / "wsd") == pytest.approx([0, 0.5, 1, 1, 1, 1, *decay])
    floor = settings_for(lr_schedule="wsd", decay_share=0.4, min_lr=0.1, **common)
    assert rates(floor, tmp_path / "floor")[2:] == pytest.approx([1, 1, 1, 1, *(0.1 + 0.9 * rate for rate in decay)])
    cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    settings = settings_for(min_lr=0.1, **common)
    assert rates(settings, tmp_path / "cosine") == pytest.approx([0, 0.5, *cosine])


# What a validation that cannot be made costs


def test_a_broken_validation_shows_before_the_first_step(
    settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, steps = LlamaForCausalLM.forward, []

    @wraps(forward)
    def without_memory(self: LlamaForCausalLM, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            raise torch.OutOfMemoryError
        steps.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", without_memory)
    with pytest.raises(torch.OutOfMemoryError):
        train(settings_for(), tmp_path / "run", device="cpu")
    assert not steps


def test_bf16_keeps_float32_weights(settings_for: Make, tmp_path: Path) -> None:
    train(settings_for(steps=2, bf16=True), tmp_path / "run", device="cpu")
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.float32}
