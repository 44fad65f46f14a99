"""LowRankLinear is B (A x) + bias, and takes the place of a linear layer with everything that belongs to it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank_kit.errors import LowRankError
from lowrank_kit.layers import LAYERS, LowRankLinear, PivotedLinear, exchange_linear


@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_B_of_A(bias: bool) -> None:
    layer = LowRankLinear(7, 5, 3, bias=bias, dtype=torch.float64)
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    A, B = layer.A.weight, layer.B.weight
    expected = torch.einsum("or,ri,bti->bto", B, A, x)
    if bias:
        expected = expected + layer.B.bias
    # Another order of the same float64 sums: a few ulp of numbers around 1.
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(
        layer(x), nn.functional.linear(x, layer.dense_weight(), layer.B.bias), rtol=0, atol=1e-14
    )


def test_dense_weight_has_the_rank() -> None:
    W = LowRankLinear(9, 8, 2, dtype=torch.float64).dense_weight()
    assert W.shape == (8, 9)
    assert torch.linalg.matrix_rank(W) == 2


@pytest.mark.parametrize("bias", [True, False])
def test_names_and_shapes_on_disk(bias: bool) -> None:
    layer = LowRankLinear(7, 5, 3, bias=bias)
    expected = {"A.weight": (3, 7), "B.weight": (5, 3), "weight": (1,)} | ({"B.bias": (5,)} if bias else {})
    assert {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} == expected
    assert layer.bias is layer.B.bias
    # The sentinel is no parameter: no optimizer decays it, no count of parameters has it.
    assert "weight" not in dict(layer.named_parameters())


def test_gradients_reach_both_factors() -> None:
    layer = LowRankLinear(7, 5, 3)
    layer(torch.randn(2, 7)).square().sum().backward()
    gradients = [parameter.grad for parameter in layer.parameters()]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_repr_tells_the_sizes() -> None:
    assert repr(LowRankLinear(7, 5, 3)).startswith("LowRankLinear(\n  in_features=7, out_features=5, rank=3")


@pytest.mark.parametrize("form", LAYERS)
@pytest.mark.parametrize(
    "old",
    [
        nn.Linear(7, 5),
        nn.Linear(7, 5, bias=False),
        Conv1D(5, 7),  # (out, in)
        nn.Linear(7, 5, dtype=torch.bfloat16),
        nn.Linear(7, 5, device="meta"),
    ],
    ids=["bias", "no-bias", "conv1d", "bfloat16", "meta"],
)
def test_exchange_keeps_what_belongs_to_the_layer(old: nn.Linear | Conv1D, form: str) -> None:
    model = nn.ModuleDict({"block": nn.ModuleDict({"proj": old})})
    new = exchange_linear(model, "block.proj", 3, form)
    assert type(new) is LAYERS[form]
    assert model.get_submodule("block.proj") is new
    assert (new.in_features, new.out_features, new.rank) == (7, 5, 3)
    bias = new.bias if isinstance(new, PivotedLinear) else new.B.bias
    assert (bias is None) == (old.bias is None)
    assert {tensor.dtype for name, tensor in new.state_dict().items() if name != "index"} == {old.weight.dtype}
    assert {tensor.device for tensor in new.state_dict().values()} == {old.weight.device}


@pytest.mark.parametrize(
    ("name", "message"),
    [("norm", "norm is a LayerNorm, not a linear layer"), ("nowhere", "ModuleDict has no module nowhere")],
)
def test_exchange_refuses_what_is_no_linear_layer(name: str, message: str) -> None:
    model = nn.ModuleDict({"norm": nn.LayerNorm(4)})
    with pytest.raises(LowRankError, match=message):
        exchange_linear(model, name, 1)
    assert isinstance(model["norm"], nn.LayerNorm)
