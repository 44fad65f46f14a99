"""The checks pass for muP, fail for what is not, and the control shows that they see it; on real, small trainings."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

from lowrank_kit.errors import UsageError
from lowrank_kit.scaling.checks import Check, coordinate_check, run_checks, slope_rows, spectral_check
from lowrank_kit.scaling.family import Size, cross, least_widths, resized
from lowrank_kit.scaling.mup import MuP
from lowrank_kit.scaling.observe import BYTES, PLAIN, Row, Training, observe, spectral_rms, text_batches
from lowrank_kit.scaling.write import write_checks
from tests.families import FAMILIES, VOCAB_SIZE

CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=88,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=BYTES,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
SIZES = cross((32, 64, 128), (4, 8, 16))
# As over all sizes of evals/scaling; one seed and these few are enough for it.
BOUND = 0.15
Observed = tuple[list[Row], list[Check]]


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    return text_batches(argparse.__file__, steps=10)


@pytest.fixture(scope="module")
def observed(batches: list[Tensor]) -> Observed:
    return run_checks(CONFIG, SIZES, batches, Training("muon"), scalings=("k2", "k1", PLAIN))


def slopes(check: Check, **wanted: Any) -> list[float]:
    return [row["slope"] for row in check.slopes if wanted.items() <= row.items()]


def test_mup_is_flat_in_width_and_depth(observed: Observed) -> None:
    spectral, coordinate = observed[1]
    found = slopes(spectral, scaling="k2") + slopes(coordinate, scaling="k2", step=10)
    assert len(found) == 2 * 2 * 4 + 2
    assert max(map(abs, found)) <= BOUND
    judged = [row for row in (*spectral.slopes, *coordinate.slopes) if row["scaling"] == "k2" and row["verdict"]]
    assert {row["verdict"] for row in judged} == {"PASS"}


def test_the_control_is_not(observed: Observed) -> None:
    spectral, coordinate = observed[1]
    assert spectral.seen
    assert coordinate.seen
    assert min(slopes(spectral, scaling=PLAIN)) >= 0.8
    assert min(slopes(coordinate, scaling=PLAIN, step=10)) >= 0.5


def test_k1_is_told_apart_by_the_second_order_alone(observed: Observed) -> None:
    spectral, coordinate = observed[1]
    by_condition = {
        condition: slopes(spectral, scaling="k1", axis="depth", condition=condition, part="mlp")[0]
        for condition in ("C1.2 W2 W1", "C2.2 dW2 W1", "C2.2 W2 dW1", "C2.3 dW2 dW1")
    }
    assert list(by_condition.values()) == pytest.approx([0.5, 0.0, 0.0, -0.5], abs=0.1)
    assert not spectral.passed
    assert {row["scaling"] for row in spectral.failed} == {"k1"}
    assert max(map(abs, slopes(coordinate, scaling="k1", step=10))) <= BOUND  # the coordinate check cannot tell


def test_the_base_is_the_plain_model(observed: Observed) -> None:
    def base(scaling: str) -> list[float]:
        return [row["value"] for row in observed[0] if (row["scaling"], row["width"], row["depth"]) == (scaling, 32, 4)]

    assert base("k2") == base("k1") == base(PLAIN)


@pytest.mark.parametrize(
    ("broken", "condition", "axis"),
    [
        pytest.param("scaled", "C2.3 dW2 dW1", "width", id="learning rate not scaled"),
        pytest.param("initialize_", "C1.2 W2 W1", "depth", id="weights not scaled"),
    ],
)
def test_a_broken_rule_fails_and_is_named(
    broken: str, condition: str, axis: str, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MuP, broken, lambda self, given: list(given) if broken == "scaled" else None)
    rows = list(observe(CONFIG, cross((32, 128), (4, 16)), batches, Training("adamw"), scaling="k2"))
    check = spectral_check(rows)
    assert not check.passed
    assert min(slopes(check, condition=condition, axis=axis)) > 0.5
    assert "FAIL" in check.sentence()
    if broken == "scaled":
        assert check.failed[0]["condition"] == condition
        assert "furthest off at" in check.sentence()
        kept = slopes(check, condition="C1.2 W2 W1")
        assert max(map(abs, kept)) <= BOUND  # the weights at the start are right


def made_up(
    value: Callable[[int, int, int], float], scaling: str = "k2", part: str = "mlp", seed: int = 0
) -> list[Row]:
    """Rows of a family by a formula of (width, depth, block)."""
    return [
        {
            "scaling": scaling,
            "seed": seed,
            "width": width,
            "depth": depth,
            "part": part,
            "block": block,
            "condition": "C",
            "step": 3,
            "value": value(width, depth, block),
        }
        for width, depth in cross((32, 64, 128), (2, 4, 8))
        for block in range(depth)
    ]


def test_a_slope_is_of_the_means_and_names_the_block_furthest_off() -> None:
    check = spectral_check(made_up(lambda width, depth, block: math.sqrt(width) * (1 + (width == 64 and block == 1))))
    width, depth = check.slopes
    assert (width["axis"], depth["axis"]) == ("width", "depth")
    # Means: 1, 1.5 sqrt 2, 2 times the first's.
    assert width["slope"] == pytest.approx(0.5)
    assert width["values"] == pytest.approx([32**0.5, 1.5 * 8, 128**0.5])
    assert width["worst"] == "width 64, block 1 (2.8 times the base's)"
    assert (width["verdict"], depth["verdict"], depth["slope"]) == ("FAIL", "PASS", pytest.approx(0.0))
    assert "+0.50 over width in mlp C, furthest off at width 64, block 1" in check.sentence()
    assert check.seen is None


@pytest.mark.parametrize(("power", "verdict"), [(0.149, "PASS"), (-0.149, "PASS"), (0.151, "FAIL"), (-0.151, "FAIL")])
def test_the_bound(power: float, verdict: str) -> None:
    check = spectral_check(made_up(lambda width, depth, block: depth**power))
    assert [row["verdict"] for row in check.slopes] == ["PASS", verdict]


@pytest.mark.parametrize(("power", "seen"), [(0.81, True), (0.79, False), (-0.81, True)])
def test_a_control_that_is_nearly_flat_is_told(power: float, seen: bool) -> None:
    rows = made_up(lambda width, depth, block: 1.0) + made_up(lambda *size: (size[0] * size[1]) ** power, PLAIN)
    check = spectral_check(rows)
    assert check.passed
    assert check.seen is seen
    assert ("it says little" in check.sentence()) is not seen


def test_what_diverges_fails_and_in_the_control_is_seen() -> None:
    def value(width: int, depth: int, block: int) -> float:
        return math.nan if depth == 8 else 1.0

    check = spectral_check(made_up(value))
    assert [row["verdict"] for row in check.slopes] == ["PASS", "FAIL"]
    assert "depth 8, block 0 (not finite)" in check.sentence()
    control = spectral_check(made_up(lambda *size: 1.0) + made_up(value, PLAIN))
    assert control.passed
    assert [row["verdict"] for row in control.slopes if row["scaling"] == PLAIN] == ["not seen", "seen"]


def test_seeds_are_averaged_and_a_table_has_a_column_for_each_scaling() -> None:
    rows = (
        made_up(lambda width, *_: width) + made_up(lambda width, *_: 3 * width, seed=1) + made_up(lambda *_: 1.0, PLAIN)
    )
    check = spectral_check(rows)
    assert check.slopes[0]["values"] == [64, 128, 256]
    over_width, over_depth = slope_rows(check)
    assert (over_width["k2"], over_width[PLAIN], over_width["verdict"]) == (pytest.approx(1), pytest.approx(0), "FAIL")
    assert (over_depth["over"], over_depth["verdict"]) == ("depth", "PASS")


def test_one_size_has_no_slope() -> None:
    rows = [row for row in made_up(lambda *_: 1.0, part="stream") if (row["width"], row["depth"]) == (32, 2)]
    with pytest.raises(UsageError, match="two sizes"):
        coordinate_check(rows)


# What is measured


def test_spectral_rms() -> None:
    A = torch.zeros(3, 12)
    A[1, 4] = -5.0
    assert spectral_rms(A) == pytest.approx(math.sqrt(12 / 3) * 5)
    A[0, 0] = math.inf
    assert math.isnan(spectral_rms(A))


@pytest.mark.parametrize(
    ("family", "part", "first", "second"),
    [
        ("gpt2", "mlp", "h.1.mlp.c_fc.weight", "h.1.mlp.c_proj.weight"),
        ("gpt2", "attention", "h.1.attn.c_attn.weight", "h.1.attn.c_proj.weight"),
        ("phi3", "mlp", "layers.1.mlp.gate_up_proj.weight", "layers.1.mlp.down_proj.weight"),
        ("qwen3_moe", "mlp", "layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"),
    ],
)
def test_products_are_of_the_weights_and_their_changes(family: str, part: str, first: str, second: str) -> None:
    """Transposed, fused and stacked: against the norms of the parameters, one step of SGD by hand."""
    config: PreTrainedConfig = FAMILIES[family]()
    ids = torch.randint(0, VOCAB_SIZE, (4, 16))
    size = Size(config.hidden_size, config.num_hidden_layers)
    rows = list(observe(config, [size], [ids], Training("sgd", 0.5, steps=1, seed=3), scaling=PLAIN))
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(resized(config, size), dtype=torch.float32).eval()
    model(input_ids=ids, labels=ids).loss.backward()
    parameters = {name.partition(".")[2]: p for name, p in model.named_parameters()}

    def norms(name: str, change: bool) -> list[float]:
        p = parameters[name]
        W = p.grad.mul(-0.5) if change else p.detach()
        stack = W.mT[None] if family == "gpt2" else W if W.ndim == 3 else W[None]
        return [spectral_rms(one) for one in stack]

    for condition, dW2, dW1 in (
        ("C1.2 W2 W1", 0, 0),
        ("C2.2 dW2 W1", 1, 0),
        ("C2.2 W2 dW1", 0, 1),
        ("C2.3 dW2 dW1", 1, 1),
    ):
        products = [a * b for a, b in zip(norms(second, bool(dW2)), norms(first, bool(dW1)), strict=True)]
        found = [row["value"] for row in rows if (row["part"], row["block"], row["condition"]) == (part, 1, condition)]
        assert found == pytest.approx([2 * sum(products) / len(products)], rel=1e-3)
    start = next(row for row in rows if row["part"] == "stream" and row["step"] == 0)
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert start["block"] == 1
    if family != "gpt2":  # whose last is after the norm, as that of all; the one before it is of the block before
        assert start["value"] > float(hidden[1].pow(2).mean().sqrt()) / 2


def test_a_run_that_diverges_ends_as_not_finite(batches: list[Tensor]) -> None:
    rows = list(observe(CONFIG, [Size(32, 2)], batches, Training("sgd", 1e30), scaling=PLAIN))
    after = [row["value"] for row in rows if row["step"] == 10]
    assert all(math.isnan(value) for value in after)
    assert all(math.isfinite(row["value"]) for row in rows if row["step"] == 0)


# Sizes, data, settings


def test_sizes_make_a_cross() -> None:
    assert cross((64, 32), (8, 2)) == [(32, 2), (64, 2), (32, 8)]
    for widths, depths in (((32,), (4,)), ((), (4, 8)), ((0, 32), (4,))):
        with pytest.raises(UsageError):
            cross(widths, depths)


def test_resized_keeps_the_shape() -> None:
    kinds = ["sliding_attention", "full_attention"]
    config = Qwen3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, layer_types=kinds, use_sliding_window=True, sliding_window=8,
    )  # fmt: skip
    made = resized(config, Size(96, 5))
    assert (made.hidden_size, made.intermediate_size, made.num_hidden_layers) == (96, 144, 5)
    assert (made.num_attention_heads, made.num_key_value_heads, made.head_dim) == (6, 3, 16)
    assert made.layer_types == [*kinds, *kinds, kinds[0]]
    assert config.hidden_size == 64
    with pytest.raises(UsageError, match="of width 48") as refusal:
        resized(config, Size(48, 2))
    assert "multiples of 32" in str(refusal.value)


def test_least_widths_are_those_that_the_shape_allows() -> None:
    assert least_widths(CONFIG) == (32, 64, 128)
    of_16 = LlamaConfig(hidden_size=768, intermediate_size=2048, num_attention_heads=16, num_key_value_heads=4)
    assert least_widths(of_16) == (192, 384, 768)  # four heads of 48 for one key head
    resized(of_16, Size(192, 1))


def test_batches_of_a_text_are_the_same_each_time_and_too_little_is_refused(
    tmp_path: Path, batches: list[Tensor]
) -> None:
    again = text_batches(argparse.__file__, steps=10)
    assert [batch.shape for batch in batches] == [(8, 32)] * 10
    assert all(torch.equal(*pair) for pair in zip(batches, again, strict=True))
    (tmp_path / "short.txt").write_text("To be, or not to be. " * 30)
    with pytest.raises(UsageError, match="10 steps take 80"):
        text_batches(str(tmp_path / "short.txt"), steps=10, vocab_size=300)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"optimizer": "lion"}, "lion"), ({"steps": 0}, "at least one step"), ({"lr": 0.0}, "rate above 0")],
)
def test_bad_settings(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        replace(Training(), **change)


def test_bad_calls(batches: list[Tensor]) -> None:
    with pytest.raises(UsageError, match='unknown scaling "k3"'):
        next(observe(CONFIG, SIZES, batches, Training(), scaling="k3"))
    with pytest.raises(UsageError, match="11 steps take as many batches, got 10"):
        next(observe(CONFIG, SIZES, batches, Training(steps=11)))


def test_files(observed: Observed, tmp_path: Path) -> None:
    rows, checks = observed
    write_checks(tmp_path / "out", rows, checks, {"passed": True})
    assert json.loads((tmp_path / "out" / "check.json").read_text())["passed"]
    lines = (tmp_path / "out" / "check.csv").read_text().splitlines()
    assert lines[0] == "scaling,seed,width,depth,part,block,condition,step,value"
    assert len(lines) == 1 + len(rows)
    for name in ("spectral.png", "coordinate.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"
