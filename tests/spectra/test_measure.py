"""Spectra against numpy on the loaded model; compressed matrices, several shards, bad numbers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.headers import INDEX_FILE, SINGLE_FILE
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.spectra.measure import (
    MEASURES,
    MatrixSpectrum,
    Spectra,
    check_comparable,
    measure,
    singular_values_of_factors,
)
from tests.families import FAMILIES, build

Q = "model.layers.0.self_attn.q_proj"
# Two float64 decompositions of the same numbers differ by a few roundings of the largest singular value.
FLOAT64 = 1e-12


def spectra_of(folder: Path) -> Spectra:
    return measure(Checkpoint.open(folder), progress=False)


def changed(source: Path, target: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / SINGLE_FILE)
    edit(tensors)
    save_file(tensors, target / SINGLE_FILE)
    return target


def assert_same_values(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=0, atol=FLOAT64 * expected.max())


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral", "gpt_oss"])
def test_singular_values_are_those_numpy_finds_in_the_loaded_model(tmp_path: Path, family: str) -> None:
    """The model as transformers loads it is the oracle: W of a module, or the fused tensor's slice."""
    build(family).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    parameters = {name: parameter.double().detach().numpy() for name, parameter in model.named_parameters()}
    checkpoint = Checkpoint.open(tmp_path)
    rows = measure(checkpoint, progress=False).rows
    assert [row.name for row in rows] == [stored.matrix.name for stored in checkpoint.matrices()]
    for row, stored in zip(rows, checkpoint.matrices(), strict=True):
        W = parameters[stored.matrix.parameter]
        if row.expert is not None:
            half = stored.matrix.shape[0]
            W = W[row.expert]
            W = {"gate": W[:half], "up": W[half:]}.get(row.role, W)
        assert sorted(W.shape) == sorted(row.shape)
        assert_same_values(row.singular_values, np.linalg.svd(W, compute_uv=False))
        assert math.isclose(row.frobenius, np.linalg.norm(W), rel_tol=1e-12)


def test_the_measures_by_their_definitions(tiny_llama_folder: Path) -> None:
    for row in spectra_of(tiny_llama_folder).rows:
        s = row.singular_values
        p, energy = s / s.sum(), np.cumsum(s**2) / (s**2).sum()
        assert math.isclose(row.stable_rank, (s**2).sum() / s[0] ** 2, rel_tol=1e-12)
        assert math.isclose(row.effective_rank, math.prod(p**-p), rel_tol=1e-12)
        for share in (90, 95, 99):
            rank = getattr(row, f"rank_{share}")
            assert energy[rank - 1] >= share / 100 > ([0, *energy])[rank - 1]
        assert row.share("rank_90") == row.rank_90 / min(row.shape)


def test_a_known_spectrum(tmp_path: Path, tiny_llama_folder: Path) -> None:
    """Energy 16 + 4 + 1: shares .762, .952, 1; stable rank 21 / 16."""
    W = torch.zeros(32, 32)
    W[3, 7], W[5, 1], W[0, 0] = 4.0, -2.0, 1.0
    folder = changed(tiny_llama_folder, tmp_path / "m", lambda tensors: tensors.update({f"{Q}.weight": W}))
    row = spectra_of(folder).rows[0]
    assert (row.name, row.role, row.block, row.shape, row.factor_rank) == (Q, "q", 0, (32, 32), None)
    assert (row.rank_90, row.rank_95, row.rank_99, row.stable_rank) == (2, 2, 3, 21 / 16)
    assert_same_values(row.singular_values, np.array([4.0, 2.0, 1.0] + [0.0] * 29))


def test_a_zero_matrix_has_rank_zero_and_no_nan(tmp_path: Path, tiny_llama_folder: Path) -> None:
    zero = {f"{Q}.weight": torch.zeros(32, 32)}
    row = spectra_of(changed(tiny_llama_folder, tmp_path / "m", lambda tensors: tensors.update(zero))).rows[0]
    assert [getattr(row, name) for name in MEASURES] == [0.0, 0.0, 0, 0, 0]
    assert not row.singular_values.any()


@pytest.mark.parametrize("swap", [False, True], ids=["A first", "B first"])
def test_factors_in_two_shards(tmp_path: Path, tiny_llama_folder: Path, swap: bool) -> None:
    A, B = torch.randn(5, 32), torch.randn(32, 5)
    folder = shutil.copytree(tiny_llama_folder, tmp_path / "m")
    tensors = load_file(folder / SINGLE_FILE) | {f"{Q}.weight": torch.zeros(1), f"{Q}.A.weight": A}
    (folder / SINGLE_FILE).unlink()
    files = {"a.safetensors": tensors, "b.safetensors": {f"{Q}.B.weight": B}}
    if swap:
        files = {"b.safetensors": tensors, "a.safetensors": {f"{Q}.B.weight": B}}
    for file, content in files.items():
        save_file(content, folder / file)
    weight_map = {name: file for file, content in files.items() for name in content}
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))

    row, *others = spectra_of(folder).rows
    assert (row.name, row.factor_rank, row.shape) == (Q, 5, (32, 32))
    assert_same_values(row.singular_values, np.linalg.svd((B.double() @ A.double()).numpy(), compute_uv=False))
    assert not row.singular_values[5:].any()  # exactly zero, not noise
    assert all(other.factor_rank is None for other in others)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_pivoted_matrices(tmp_path: Path, family: str) -> None:
    """What numpy finds in the weights that the layers of the loaded model have, spread over several shards."""
    build(family).save_pretrained(tmp_path / "dense")
    settings = CompressSettings(keep=0.5, objective="plain", form="pivoted", max_shard_bytes=2_000)
    compress(tmp_path / "dense", tmp_path / "out", settings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").double()
    for row in spectra_of(tmp_path / "out").rows:
        layer = model.get_submodule(row.name)
        assert (row.factor_rank, row.shape) == (layer.rank, (layer.out_features, layer.in_features))
        W = layer.dense_weight().detach().numpy()
        assert_same_values(row.singular_values, np.linalg.svd(W, compute_uv=False))


@given(
    out=st.integers(1, 9),
    columns=st.integers(1, 9),
    rank=st.integers(1, 12),
    scale=st.sampled_from([0.0, 1e-20, 1.0, 1e20]),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_singular_values_of_factors(out: int, columns: int, rank: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    B = scale * torch.randn(out, rank, generator=generator, dtype=torch.float64)
    A = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    found, expected = singular_values_of_factors(B, A), torch.linalg.svdvals(B @ A)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= FLOAT64 * rank * expected.max()


@pytest.mark.parametrize(("value", "counts"), [(math.nan, "1 NaN and 0 Inf"), (-math.inf, "0 NaN and 1 Inf")])
@pytest.mark.parametrize("part", ["weight", "A.weight", "B.weight", "C.weight"])
def test_a_number_that_is_not_finite_is_named(
    tmp_path: Path, tiny_llama_folder: Path, value: float, counts: str, part: str
) -> None:
    name = "model.layers.1.mlp.up_proj"
    spoiled = {"weight": torch.zeros(80, 32)}
    if part != "weight":
        spoiled = {"weight": torch.zeros(1), "A.weight": torch.zeros(3, 32)}
        if part == "C.weight":
            spoiled |= {"C.weight": torch.zeros(77, 3), "index": torch.arange(80, dtype=torch.int32)}
        else:
            spoiled["B.weight"] = torch.zeros(80, 3)
    spoiled[part][1, 2] = value
    whole = {f"{name}.{key}": tensor for key, tensor in spoiled.items()}
    folder = changed(tiny_llama_folder, tmp_path / "m", lambda tensors: tensors.update(whole))
    with pytest.raises(LowRankError, match=f"matrix {name} holds {counts} among its {spoiled[part].numel():,} numbers"):
        spectra_of(folder)


def row_of(role: str, shape: tuple[int, int], rank: float) -> MatrixSpectrum:
    values = np.ones(min(shape))
    return MatrixSpectrum("n", role, 0, None, shape, None, values, 1.0, rank, rank, int(rank), int(rank), int(rank))


def test_summaries_are_plain_means_of_shares() -> None:
    spectra = Spectra("m", (row_of("q", (4, 8), 2.0), row_of("down", (10, 5), 1.0), row_of("q", (2, 2), 2.0)))
    q, down = spectra.by_role()
    assert (q.role, q.num_matrices, q.effective_rank_share, q.rank_90_share) == ("q", 2, 0.75, 0.75)
    assert (down.role, down.num_matrices, down.stable_rank_share) == ("down", 1, 0.2)
    everything = spectra.overall()
    assert (everything.role, everything.num_matrices) == ("all", 3)
    assert math.isclose(everything.effective_rank_share, (0.5 + 0.2 + 1.0) / 3)


def test_a_record_is_flat_and_fits_json(tiny_llama_folder: Path) -> None:
    record = spectra_of(tiny_llama_folder).rows[1].record()
    assert (record["out"], record["in"]) == (16, 32)
    assert {f"{name}_share" for name in MEASURES} <= set(record)
    assert "singular_values" not in record
    assert json.loads(json.dumps(record)) == record


def saved(folder: Path, family: str, **changes: Any) -> Checkpoint:
    config = FAMILIES[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return Checkpoint.open(folder)


def test_models_that_can_be_compared(tmp_path: Path) -> None:
    first = saved(tmp_path / "a", "llama")
    check_comparable(first, saved(tmp_path / "b", "llama", vocab_size=40))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "llama",
            {"num_hidden_layers": 3},
            r"7 matrices of .*b are not in .*a, first model\.layers\.2\.self_attn\.q_proj",
        ),
        (
            "llama",
            {"num_hidden_layers": 1},
            r"7 matrices of .*a are not in .*b, first model\.layers\.1\.self_attn\.q_proj",
        ),
        (
            "llama",
            {"intermediate_size": 64},
            r"matrix model\.layers\.0\.mlp\.gate_proj is 48 x 32 in .*a and 64 x 32 in .*b",
        ),
        ("gpt2", {}, r"14 matrices of .*a are not in .*b"),
    ],
)
def test_models_that_cannot_be_compared(tmp_path: Path, family: str, changes: dict[str, Any], message: str) -> None:
    first, second = saved(tmp_path / "a", "llama"), saved(tmp_path / "b", family, **changes)
    with pytest.raises(UsageError, match=message):
        check_comparable(first, second)
