"""Grams are sums of x x^T of what each matrix really reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from lowrank_kit.compression.statistics import input_grams
from lowrank_kit.data.blocks import TokenBlocks
from lowrank_kit.errors import LowRankError
from lowrank_kit.matrices import Matrix, find_matrices
from tests.families import FAMILIES, build, token_ids

IDS = token_ids(batch=5, length=12)
BLOCKS = TokenBlocks(IDS.int(), bytes_per_token=1.0)


def plain_matrices(model: nn.Module) -> list[Matrix]:
    return [matrix for matrix in find_matrices(model) if matrix.expert is None]


def inputs_of(model: PreTrainedModel, names: list[str]) -> dict[str, Tensor]:
    """What each named module is given for all of IDS at once: [tokens, in] float64."""
    seen: dict[str, Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(name, args[0].double().flatten(0, -2))
        )
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_grams_of_every_matrix(family: str) -> None:
    model = build(family)
    matrices = plain_matrices(model)
    grams = input_grams(model, matrices, BLOCKS, batch_size=2)
    assert set(grams) == {matrix.shares_input for matrix in matrices}
    seen = inputs_of(model, [matrix.name for matrix in matrices])
    for matrix in matrices:
        X = seen[matrix.name]
        gram, expected = grams[matrix.shares_input], X.mT @ X
        assert gram.dtype == torch.float64
        assert len(X) == IDS.numel()
        # Batches of other sizes and products in float32: some roundings of 2^-24 relative to the largest entry.
        torch.testing.assert_close(gram, expected, rtol=0, atol=2e-6 * expected.abs().max().item())


def test_half_precision_is_summed_in_more() -> None:
    model = build("llama").bfloat16()
    matrices = plain_matrices(model)
    grams = input_grams(model, matrices, BLOCKS, batch_size=len(IDS))
    seen = inputs_of(model, [matrix.name for matrix in matrices])
    for matrix in matrices:
        expected = seen[matrix.name].mT @ seen[matrix.name]
        # Products of bfloat16 are exact in float32; a sum in bfloat16 would be off by 1e-2.
        torch.testing.assert_close(
            grams[matrix.shares_input], expected, rtol=0, atol=2e-6 * expected.abs().max().item()
        )


def test_dropout_is_off_and_the_training_flags_are_as_before() -> None:
    model = build("gpt2")
    assert model.config.resid_pdrop > 0
    expected = input_grams(model, plain_matrices(model), BLOCKS)
    model.train()
    model.transformer.h[1].eval()
    flags = [module.training for module in model.modules()]
    grams = input_grams(model, plain_matrices(model), BLOCKS)
    assert all(torch.equal(gram, expected[key]) for key, gram in grams.items())
    assert [module.training for module in model.modules()] == flags


def hooks_left(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_nothing_is_left_in_the_model() -> None:
    model = build("llama")
    input_grams(model, plain_matrices(model), BLOCKS)
    assert hooks_left(model) == 0


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (1e25, r"NaN or Inf in the input of model.layers.1.mlp.down_proj: [1-9]\d* of 1152 activations"),
        # Finite, but not their squares.
        (1e11, r"NaN or Inf in the input of model.layers.1.mlp.down_proj: 0 of 1152 activations, .* up to [\d.]+e\+"),
    ],
)
def test_activations_that_overflow_are_named(scale: float, message: str) -> None:
    model = build("llama").train()
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        mlp.gate_proj.weight.mul_(scale)
        mlp.up_proj.weight.mul_(scale)
    with pytest.raises(LowRankError, match=message):
        input_grams(model, plain_matrices(model), BLOCKS, batch_size=2)
    assert hooks_left(model) == 0
    assert all(module.training for module in model.modules())


def test_an_input_that_no_token_reaches_is_named() -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=100, n_positions=16, add_cross_attention=True)
    model = GPT2LMHeadModel(config)  # without an encoder, cross-attention never runs
    with pytest.raises(LowRankError, match=r"reached 4 of \d inputs, not transformer.h.0.crossattention"):
        input_grams(model, plain_matrices(model), BLOCKS)
