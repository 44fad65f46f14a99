"""What every kind of export has to keep to, each in a row: loaded by its own tool it has the logits of the source."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowrank_kit import ExportSettings, export
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.errors import UsageError
from lowrank_kit.serving.exports import KINDS, find_kind
from tests.families import FAMILIES, build_from, token_ids


def by_transformers(folder: Path, base: Path, ids: Tensor, mask: Tensor) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids, attention_mask=mask).logits.detach()


def by_peft(folder: Path, base: Path, ids: Tensor, mask: Tensor) -> Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    return model(input_ids=ids, attention_mask=mask).logits.detach()


def by_onnxruntime(folder: Path, base: Path, ids: Tensor, mask: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0])


class Row(NamedTuple):
    """Of a kind: its tool, the largest error of logits over the largest logit, its files, and the rank it takes."""

    tool: Callable[[Path, Path, Tensor, Tensor], Tensor]
    tolerance: float
    files: set[str]
    rank: int | None = None


MODEL = {"config.json", "generation_config.json"}
ROWS = {
    "dense": Row(by_transformers, 3e-6, {*MODEL, "model.safetensors", "compression.json"}),
    "lora": Row(by_peft, 3e-6, {"adapter_config.json", "adapter_model.safetensors", "generation_config.json"}, 32),
    "onnx": Row(by_onnxruntime, 1e-5, {*MODEL, "model.onnx"}),
    "int8": Row(by_transformers, 3e-2, {*MODEL, "model.safetensors", "compression.json"}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, one block of GPT-2, and `small`, the same with two factors for each matrix."""
    top = tmp_path_factory.mktemp("models")
    build_from(FAMILIES["gpt2"](n_layer=1)).save_pretrained(top / "base")
    compress(top / "base", top / "small", CompressSettings(keep=0.6, objective="plain"))
    return top


@pytest.fixture(scope="module")
def exported(models: Path) -> Callable[[str], Path]:
    """`exported(kind)`: the folder, made once; to make a graph takes seconds."""

    def folder(kind: str) -> Path:
        if not (models / kind).exists():
            export(models / "small", models / kind, settings_of(kind, models), device="cpu")
        return models / kind

    return folder


def settings_of(kind: str, models: Path) -> ExportSettings:
    base = str(models / "base") if "base" in find_kind(kind).options else None
    return ExportSettings(to=kind, base=base, rank=ROWS[kind].rank)


def test_every_kind_has_a_row() -> None:
    assert ROWS.keys() == KINDS.keys()


@pytest.mark.parametrize("kind", ROWS)
def test_logits_by_its_own_tool(kind: str, models: Path, exported: Callable[[str], Path]) -> None:
    for batch, length in ((1, 1), (4, 9)):
        ids = token_ids(batch, length)
        mask = torch.ones_like(ids)
        mask[0, : length // 2] = 0
        wanted = by_transformers(models / "small", models, ids, mask)[mask.bool()]
        found = ROWS[kind].tool(exported(kind), models / "base", ids, mask)[mask.bool()]
        assert (found - wanted).abs().max() < ROWS[kind].tolerance * wanted.abs().max()
        dense = by_transformers(models / "base", models, ids, mask)[mask.bool()]
        assert (dense - wanted).abs().max() > 0.1 * wanted.abs().max()


@pytest.mark.parametrize("kind", ROWS)
def test_what_the_folder_says(kind: str, models: Path, exported: Callable[[str], Path]) -> None:
    folder = exported(kind)
    assert {path.name for path in folder.iterdir()} == {*ROWS[kind].files, "README.md", "export.json"}
    record = json.loads((folder / "export.json").read_text())
    assert (record["schema_version"], record["schema"]) == (1, "lowrank-export/1")
    assert (record["model"], record["settings"]["to"]) == (str(models / "small"), kind)
    assert record["notes"]
    weights = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".onnx")]
    assert record["result"]["bytes_after"] == weights[0].stat().st_size
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nbase_model: ")
    assert "small" in card
    # Nothing of this machine, but for what the user said.
    content = b"".join(path.read_bytes() for path in folder.iterdir()).replace(str(models).encode(), b"")
    for place in (Path(__file__).parents[2], Path(torch.__file__).parents[1]):
        assert str(place).encode() not in content


@pytest.mark.parametrize("kind", ROWS)
def test_an_output_that_is_there_stays_as_it_is(kind: str, models: Path, exported: Callable[[str], Path]) -> None:
    before = {path: path.stat().st_mtime_ns for path in exported(kind).iterdir()}
    with pytest.raises(UsageError, match="the output folder is not empty"):
        export(models / "small", exported(kind), settings_of(kind, models))
    assert {path: path.stat().st_mtime_ns for path in exported(kind).iterdir()} == before


def test_factors_are_two_products_of_the_graph(exported: Callable[[str], Path]) -> None:
    import onnx

    graph = onnx.load(exported("onnx") / "model.onnx").graph
    # Four matrices of two factors, the head, queries by keys and scores by values.
    assert Counter(node.op_type for node in graph.node)["MatMul"] == 4 * 2 + 1 + 2
