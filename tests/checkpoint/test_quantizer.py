"""What folders of several forms of storage say of themselves; how one loads is in test_loading.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowrank_kit.checkpoint.quantizer import FORMS, LowRankConfig, needed_version
from lowrank_kit.compression import forms
from lowrank_kit.layers import INT8, LAYERS, STACKED, exchange_linear
from lowrank_kit.matrices import find_matrices
from tests.families import build, token_ids


def test_every_form_that_is_written_has_a_version_and_a_layer() -> None:
    assert forms.TITLES.keys() == {*forms.FORMS, STACKED} == {*LAYERS, STACKED}
    # Codes are written by an export.
    assert FORMS.keys() == {*LAYERS, STACKED, *(f"{form}{INT8}" for form in LAYERS)}


@pytest.mark.parametrize(
    ("stored", "version"),
    [
        *(([], 1), (["factors"], 1), (["factors", "pivoted"], 2), (["pivoted", "factors"], 2), (["stacked"], 3)),
        *((["factors-int8"], 4), (["stacked", "pivoted-int8"], 4)),
    ],
)
def test_the_lowest_version_that_will_do(stored: list[str], version: int) -> None:
    matrices = {f"m{i}": {"rank": 3, "form": form} for i, form in enumerate(stored)}
    assert needed_version(matrices) == version
    assert LowRankConfig(matrices).to_dict()["format_version"] == version
    # What a folder says is kept where it is enough.
    assert LowRankConfig(matrices, format_version=2).format_version == max(2, version)


@pytest.mark.parametrize(("form", "version"), [("pivoted", 2), ("factors-int8", 4)])
def test_what_stands_beside_a_pivoted_layer_stays_whole(form: str, version: int, tmp_path: Path) -> None:
    """The output of a pivoted q is whole, so attention has all heads, and o reads all of them."""
    model = build("qwen3")
    forms = {matrix.name: "factors" for matrix in find_matrices(model)} | {"model.layers.1.self_attn.q_proj": form}
    for name, form in forms.items():
        exchange_linear(model, name, 8, form)
    model.config.quantization_config = LowRankConfig({name: {"rank": 8, "form": form} for name, form in forms.items()})
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["format_version"] == version
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids=token_ids()).logits, model(input_ids=token_ids()).logits)
    plan = loaded.tp_plan
    assert not [name for name in plan if "self_attn" in name]
    assert plan["model.layers.*.mlp.up_proj.B"] == "colwise"
