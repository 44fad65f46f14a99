"""What allocations are told of the matrices: their own singular values, whatever the file and the layout."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.stacks import StoredStack
from lowrank_kit.compression.evidence import weight_evidence
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.errors import DoesNotFitError, LowRankError, UsageError
from lowrank_kit.linalg.spectrum import effective_rank, singular_values
from tests.families import build


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_singular_values_of_every_matrix(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    source = Checkpoint.open(tmp_path)
    evidence = weight_evidence(source)
    assert evidence.keys() == {unit.matrix.name for unit in source.units()}
    plain = [unit.matrix for unit in source.units() if not isinstance(unit, StoredStack)]
    for matrix in plain:
        values = evidence[matrix.name].singular_values
        assert values is not None
        expected = singular_values(model.get_submodule(matrix.name).weight.detach())
        # Roots of eigenvalues of a Gram in float64: 1e-8 of the largest.
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-7 * expected[0].item())


def test_effective_ranks_become_ranks(tmp_path: Path) -> None:
    model = build("llama")
    with torch.no_grad():
        for block in model.model.layers:
            gate = block.mlp.gate_proj.weight
            gate.copy_(gate[:, :3] @ torch.randn(3, gate.shape[1]))  # of rank 3
    model.save_pretrained(tmp_path / "dense")
    settings = CompressSettings(keep=0.5, objective="plain", allocation="erank")
    report = compress(tmp_path / "dense", tmp_path / "out", settings)
    rows = {row["matrix"]: row for row in report["matrices"]}
    even = {
        row["matrix"]: row
        for row in compress(tmp_path / "dense", tmp_path / "even", CompressSettings(keep=0.5, objective="plain"))[
            "matrices"
        ]
    }
    for name, row in rows.items():
        erank = effective_rank(singular_values(model.get_submodule(name).weight.detach()))
        if row["role"] == "gate":
            assert erank <= 3
            assert row["rank"] == math.ceil(even[name]["rank"] / 2)  # the floor
            assert row["relative_error"] < 1e-6
        else:
            assert row["form"] == "dense" or row["rank"] >= even[name]["rank"]
    assert report["totals"]["matrix_keep"] <= 0.5
    card = (tmp_path / "out" / "README.md").read_text()
    assert "0.5 of the numbers of the matrices" in card
    assert "erank" in card


def test_nothing_is_read_for_a_budget_that_does_not_fit(tmp_path: Path) -> None:
    folder = broken(tmp_path)
    with pytest.raises(DoesNotFitError):
        compress(folder, tmp_path / "out", CompressSettings(params=1, allocation="erank"))


def test_nan_in_a_matrix(tmp_path: Path) -> None:
    folder = broken(tmp_path)
    with pytest.raises(LowRankError, match=r"NaN or Inf in model.layers.1.self_attn.v_proj.weight: 1 of 512 numbers"):
        compress(folder, tmp_path / "out", CompressSettings(keep=0.5, allocation="erank"))
    assert not (tmp_path / "out").exists()


def broken(tmp_path: Path) -> Path:
    """A Llama with a NaN in one matrix."""
    build("llama").save_pretrained(tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][3, 4] = math.nan
    save_file(tensors, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "dense"


def test_compressed_already(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "dense")
    compress(tmp_path / "dense", tmp_path / "once", CompressSettings(keep=0.5, objective="plain"))
    assert "quantization_config" in json.loads((tmp_path / "once" / "config.json").read_text())
    with pytest.raises(UsageError, match="is compressed already"):
        compress(tmp_path / "once", tmp_path / "twice", CompressSettings(keep=0.5, allocation="erank"))
