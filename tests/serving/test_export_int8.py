"""Factors as 8-bit codes: what they are, loaded and saved again, and what does not take them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from lowrank_kit.checkpoint import quantizer
from lowrank_kit.checkpoint.agreement import agreed
from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.evaluation.flops import token_flops
from lowrank_kit.layers import Int8Linear
from lowrank_kit.layers.int8 import LARGEST_CODE, to_codes
from lowrank_kit.serving.checks import check_matrices
from lowrank_kit.serving.export import export
from lowrank_kit.serving.exports.base import ExportSettings
from lowrank_kit.training.model import build_model
from lowrank_kit.training.settings import TrainSettings
from tests.compression.folders import once
from tests.families import token_ids
from tests.serving.folders import logits, make_compressed

INT8 = ExportSettings(to="int8")
# Two factors of float32 with biases, pivoted of bfloat16, experts beside them.
NAMES = ("gpt2", "llama_tied", "mixtral", "llama_head")


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`compressed(name)`: a folder to export. Read only."""
    return once(tmp_path_factory.mktemp("compressed"), make_compressed)


@pytest.fixture(scope="module")
def int8(compressed: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`int8(name)`: the same exported."""
    return once(tmp_path_factory.mktemp("int8"), lambda name, folder: export(compressed(name), folder, INT8))


def test_codes() -> None:
    W = torch.randn(6, 40) * torch.tensor([1.0, 1e3, 1e-3, 0.0, 1.0, 1.0])[:, None]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        codes, scale = to_codes(W, dtype)
        assert (codes.dtype, scale.dtype, scale.shape) == (torch.int8, dtype, (6, 1))
        # Half a step; the scale is rounded up or down, so that the largest number may be cut by as much again.
        wrong = (codes.double() * scale.double() - W.double()).abs()
        step = W.abs().amax(1, keepdim=True).double() / LARGEST_CODE
        assert (wrong <= 0.5 * step * 1.01 + LARGEST_CODE * step * torch.finfo(dtype).eps).all()
        assert codes.abs().amax(1).tolist() == [127, 127, 127, 0, 127, 127]


def test_a_layer() -> None:
    linear = nn.Linear(12, 7)
    layer = Int8Linear(12, 7, bias=True)
    layer.codes, layer.scale = to_codes(linear.weight.detach(), torch.float32)
    assert layer.bias is not None
    layer.bias.data = linear.bias.data
    x = torch.randn(3, 12)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, linear.bias))
    assert 0 < (layer(x) - linear(x)).abs().max() < 0.02
    assert set(layer.state_dict()) == {"codes", "scale", "bias"}


@pytest.mark.parametrize("name", NAMES)
def test_loaded_and_saved(
    name: str, compressed: Callable[[str], Path], int8: Callable[[str], Path], tmp_path: Path
) -> None:
    record = json.loads((int8(name) / "export.json").read_text())
    assert record["result"]["largest_error"] < 0.02
    sizes = [sum(path.stat().st_size for path in f(name).glob("*.safetensors")) for f in (compressed, int8)]
    assert sizes == [record["result"]["bytes_before"], record["result"]["bytes_after"]]
    assert sizes[1] < sizes[0]
    model, found = AutoModelForCausalLM.from_pretrained(int8(name), output_loading_info=True)
    assert not any(found.values())
    layers = sum(isinstance(module, Int8Linear) for module in model.modules())
    assert layers == 2 * len(record["matrices"])
    here, wanted = model(input_ids=token_ids()).logits.detach(), logits(compressed(name))
    assert here.dtype == wanted.dtype
    assert 0 < (here - wanted).norm() / wanted.norm() < 0.05
    model.save_pretrained(tmp_path / "again")
    again, first = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", int8(name)))
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], first[key]) for key in first)
    files = {path.name for path in int8(name).iterdir()}
    assert files == {path.name for path in compressed(name).iterdir()} - {"compression.jsonl"} | {"export.json"}


def test_errors_are_those_of_the_matrices(compressed: Callable[[str], Path], int8: Callable[[str], Path]) -> None:
    record = json.loads((int8("llama_tied") / "export.json").read_text())
    before, after = (agreed(Checkpoint.open(folder("llama_tied"))) for folder in (compressed, int8))
    weights = [dict(one.tensors()) for one in (before, after)]
    for row, old, new in zip(record["matrices"], before.matrices(), after.matrices(), strict=True):
        assert (new.form, old.form) == ("pivoted-int8", "pivoted")
        W, coded = (
            one.weight(*(of[name] for name in one.tensors)) for one, of in zip((old, new), weights, strict=True)
        )
        assert row["relative_error"] == pytest.approx(((coded - W).norm() / W.norm()).item(), rel=1e-4)
    assert token_flops(before) == token_flops(after)


def test_as_a_dense_folder(int8: Callable[[str], Path], tmp_path: Path) -> None:
    for name, tolerance in (("gpt2", 3e-5), ("llama_head", 3e-5), ("llama_tied", 0.1)):
        export(int8(name), tmp_path / name)
        torch.testing.assert_close(logits(tmp_path / name), logits(int8(name)), rtol=0, atol=tolerance)


def test_a_second_export_is_the_same_to_the_byte(
    compressed: Callable[[str], Path], int8: Callable[[str], Path], tmp_path: Path
) -> None:
    export(compressed("mixtral"), tmp_path / "again", INT8)
    first, again = (
        {path.name: path.read_bytes() for path in f.iterdir()} for f in (int8("mixtral"), tmp_path / "again")
    )
    assert again == first
    assert json.loads(first["export.json"])["notes"][-1] == "factors of experts stay as they are: 4 stacks"


def test_what_does_not_take_it(
    compressed: Callable[[str], Path],
    int8: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UsageError, match="has factors of 8-bit codes already"):
        export(int8("gpt2"), tmp_path / "out", INT8)
    with pytest.raises(UsageError, match="has no matrix that is stored as factors"):
        export(compressed("gpt2").with_name("gpt2-dense"), tmp_path / "out", INT8)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="c_attn has factors of 8-bit codes, which cannot be trained"):
        build_model(TrainSettings(model=str(int8("gpt2")), steps=1), None)
    quantization: dict[str, Any] = Checkpoint.open(int8("llama_tied")).config["quantization_config"]
    assert quantization["format_version"] == 4
    with pytest.raises(UsageError, match="factors of 8-bit codes are not for this engine"):
        check_matrices(quantization)
    # What an older lowrank-kit would say.
    monkeypatch.setattr(quantizer, "FORMAT_VERSION", 3)
    with pytest.raises(LowRankError, match="has format version 4, this lowrank-kit reads up to 3"):
        AutoModelForCausalLM.from_pretrained(int8("llama_tied"))
