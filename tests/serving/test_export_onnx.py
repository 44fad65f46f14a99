"""A model as one ONNX graph, run by onnxruntime."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.errors import CheckFailedError, UsageError
from lowrank_kit.layers import LowRankExperts
from lowrank_kit.serving.export import export
from lowrank_kit.serving.exports import onnx as exports_onnx
from lowrank_kit.serving.exports.base import ExportSettings
from tests.families import FAMILIES, build, build_from, token_ids

ONNX = ExportSettings(to="onnx")


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block of GPT-2, with two factors for each matrix; to make a graph of more takes seconds more."""
    folder = tmp_path_factory.mktemp("models")
    build_from(FAMILIES["gpt2"](n_layer=1)).save_pretrained(folder / "dense")
    compress(folder / "dense", folder / "small", CompressSettings(keep=0.6, objective="plain"))
    return folder / "small"


def test_the_graph_has_the_logits_of_the_model(compressed: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    record = export(compressed, tmp_path / "out", ONNX)
    assert record["result"]["largest_difference"] < 1e-5
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"model.onnx", "config.json", "generation_config.json", "README.md", "export.json"}
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    model = AutoModelForCausalLM.from_pretrained(compressed).eval()
    for batch, length in ((1, 1), (4, 9)):
        ids = token_ids(batch, length)
        mask = torch.ones_like(ids)
        mask[0, : length // 2] = 0
        (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        wanted = model(input_ids=ids, attention_mask=mask).logits.detach()[mask.bool()]
        torch.testing.assert_close(torch.from_numpy(found)[mask.bool()], wanted, rtol=0, atol=2e-5)
    # Four matrices of two factors, the head, queries by keys and scores by values.
    graph = onnx.load(tmp_path / "out" / "model.onnx")
    assert Counter(node.op_type for node in graph.graph.node)["MatMul"] == 4 * 2 + 1 + 2
    assert str(Path(__file__).parents[2]) not in str(graph)


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
