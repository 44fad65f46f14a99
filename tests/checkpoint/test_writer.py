"""Bytes are known before they are written: `shard_bytes` against the safetensors library itself."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lowrank_kit.checkpoint.headers import DTYPE_BITS, TensorHeader, read_headers
from lowrank_kit.checkpoint.writer import (
    DTYPE_ORDER,
    METADATA,
    Shard,
    TensorSpec,
    plan_shards,
    shard_bytes,
    tensor_bytes,
    write_shards,
)

# safetensors' word -> torch's dtype, for what torch can hold.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
# Name -> dtype and shape.
Specs = Mapping[str, tuple[str, tuple[int, ...]]]
# Everything JSON has to escape, what it must not, more than one byte of UTF-8, and more than one unit of UTF-16.
NAMES = st.text(st.sampled_from('ab.0"\\/\n\t\x01\x7fé日🙂'), min_size=1, max_size=12)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 40]), max_size=3).map(tuple)
SPECS = st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES), min_size=1, max_size=12)


def tensors_of(specs: Specs) -> dict[str, Tensor]:
    return {name: torch.zeros(shape, dtype=DTYPES[dtype]) for name, (dtype, shape) in specs.items()}


def headers_of(specs: Specs) -> list[TensorHeader]:
    return [TensorHeader(n, dtype, shape, "f", tensor_bytes(dtype, shape)) for n, (dtype, shape) in specs.items()]


@settings(deadline=None, derandomize=True, max_examples=150)
@given(SPECS)
def test_shard_bytes_is_the_size_of_the_file(specs: Specs) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        save_file(tensors_of(specs), path, metadata=METADATA)
        assert shard_bytes(headers_of(specs)) == path.stat().st_size


def test_shard_bytes_where_the_order_of_equal_sizes_counts(tmp_path: Path) -> None:
    # bfloat16 goes before float16 whatever the names: "a" of 10 bytes first or last, its offsets have more digits.
    specs = {"a": ("F16", (5,)), **{f"b{i}": ("BF16", (45,)) for i in range(11)}}
    save_file(tensors_of(specs), tmp_path / "x", metadata=METADATA)
    assert shard_bytes(headers_of(specs)) == (tmp_path / "x").stat().st_size


def test_shard_bytes_of_many_tensors(tmp_path: Path) -> None:
    specs = {f"model.layers.{i}.self_attn.q_proj.weight": ("BF16", (i % 7, 3)) for i in range(3000)}
    save_file(tensors_of(specs), tmp_path / "x", metadata=METADATA)
    assert shard_bytes(headers_of(specs)) == (tmp_path / "x").stat().st_size


def test_every_dtype_has_a_place() -> None:
    assert set(DTYPE_ORDER) == set(DTYPE_BITS)
    assert len(DTYPE_ORDER) == len(DTYPE_BITS)


GROUPS = st.lists(
    st.lists(st.integers(0, 30), min_size=1, max_size=3), min_size=1, max_size=10
)  # numbers of bytes of the tensors of each group


@settings(deadline=None, derandomize=True)
@given(GROUPS, st.integers(1, 60))
def test_plan_keeps_order_and_groups_and_fills_files(sizes: list[list[int]], most: int) -> None:
    groups: list[list[TensorSpec]] = [
        [(f"{i}.{j}", "U8", (size,)) for j, size in enumerate(group)] for i, group in enumerate(sizes)
    ]
    shards = plan_shards(groups, max_shard_bytes=most)
    in_files = [[header.name for header in shard.headers] for shard in shards]
    assert [name for names in in_files for name in names] == [name for group in groups for name, _, _ in group]
    file_of = {header.name: shard.file for shard in shards for header in shard.headers}
    for group in groups:
        assert len({file_of[name] for name, _, _ in group}) == 1
    group_bytes = {group[0][0]: sum(map(math.prod, (shape for _, _, shape in group))) for group in groups}
    for shard in shards:
        here = [group_bytes[header.name] for header in shard.headers if header.name in group_bytes]
        assert sum(here) <= most or len([size for size in here if size]) == 1
    # No file could have taken the first group of the next one.
    for shard, after in itertools.pairwise(shards):
        assert sum(header.nbytes for header in shard.headers) + group_bytes[after.headers[0].name] > most
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert [shard.file for shard in shards] == names
    assert all(header.file == shard.file for shard in shards for header in shard.headers)


def as_groups(tensors: dict[str, Tensor]) -> list[list[TensorSpec]]:
    words = {dtype: word for word, dtype in DTYPES.items()}
    return [[(name, words[tensor.dtype], tuple(tensor.shape))] for name, tensor in tensors.items()]


def write(folder: Path, tensors: dict[str, Tensor], most: int) -> list[Shard]:
    shards = plan_shards(as_groups(tensors), max_shard_bytes=most)
    write_shards(folder, shards, lambda shard: {header.name: tensors[header.name] for header in shard.headers})
    return shards


@pytest.mark.parametrize("most", [10**9, 200], ids=["one-file", "many-files"])
def test_what_is_written_is_what_was_planned(tmp_path: Path, most: int) -> None:
    tensors = {
        "a": torch.randn(8, 6),
        "transposed": torch.randn(6, 8).mT,
        "slice": torch.randn(4, 10)[:, :3],
        "bf16": torch.randn(5).bfloat16(),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4, dtype=torch.float16),
        "flags": torch.tensor([True, False]),
    }
    shards = write(tmp_path, tensors, most)
    files = {path.name: path.stat().st_size for path in tmp_path.glob("*.safetensors")}
    assert files == {shard.file: shard.nbytes for shard in shards}
    loaded = {name: tensor for file in files for name, tensor in load_file(tmp_path / file).items()}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    # The headers on disk, read back, are those of the plan.
    assert read_headers(tmp_path) == {header.name: header for shard in shards for header in shard.headers}


def test_index(tmp_path: Path) -> None:
    shards = write(tmp_path, {"a": torch.zeros(10), "b": torch.zeros(20), "c": torch.zeros(5)}, 100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    first, second = (shard.file for shard in shards)
    assert index == {"metadata": {"total_size": 140}, "weight_map": {"a": first, "b": second, "c": second}}


def test_a_single_file_has_no_index(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.zeros(10)}, 100)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_transformers_loads_the_shards(tmp_path: Path, tiny_llama_folder: Path) -> None:
    tensors = load_file(tiny_llama_folder / "model.safetensors")
    assert len(write(tmp_path, tensors, 20_000)) > 3
    (tmp_path / "config.json").write_bytes((tiny_llama_folder / "config.json").read_bytes())
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, LlamaForCausalLM)
    assert not any(found.values())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
