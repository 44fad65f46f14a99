"""The fused layers of a serving engine, filled as an engine fills them, against the layers of the checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.layers import LowRankLinear, PivotedLinear
from lowrank_kit.serving.checks import check_matrices, refuse_head, refuse_sharded
from lowrank_kit.serving.fused import Part, apply, create_weights, finish, fused_linear, parts_of

IN = 12
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def layers(bias: bool) -> dict[str, nn.Module]:
    """q, k and v of different sizes, ranks and forms."""
    found = {
        "q": LowRankLinear(IN, 16, 5, bias=bias),
        "k": PivotedLinear(IN, 8, 3, bias=bias),
        "v": nn.Linear(IN, 8, bias=bias),
    }
    for layer in found.values():
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
    found["k"].register_buffer("index", torch.randperm(8).int())
    return found


def matrices() -> dict[str, dict[str, Any]]:
    return {"m.q_proj": {"rank": 5, "form": "factors"}, "m.k_proj": {"rank": 3, "form": "pivoted"}}


def load(layer: Any, name: str, tensor: Tensor, *shard: Any) -> None:
    """As vLLM does: the parameter of that name, its loader, and which part of a fused layer."""
    owner, _, leaf = name.rpartition(".")
    parameter = getattr(layer.get_submodule(owner), leaf)
    loader = getattr(parameter, "weight_loader", None)
    if loader is None:  # the engine's own, of its bias
        start = {"q": 0, "k": 16, "v": 24}[shard[0]]
        parameter.data[start : start + len(tensor)] = tensor
    else:
        loader(parameter, tensor, *shard)


def test_q_k_and_v_in_one() -> None:
    for bias in (False, True):
        source = layers(bias)
        parts = parts_of("m.qkv_proj", PACKED, matrices(), [16, 8, 8])
        assert [(part.name, part.form, part.rank) for part in parts] == [
            ("m.q_proj", "factors", 5),
            ("m.k_proj", "pivoted", 3),
            ("m.v_proj", "dense", 0),
        ]
        layer: Any = nn.Module()
        create_weights(layer, parts, IN, torch.float32)
        layer.bias = nn.Parameter(torch.full((32,), torch.nan)) if bias else None
        assert layer.A.weight.shape == (8, IN)
        # In any order, as the files have them.
        for shard in ("v", "k", "q"):
            for name, tensor in sorted(source[shard].state_dict().items(), reverse=True):
                load(layer, name, tensor, shard)
        finish(layer)
        finish(layer)
        x = torch.randn(2, 4, IN)
        expected = torch.cat([source[shard](x) for shard in ("q", "k", "v")], dim=-1)
        torch.testing.assert_close(apply(layer, x, layer.bias), expected)
        assert not any(parameter.requires_grad for name, parameter in layer.named_parameters() if name != "bias")


@pytest.mark.parametrize("form", [LowRankLinear, PivotedLinear])
def test_a_layer_of_one_part(form: Any) -> None:
    """As of o and down; and of what is fused in the checkpoint too, which has several outputs and one matrix."""
    source = form(IN, 16, 5, bias=True)
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    entry = {"rank": 5, "form": "factors" if form is LowRankLinear else "pivoted"}
    for prefix, sizes in (("m.o_proj", [16]), ("m.gate_up_proj", [8, 8])):
        layer: Any = nn.Module()
        create_weights(layer, parts_of(prefix, PACKED, {prefix: entry}, sizes), IN, torch.float32)
        layer.bias = nn.Parameter(source.bias.detach().clone() * (form is PivotedLinear))
        for name, tensor in source.state_dict().items():
            if name != "bias":  # the engine's own
                load(layer, name, tensor)
        finish(layer)
        x = torch.randn(3, IN)
        torch.testing.assert_close(apply(layer, x, layer.bias), source(x))


def test_one_product_with_all_a(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    linear = nn.functional.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        shapes.append(tuple(weight.shape))
        return linear(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", counted)
    fused_linear(torch.randn(1, IN), torch.randn(8, IN), [torch.randn(16, 5), torch.randn(8, 3)], [5, 3])
    assert shapes == [(8, IN), (16, 5), (8, 3)]


def filled(*left_out: str) -> Any:
    source = LowRankLinear(IN, 16, 5, bias=False)
    layer: Any = nn.Module()
    create_weights(layer, [Part("m.q_proj", 16, "factors", 5)], IN, torch.float32)
    for name, tensor in source.state_dict().items():
        if name not in left_out:
            load(layer, name, tensor)
    return layer


def test_what_does_not_fit() -> None:
    with pytest.raises(LowRankError, match=r"m\.q_proj: B is missing in the checkpoint"):
        finish(filled("B.weight"))
    layer = filled()
    with pytest.raises(LowRankError, match=r"m\.q_proj: A is \[4, 12\] in the checkpoint, \[5, 12\] by config\.json"):
        load(layer, "A.weight", torch.zeros(4, IN))
    with pytest.raises(LowRankError, match=r"the sentinel is \[16, 12\] in the checkpoint"):
        load(layer, "weight", torch.zeros(16, IN))
    with pytest.raises(LowRankError, match="a bias in the checkpoint and none in the engine"):
        load(layer, "B.bias", torch.zeros(16))
    fused: Any = nn.Module()
    create_weights(fused, parts_of("m.qkv_proj", PACKED, matrices(), [16, 8, 8]), IN, torch.float32)
    with pytest.raises(LowRankError, match="one A for several parts, 3 are wanted"):
        load(fused, "A.weight", torch.zeros(8, IN))
    with pytest.raises(LowRankError, match=r"C is \[4, 3\] in the checkpoint, \[5, 3\] by config\.json"):
        load(fused, "C.weight", torch.zeros(4, 3), "k")
    with pytest.raises(LowRankError, match="3 parts in the checkpoint, 2 in the engine"):
        parts_of("m.qkv_proj", PACKED, matrices(), [16, 16])


def test_what_an_engine_cannot_take() -> None:
    config = {"quant_method": "lowrank", "format_version": 2, "matrices": matrices()}
    assert check_matrices(config) == matrices()
    with pytest.raises(LowRankError, match="format version 99"):
        check_matrices({**config, "format_version": 99})
    with pytest.raises(UsageError, match=r"m\.experts\.down_proj: experts of low rank"):
        check_matrices({**config, "matrices": {"m.experts.down_proj": {"rank": 2, "form": "stacked"}}})
    refuse_sharded("m.q_proj", (12, 16), (12, 16))
    for here in ((6, 16), (12, 8)):
        with pytest.raises(UsageError, match=r"m\.q_proj: .* of 16 x 12 in this process"):
            refuse_sharded("m.q_proj", here, (12, 16))
    refuse_head("lm_head", matrices())
    with pytest.raises(UsageError, match="lm_head is factorized"):
        refuse_head("lm_head", {"lm_head": {"rank": 2, "form": "factors"}})
