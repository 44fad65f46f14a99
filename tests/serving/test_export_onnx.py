"""A model as one ONNX graph: its experts, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.errors import CheckFailedError, UsageError
from lowrank_kit.layers import LowRankExperts
from lowrank_kit.serving.export import export
from lowrank_kit.serving.exports import onnx as exports_onnx
from lowrank_kit.serving.exports.base import ExportSettings
from tests.families import FAMILIES, build, build_from

ONNX = ExportSettings(to="onnx")


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block of GPT-2, with two factors for each matrix."""
    folder = tmp_path_factory.mktemp("models")
    build_from(FAMILIES["gpt2"](n_layer=1)).save_pretrained(folder / "dense")
    compress(folder / "dense", folder / "small", CompressSettings(keep=0.6, objective="plain"))
    return folder / "small"


def test_experts_without_asking_where_tokens_go() -> None:
    model: Any = build("mixtral")
    experts = LowRankExperts(model.model.layers[0].mlp.experts)
    stack = experts.factorize("gate_up_proj", 5)
    for factor in (stack.A, stack.B):
        torch.nn.init.normal_(factor, std=0.2)
    x = torch.randn(7, 32)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(7)])
    weights = torch.rand(7, 2)
    torch.testing.assert_close(exports_onnx.batched_experts(experts, x, index, weights), experts(x, index, weights))
    assert not exports_onnx.batched_experts(experts, x, index, weights).allclose(experts(x, index.flip(1), weights))


def test_a_graph_with_other_logits_is_refused(
    compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports_onnx, "_write_graph", lambda model, path: exports_onnx._compare(model, path))

    class Session:
        def __init__(self, *args: Any, **options: Any) -> None: ...

        def run(self, names: list[str], inputs: dict[str, Any]) -> list[Any]:
            return [torch.zeros(*inputs["input_ids"].shape, 100).numpy()]

    monkeypatch.setattr(pytest.importorskip("onnxruntime"), "InferenceSession", Session)
    with pytest.raises(CheckFailedError, match="other logits than the model: they differ by 1 of the largest"):
        export(compressed, tmp_path / "out", ONNX)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_without_a_package(package: str, compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None if name == package else sys)
    with pytest.raises(UsageError, match=f"--to onnx needs the package {package}, which is not installed") as caught:
        export(compressed, tmp_path / "out", ONNX)
    assert caught.value.hint == "pip install 'lowrank-kit[onnx]'"


def test_a_number_format_that_it_has_not(compressed: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no products of bfloat16"):
        export(compressed, tmp_path / "out", ExportSettings(to="onnx", dtype="bfloat16"))
