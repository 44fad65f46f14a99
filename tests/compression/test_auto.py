"""What is left open is settled by time and memory, and said; what a plan costs is told beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.compression import auto
from lowrank_kit.compression.allocation import Evidence
from lowrank_kit.compression.auto import choose
from lowrank_kit.compression.forecast import LAWS, forecast
from lowrank_kit.compression.needs import estimate_needs
from lowrank_kit.compression.objectives import OBJECTIVES
from lowrank_kit.compression.plan import make_plan
from lowrank_kit.compression.preview import preview
from lowrank_kit.compression.settings import CompressSettings

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tiny_llama_folder: Path) -> Checkpoint:
    return Checkpoint.open(tiny_llama_folder)


def settings(**given: Any) -> CompressSettings:
    return CompressSettings(**({"keep": 0.5} | given))


def machine(monkeypatch: pytest.MonkeyPatch, *, flops: float = 1e12, memory: int = 10**12) -> None:
    monkeypatch.setattr(auto, "speed", lambda device: flops)
    monkeypatch.setattr(auto, "available_memory", lambda device: memory)


def test_nothing_is_left_open(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    for given in ({}, {"objective": "whiten"}, {"refine": "none"}, {"time": 1e-9}):
        chosen = choose(checkpoint, settings(**given), CPU).settings
        assert chosen.objective != "auto"
        assert None not in (chosen.allocation, chosen.form, chosen.refine)
        assert chosen.block_tokens == min(256, checkpoint.config["max_position_embeddings"])


def test_a_given_objective_comes_with_nothing_else(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    for objective in OBJECTIVES:
        choice = choose(checkpoint, settings(objective=objective), CPU)
        assert choice.reasons == ()
        assert (choice.settings.allocation, choice.settings.form, choice.settings.refine) == (
            "uniform",
            "factors",
            "none",
        )


def test_less_time_means_less_work(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each choice takes no longer than is allowed, and a little less than it takes gives the next one down."""
    machine(monkeypatch, flops=1e9)
    seen, allowed = [], 1e9
    while True:
        choice = choose(checkpoint, settings(time=allowed), CPU)
        assert choice.seconds <= allowed
        assert choice.seconds == pytest.approx(sum(stage["seconds"] for stage in choice.stages.values()))
        seen.append((choice.settings.objective, choice.settings.refine, choice.settings.e2e_epochs))
        if choice.settings.objective == "plain":
            break
        assert len(choice.reasons) == (1 if allowed == 1e9 else 2)
        allowed = choice.seconds * 0.999
    assert len(set(seen)) == len(seen) >= 5
    assert [refine for _, refine, _ in seen].index("none") >= 2
    # Not even that fits: the quickest there is, and what was not possible.
    hurried = choose(checkpoint, settings(time=1e-12), CPU)
    assert hurried.settings.objective == "plain"
    assert "quickest" in hurried.reasons[0]


def test_too_little_memory_for_two_models(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peak of many blocks is where two models are whole, which training end to end needs alone."""
    machine(monkeypatch)
    tiny_llama(num_hidden_layers=12).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    asked = settings(calibration_blocks=1, check_blocks=1, refine_blocks=1, batch_size=1, block_tokens=2)
    best = choose(checkpoint, asked, CPU).settings
    assert best.refine != "none"
    needed = estimate_needs(checkpoint, best, kept=0.5)
    assert needed.end_to_end > max(section.total for section in needed.sections)
    machine(monkeypatch, memory=needed.end_to_end)
    assert choose(checkpoint, asked, CPU).settings == best
    machine(monkeypatch, memory=needed.end_to_end - 1)
    choice = choose(checkpoint, asked, CPU)
    assert (choice.settings.objective, choice.settings.refine) == ("anchored-two-sided", "none")
    assert "GB are left" in choice.reasons[1]


def test_what_is_said_stays(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    for time in (1e-12, 1e12):
        said = {"allocation": "uniform", "form": "factors", "refine": "none"}
        chosen = choose(checkpoint, settings(time=time, **said), CPU).settings
        assert {name: getattr(chosen, name) for name in said} == said


def test_stages_count_the_tokens_that_are_read(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    asked = settings(
        objective="anchored-two-sided",
        allocation="loss",
        refine="both",
        calibration_blocks=10,
        refine_blocks=20,
        block_tokens=16,
        block_epochs=3,
        e2e_epochs=5,
    )
    stages = choose(checkpoint, asked, CPU).stages
    assert {name: stage["tokens"] for name, stage in stages.items()} == {
        "calibration": 160,
        "curvature": 160,
        "grams of the compressed model": 160,
        "refine by block": 960,
        "refine end to end": 1600,
        "factorize": 0,
    }
    plain = choose(checkpoint, settings(objective="plain"), CPU).stages
    assert set(plain) == {"factorize"}


def test_forecast_is_the_tail_of_the_scores(checkpoint: Checkpoint) -> None:
    asked = settings(objective="whiten", allocation="loss", form="factors", refine="none")
    names = [s.matrix.name for s in checkpoint.matrices()]
    shapes = [s.matrix.shape for s in checkpoint.matrices()]
    scores = [torch.rand(min(shape)).sort(descending=True).values for shape in shapes]
    evidence = {name: Evidence(loss_scores=one) for name, one in zip(names, scores, strict=True)}
    plan = make_plan(checkpoint, asked, evidence)
    expected = sum(one[m.rank :].sum().item() for m, one in zip(plan.matrices, scores, strict=True) if m.rank)
    found = forecast(plan.matrices, evidence, "none")
    assert found is not None
    constant, power, factor = LAWS["curvature of the loss", False]
    assert found == {
        "nats": pytest.approx(constant * expected**power),
        "factor": factor,
        "from": "curvature of the loss",
    }
    refined = forecast(plan.matrices, evidence, "e2e")
    assert refined is not None
    constant, power, _ = LAWS["curvature of the loss", True]
    assert refined["nats"] == pytest.approx(constant * expected**power)
    assert forecast(plan.matrices, None, "none") is None
    dense = make_plan(checkpoint, replace(asked, keep=1.0))
    nothing = forecast(dense.matrices, None, "none")
    assert nothing is not None
    assert nothing["nats"] == 0


def test_a_larger_budget_forecasts_less(checkpoint: Checkpoint) -> None:
    asked = [preview(checkpoint, settings(objective="plain", keep=keep), CPU) for keep in (0.2, 0.5, 0.8)]
    nats = [found["forecast"]["nats"] for found in asked]
    assert nats == sorted(nats, reverse=True)
    assert nats[-1] > 0


def test_a_preview_says_whose_ranks_it_shows(checkpoint: Checkpoint) -> None:
    found = preview(checkpoint, settings(objective="two-sided", allocation="loss"), CPU)
    uniform = preview(checkpoint, settings(objective="two-sided"), CPU)
    assert found["matrices"] == uniform["matrices"]
    assert "loss decides" in found["note"]
    assert uniform["note"] is None
    erank = preview(checkpoint, settings(objective="plain", allocation="erank"), CPU)
    assert erank["note"] is None
