"""The vLLM plugin: with vLLM where it can be imported, and everywhere against stand-ins for the few names it takes."""

from __future__ import annotations

import sys
from abc import ABC
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_kit.errors import UsageError
from lowrank_kit.layers import LowRankLinear
from lowrank_kit.serving.vllm import register

PREFIX = "model.layers.0.self_attn"
CONFIG: dict[str, Any] = {
    "quant_method": "lowrank",
    "format_version": 1,
    "matrices": {f"{PREFIX}.{name}": {"rank": 3, "form": "factors"} for name in ("q_proj", "k_proj")},
}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is registered, with modules that have what vLLM 0.33 has of the interface of plugins."""
    methods: list[str] = []
    found: dict[str, Any] = {}

    def register_quantization_config(name: str) -> Callable[[type], type]:
        def wrapper(config: type) -> type:
            methods.append(name)
            return found.setdefault(name, config)

        return wrapper

    class QuantizationConfig:
        def __init__(self) -> None:
            self.packed_modules_mapping: dict[str, list[str]] = {}

    kinds = {name: type(name, (nn.Module,), {}) for name in ("LinearBase", "UnquantizedLinearMethod")}
    contents: dict[str, dict[str, Any]] = {
        "layers.linear": {**kinds, "LinearMethodBase": ABC},
        "layers.quantization": {
            "QUANTIZATION_METHODS": methods,
            "register_quantization_config": register_quantization_config,
        },
        "layers.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
    }
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, values in contents.items():
        module = ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, f"vllm.model_executor.{name}", module)
    return {"found": found, "methods": methods, **kinds}


def test_a_fused_layer(registered: dict[str, Any]) -> None:
    register()
    register()
    assert registered["methods"] == ["lowrank"]
    config = registered["found"]["lowrank"].from_config(CONFIG)
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    layer: Any = registered["LinearBase"]()
    method = config.get_quant_method(layer, f"{PREFIX}.qkv_proj")
    method.create_weights(layer, 12, [16, 8, 8], 12, 32, torch.float32, weight_loader=None)
    sources = [LowRankLinear(12, 16, 3, bias=False), LowRankLinear(12, 8, 3, bias=False), nn.Linear(12, 8, bias=False)]
    for shard, source in zip("qkv", sources, strict=True):
        for name, tensor in source.state_dict().items():
            owner, _, leaf = name.rpartition(".")
            parameter = getattr(layer.get_submodule(owner), leaf)
            parameter.weight_loader(parameter, tensor, shard)
    method.process_weights_after_loading(layer)
    x = torch.randn(5, 12)
    torch.testing.assert_close(method.apply(layer, x), torch.cat([source(x) for source in sources], dim=-1))
    with pytest.raises(UsageError, match="not split over devices"):
        method.create_weights(layer, 12, [8, 4, 4], 12, 32, torch.float32)


def test_what_is_not_factorized(registered: dict[str, Any]) -> None:
    register()
    config = registered["found"]["lowrank"].from_config(CONFIG)
    linear = registered["LinearBase"]()
    assert isinstance(config.get_quant_method(linear, f"{PREFIX}.o_proj"), registered["UnquantizedLinearMethod"])
    assert config.get_quant_method(nn.Embedding(2, 2), "model.embed_tokens") is None
    config.matrices["lm_head"] = {"rank": 3, "form": "factors"}
    with pytest.raises(UsageError, match="lm_head is factorized"):
        config.get_quant_method(nn.Embedding(2, 2), "lm_head")


def test_vllm_takes_it() -> None:
    quantization = pytest.importorskip("vllm.model_executor.layers.quantization", reason="vLLM is not installed")
    register()
    assert "lowrank" in quantization.QUANTIZATION_METHODS
    config = quantization.get_quantization_config("lowrank").from_config(CONFIG)
    assert config.get_name() == "lowrank"
