"""PivotedLinear is the linear layer whose weight it stands for: rows kept, others made of them, in the right places."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lowrank_kit.layers import PivotedLinear


def shuffled(bias: bool = True, dtype: torch.dtype = torch.float64) -> PivotedLinear:
    """7 -> 5 of rank 3, random, with its outputs in another order."""
    layer = PivotedLinear(7, 5, 3, bias=bias, dtype=dtype)
    layer.index.copy_(torch.tensor([3, 0, 4, 2, 1]))
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("bias", [True, False])
def test_forward_by_its_definition(bias: bool) -> None:
    layer = shuffled(bias)
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    A, C = layer.A.weight, layer.C.weight
    rows = [*A, *(C @ A)]
    W = torch.stack([rows[place] for place in (3, 0, 4, 2, 1)])
    # Another order of the same float64 sums: a few ulp of numbers around 1.
    torch.testing.assert_close(layer.dense_weight(), W, rtol=0, atol=1e-14)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, W, layer.bias), rtol=0, atol=1e-14)


@pytest.mark.parametrize("bias", [True, False])
def test_names_and_shapes_on_disk(bias: bool) -> None:
    layer = PivotedLinear(7, 5, 3, bias=bias)
    expected = {"A.weight": (3, 7), "C.weight": (2, 3), "index": (5,), "weight": (1,)} | (
        {"bias": (5,)} if bias else {}
    )
    assert {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} == expected
    assert layer.index.dtype == torch.int32
    # No optimizer sees the sentinel or the index, and no count of parameters.
    assert set(dict(layer.named_parameters())) == {"A.weight", "C.weight"} | ({"bias"} if bias else set())


def test_gradients_are_those_of_the_dense_layer() -> None:
    layer, dense = shuffled(), nn.Linear(7, 5, dtype=torch.float64)
    x = torch.randn(6, 7, dtype=torch.float64)
    layer(x).pow(3).sum().backward()
    with torch.no_grad():
        dense.weight.copy_(layer.dense_weight())
        assert layer.bias is not None
        dense.bias.copy_(layer.bias)
    dense(x).pow(3).sum().backward()
    assert dense.weight.grad is not None
    # d/dA and d/dC of W, by the chain rule through dense_weight.
    A, C = torch.autograd.grad(layer.dense_weight(), (layer.A.weight, layer.C.weight), dense.weight.grad)
    for found, expected in ((layer.A.weight, A), (layer.C.weight, C), (layer.bias, dense.bias.grad)):
        assert found is not None
        assert found.grad is not None
        torch.testing.assert_close(found.grad, expected, rtol=1e-12, atol=1e-12)


def test_compiled_in_one_graph() -> None:
    layer, x = shuffled(dtype=torch.float32), torch.randn(2, 7)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert layer.C.weight.grad is not None


@pytest.mark.parametrize("bias", [True, False])
def test_autocast_gives_what_a_linear_layer_gives(bias: bool) -> None:
    layer, x = shuffled(bias, torch.float32), torch.randn(2, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == nn.Linear(7, 5)(x).dtype == torch.bfloat16


def test_in_bfloat16_the_index_stays_whole_numbers() -> None:
    layer = shuffled().bfloat16()
    assert layer.index.dtype == torch.int32
    assert layer(torch.randn(2, 7, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_copy_is_the_same_and_its_own() -> None:
    layer, x = shuffled(), torch.randn(2, 7, dtype=torch.float64)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    twin.index.copy_(torch.arange(5))
    assert layer.index.tolist() == [3, 0, 4, 2, 1]


def test_empty_on_the_meta_device_and_filled_afterwards() -> None:
    layer, x = shuffled(), torch.randn(2, 7, dtype=torch.float64)
    with torch.device("meta"):
        empty = PivotedLinear(7, 5, 3, dtype=torch.float64)
    assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(layer.state_dict())
    assert torch.equal(filled(x), layer(x))


def test_repr_tells_the_sizes() -> None:
    assert repr(PivotedLinear(7, 5, 3)).startswith("PivotedLinear(\n  in_features=7, out_features=5, rank=3")
