"""Where the parts of a fused matrix lie, proven by running the model: scaling that cancels leaves the logits alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CodeGenConfig,
    FalconConfig,
    GPTBigCodeConfig,
    MiniMaxConfig,
    MptConfig,
    PersimmonConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
)

from lowrank_kit.matrices import Matrix, find_matrices
from lowrank_kit.optim.layout import Layout
from tests.families import COMMON, GPT2, GROUPED, TOKENS, WEIGHT_STD, build, token_ids

FALCON = COMMON | {"bias": True}
SMALL = TOKENS | {"n_head": 4, "n_layer": 2, "initializer_range": WEIGHT_STD}
# Beside tests/families.py: every other order of rows.
OTHERS: dict[str, Callable[[], PreTrainedConfig]] = {
    "falcon_grouped": partial(FalconConfig, **FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon_one_key": partial(FalconConfig, **FALCON, new_decoder_architecture=False, multi_query=True),
    "falcon_by_head": partial(FalconConfig, **FALCON, new_decoder_architecture=False, multi_query=False),
    "bloom": partial(BloomConfig, **SMALL, hidden_size=32),
    "mpt": partial(MptConfig, **TOKENS, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    "gpt_bigcode": partial(GPTBigCodeConfig, **GPT2, multi_query=True),
    "persimmon": partial(PersimmonConfig, **COMMON, qk_layernorm=False),
    "phi3_equal": partial(Phi3Config, **COMMON, num_key_value_heads=4),
}
# Rows that are not [q; k; v] although their shape and name would allow it.
UNKNOWN: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt_bigcode_by_head": partial(GPTBigCodeConfig, **GPT2, multi_query=False),
    "codegen": partial(CodeGenConfig, **GPT2, rotary_dim=4),
    "minimax": partial(
        MiniMaxConfig,
        **GROUPED | {"num_key_value_heads": 4},
        num_local_experts=4,
        layer_types=["linear_attention", "full_attention"],
    ),
}


def model_of(name: str) -> PreTrainedModel:
    """A random model, biases and norms included, of weights so large that every part moves the logits."""
    if name not in OTHERS:
        model = build(name)
        for module in model.modules():
            if hasattr(module, "limit"):
                module.limit = math.inf  # gpt-oss clamps what is to be scaled
        return model
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OTHERS[name](), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(token_ids(), use_cache=False).logits


def rows_of(matrix: Matrix) -> dict[str, Tensor]:
    """Output rows of each part, as the optimizer's layout takes them apart."""
    assert matrix.split is not None
    numbers = torch.arange(matrix.shape[0])[:, None]
    parts = Layout(split=matrix.split.sizes, groups=matrix.split.groups).parts(numbers)
    return {role: part[:, 0] for role, part in zip(matrix.split.roles, parts, strict=True)}


@torch.no_grad()
def scale_outputs(model: PreTrainedModel, matrix: Matrix, rows: Tensor, factor: float, shift: float = 0.0) -> None:
    """Rows of W and of the bias times `factor`; `shift` is added to the bias."""
    parameters = dict(model.named_parameters())
    if matrix.expert is None:
        W, b = parameters[matrix.parameter], parameters.get(f"{matrix.name}.bias")
    else:
        W, b = parameters[matrix.parameter][matrix.expert], parameters.get(f"{matrix.parameter}_bias")
        b = None if b is None else b[matrix.expert]
    (W.mT if matrix.transposed else W)[rows] *= factor
    if b is not None:
        b[rows] = factor * b[rows] + shift


@torch.no_grad()
def scale_inputs(model: PreTrainedModel, role: str, factor: float) -> None:
    for name in {matrix.parameter for matrix in find_matrices(model) if matrix.role == role}:
        model.get_parameter(name).mul_(factor)


def change(name: str, role: str, act: Callable[[PreTrainedModel, Matrix, dict[str, Tensor]], Any], end: str) -> float:
    """Largest change of a logit when `act` is done to all matrices of a role, and the inputs of `end` are halved."""
    model = model_of(name)
    before = logits(model)
    fused = [matrix for matrix in find_matrices(model) if matrix.role == role]
    assert fused
    for matrix in fused:
        act(model, matrix, rows_of(matrix))
    if end:
        scale_inputs(model, end, 0.5)
    return (logits(model) - before).abs().max().item()


# Powers of two cancel in float32 but for the order of sums; logits are of order one.
SAME, CHANGED = 1e-4, 1e-2


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3", *OTHERS])
def test_parts_of_a_fused_qkv(name: str) -> None:
    def queries_and_keys(up: str, down: str, roll: int = 0) -> float:
        def act(model: PreTrainedModel, matrix: Matrix, rows: dict[str, Tensor]) -> None:
            for role, factor in ((up, 2.0), (down, 0.5)):
                scale_outputs(model, matrix, (rows[role] + roll) % matrix.shape[0], factor)

        return change(name, "qkv", act, "")

    def values(role: str, roll: int = 0) -> float:
        def act(model: PreTrainedModel, matrix: Matrix, rows: dict[str, Tensor]) -> None:
            scale_outputs(model, matrix, (rows[role] + roll) % matrix.shape[0], 2.0)

        return change(name, "qkv", act, "o")

    assert queries_and_keys("q", "k") < SAME
    assert values("v") < SAME
    # The next row, or another part: it was no accident.
    assert min(queries_and_keys("q", "k", roll=1), queries_and_keys("q", "v"), queries_and_keys("k", "v")) > CHANGED
    assert min(values("v", roll=1), values("q"), values("k")) > CHANGED


@pytest.mark.parametrize("name", ["phi3", "gpt_oss", "mixtral", "qwen3_moe"])
def test_parts_of_a_fused_gate_up(name: str) -> None:
    # gpt-oss computes (up + 1) * f(gate): twice of it is (2 up + 1) + 1.
    shift = 1.0 if name == "gpt_oss" else 0.0

    def doubled(role: str, roll: int = 0) -> float:
        def act(model: PreTrainedModel, matrix: Matrix, rows: dict[str, Tensor]) -> None:
            scale_outputs(model, matrix, (rows[role] + roll) % matrix.shape[0], 2.0, shift)

        return change(name, "gate_up", act, "down")

    assert doubled("up") < SAME
    assert min(doubled("gate"), doubled("up", roll=1)) > CHANGED


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_fused_qkv_of_unknown_order_is_stepped_whole(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(UNKNOWN[name]())
    fused = [matrix for matrix in find_matrices(model) if matrix.role == "qkv"]
    assert fused
    assert all(matrix.split is None for matrix in fused)


def test_rows_that_the_heads_do_not_explain_are_stepped_whole() -> None:
    model = build("phi3")
    model.config.head_dim = 5
    assert all(matrix.split is None for matrix in find_matrices(model) if matrix.role == "qkv")
