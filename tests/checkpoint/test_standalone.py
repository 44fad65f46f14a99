"""Folders that carry the code of their layers: loaded without lowrank-kit, with it, and saved again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from lowrank_kit.checkpoint.quantizer import LowRankConfig, register
from lowrank_kit.checkpoint.standalone import MODULE, add_standalone, modeling_source
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.errors import UsageError
from lowrank_kit.layers import LowRankLinear
from tests.compression.folders import once
from tests.families import build, token_ids

KINDS = {"llama": "factors", "qwen2_tied": "pivoted", "mixtral": "factors", "gpt2": "factors"}
# Another process: without lowrank-kit, then with it, whose import comes second.
ELSEWHERE = """
import sys
top, *families = sys.argv[1:]
sys.modules["lowrank_kit"] = None
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
ids = load_file(f"{top}/ids.safetensors")["ids"]
for family in families:
    model = AutoModelForCausalLM.from_pretrained(f"{top}/{family}", trust_remote_code=True)
    save_file({"logits": model(input_ids=ids).logits.detach()}, f"{top}/{family}.safetensors")
    model.save_pretrained(f"{top}/{family}-saved")
del sys.modules["lowrank_kit"]
import lowrank_kit
from lowrank_kit.layers import LOW_RANK_LAYERS
ours = AutoModelForCausalLM.from_pretrained(f"{top}/llama")
assert any(isinstance(module, LOW_RANK_LAYERS) for module in ours.modules())
assert (ours(input_ids=ids).logits == load_file(f"{top}/llama.safetensors")["logits"]).all()
"""


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`compressed(family)`: a tiny random model of it, compressed."""
    root = tmp_path_factory.mktemp("compressed")

    def make(family: str, folder: Path) -> None:
        build(family).save_pretrained(root / f"{family}-dense")
        compress(root / f"{family}-dense", folder, CompressSettings(keep=0.6, objective="plain", form=KINDS[family]))

    return once(root, make)


def test_loads_without_lowrank_kit(compressed: Callable[[str], Path], tmp_path: Path) -> None:
    save_file({"ids": token_ids()}, tmp_path / "ids.safetensors")
    for family in KINDS:
        add_standalone(compressed(family), tmp_path / family)
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path), *KINDS],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for family in KINDS:
        expected = AutoModelForCausalLM.from_pretrained(compressed(family))(input_ids=token_ids()).logits
        assert torch.equal(load_file(tmp_path / f"{family}.safetensors")["logits"], expected)
        # Saved there it can be loaded here, without its code, and still carries it.
        saved = tmp_path / f"{family}-saved"
        assert (saved / f"{MODULE}.py").is_file()
        again: Any = AutoModelForCausalLM.from_pretrained(saved)
        assert type(again).__module__.startswith("transformers.")
        assert torch.equal(again(input_ids=token_ids()).logits, expected)


def test_where_lowrank_kit_is_imported_its_own_layers_are_taken(
    compressed: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = add_standalone(compressed("llama"), tmp_path / "alone")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    assert any(isinstance(module, LowRankLinear) for module in model.modules())
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["lowrank"] is LowRankConfig


def test_the_folder_is_the_same_but_for_its_code(compressed: Callable[[str], Path], tmp_path: Path) -> None:
    base = compressed("llama")
    folder = add_standalone(base, tmp_path / "alone")
    assert {file.name for file in folder.iterdir()} == {file.name for file in base.iterdir()} | {f"{MODULE}.py"}
    for file in base.iterdir():
        if file.name != "config.json":
            assert (folder / file.name).read_bytes() == file.read_bytes()
    assert (folder / "model.safetensors").stat().st_ino == (base / "model.safetensors").stat().st_ino
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("auto_map") == {
        "AutoConfig": f"{MODULE}.LlamaConfig",
        "AutoModelForCausalLM": f"{MODULE}.LlamaForCausalLM",
    }
    assert config == json.loads((base / "config.json").read_text())
    # Nothing is run of it where nobody says so.
    (folder / f"{MODULE}.py").write_text("raise RuntimeError('run')")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert any(isinstance(module, LowRankLinear) for module in model.modules())


def test_what_is_dense_needs_no_code(compressed: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is dense: it needs no code of its own"):
        add_standalone(compressed("llama").with_name("llama-dense"), tmp_path / "alone")
    assert not (tmp_path / "alone").exists()
    with pytest.raises(UsageError, match="has no NoSuchConfig"):
        modeling_source(config="NoSuchConfig", model="LlamaForCausalLM")


def test_the_code_is_that_of_this_package_and_of_nothing_else() -> None:
    source = modeling_source(config="LlamaConfig", model="LlamaForCausalLM")
    assert "from lowrank_kit" not in source
    assert "import lowrank_kit" not in source
    names = [line.split("(")[0].split(":")[0] for line in source.splitlines() if line.startswith(("class ", "def "))]
    assert len(names) == len(set(names)), "two modules define the same name"


def test_registered_by_another_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "lowrank", type("Other", (), {}))
    register()
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["lowrank"] is LowRankConfig
    register()
