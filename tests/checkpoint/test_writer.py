"""Bytes are known before they are written: `shard_bytes` against the safetensors library itself."""

from __future__ import annotations

import itertools
import json
import math
import resource
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lowrank_kit.checkpoint.headers import DTYPE_BITS, TensorHeader, headers_by_name, read_shards
from lowrank_kit.checkpoint.reading import TORCH_DTYPES, described
from lowrank_kit.checkpoint.writer import (
    DTYPE_ORDER,
    METADATA,
    Shard,
    TensorSpec,
    is_damaged,
    plan_shards,
    shard_bytes,
    tensor_bytes,
    write_shard,
    write_shards,
    write_tensors,
)
from lowrank_kit.errors import LowRankError

# Name -> dtype and shape.
Specs = Mapping[str, tuple[str, tuple[int, ...]]]
# Everything JSON has to escape, what it must not, more than one byte of UTF-8, and more than one unit of UTF-16.
NAMES = st.text(st.sampled_from('ab.0"\\/\n\t\x01\x7fé日🙂'), min_size=1, max_size=12)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 40]), max_size=3).map(tuple)
# A pair of numbers of four bits is one of torch's.
KINDS = st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), SHAPES).filter(
    lambda kind: kind[0] != "F4" or (kind[1] != () and kind[1][-1] % 2 == 0)
)
SPECS = st.dictionaries(NAMES, KINDS, min_size=1, max_size=12)


def tensor_of(dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Random bytes; zeros and ones of truth values."""
    raw = torch.randint(0, 2 if dtype == "BOOL" else 256, (tensor_bytes(dtype, shape),), dtype=torch.uint8)
    shape = (*shape[:-1], shape[-1] // 2) if dtype == "F4" else shape
    return raw.view(TORCH_DTYPES[dtype]).reshape(shape)


def tensors_of(specs: Specs) -> dict[str, Tensor]:
    return {name: tensor_of(*kind) for name, kind in specs.items()}


def headers_of(specs: Specs) -> list[TensorHeader]:
    return [TensorHeader(n, dtype, shape, "f", tensor_bytes(dtype, shape), 0) for n, (dtype, shape) in specs.items()]


@settings(deadline=None, derandomize=True, max_examples=150)
@given(SPECS)
def test_shard_bytes_is_the_size_of_the_file(specs: Specs) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        save_file(tensors_of(specs), path, metadata=METADATA)
        assert shard_bytes(headers_of(specs)) == path.stat().st_size


@settings(deadline=None, derandomize=True, max_examples=150)
@given(SPECS, st.randoms(use_true_random=False))
def test_what_is_written_is_what_the_library_writes(specs: Specs, random: Random) -> None:
    """Byte for byte, whatever the order in which the tensors come."""
    tensors = tensors_of(specs)
    order = list(tensors)
    with TemporaryDirectory() as name:
        folder = Path(name)
        save_file(tensors, folder / "library", metadata=METADATA)
        (shard,) = plan_shards([[(name, *kind)] for name, kind in specs.items()])
        random.shuffle(order)
        write_shard(folder, shard, ((name, tensors[name]) for name in order))
        assert (folder / shard.file).read_bytes() == (folder / "library").read_bytes()
        assert {path.name for path in folder.iterdir()} == {"library", shard.file}


def test_every_dtype_is_written_as_the_library_writes_it(tmp_path: Path) -> None:
    specs = {f"{dtype}{size}": (dtype, (size, 6)) for dtype in TORCH_DTYPES for size in (0, 3)}
    tensors = tensors_of(specs)
    save_file(tensors, tmp_path / "library", metadata=METADATA)
    (shard,) = plan_shards([[(name, *kind)] for name, kind in specs.items()])
    write_shard(tmp_path, shard, tensors.items())
    assert (tmp_path / shard.file).read_bytes() == (tmp_path / "library").read_bytes()


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
    return [[(name, *described(tensor))] for name, tensor in tensors.items()]


def write(folder: Path, tensors: dict[str, Tensor], most: int) -> list[Shard]:
    shards = plan_shards(as_groups(tensors), max_shard_bytes=most)
    write_shards(folder, shards, lambda shard: ((header.name, tensors[header.name]) for header in shard.headers))
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
    # The headers on disk, read back, are those of the plan, with their places in the files.
    assert headers_by_name(read_shards(tmp_path).values()) == {
        header.name: header for shard in shards for header in shard.headers
    }


def test_index(tmp_path: Path) -> None:
    shards = write(tmp_path, {"a": torch.zeros(10), "b": torch.zeros(20), "c": torch.zeros(5)}, 100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    first, second = (shard.file for shard in shards)
    assert index == {"metadata": {"total_size": 140}, "weight_map": {"a": first, "b": second, "c": second}}


def test_a_single_file_has_no_index(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.zeros(10)}, 100)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


TWO: list[list[TensorSpec]] = [[("a", "F32", (4,)), ("b", "BF16", (2, 3))]]
A, B = torch.ones(4), torch.ones(2, 3).bfloat16()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([("a", A)], "1 of 2 tensors are missing, first b"),
        ([], "2 of 2 tensors are missing, first a"),
        ([("a", A), ("b", B), ("a", A)], "tensor a came twice"),
        ([("a", A), ("c", B)], "tensor c is not planned"),
        ([("a", A.double())], r"tensor a is \('F64', \(4,\)\), planned was \('F32', \(4,\)\)"),
        ([("b", B.T)], r"tensor b is \('BF16', \(3, 2\)\), planned was \('BF16', \(2, 3\)\)"),
    ],
)
def test_what_was_not_planned_is_not_written(tmp_path: Path, given: list[tuple[str, Tensor]], message: str) -> None:
    (shard,) = plan_shards(TWO)
    with pytest.raises(ValueError, match=rf"model\.safetensors: {message}"):
        write_shard(tmp_path, shard, given)
    assert not list(tmp_path.iterdir())


def test_one_tensor_is_alive_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in "abc":
            assert not any(one() is not None for one in alive)
            tensor = torch.full((100,), ord(name), dtype=torch.uint8)
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    (shard,) = plan_shards([[(name, "U8", (100,))] for name in "abc"])
    write_shard(tmp_path, shard, tensors())
    assert len(alive) == 3


def test_an_error_half_way_leaves_what_was_finished(tmp_path: Path) -> None:
    shards = plan_shards([[("a", "U8", (100,))], [("b", "U8", (100,))]], max_shard_bytes=100)

    def fill(shard: Shard) -> Iterator[tuple[str, Tensor]]:
        if shard is shards[1]:
            raise KeyboardInterrupt
        yield "a", torch.ones(100, dtype=torch.uint8)

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, shards, fill)
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == {shards[0].file: shards[0].nbytes}


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of more than 20 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_for_which_there_is_no_room(tmp_path: Path, small_files: None) -> None:
    shards = plan_shards([[("a", "U8", (10_000,))], [("b", "U8", (30_000,))]], max_shard_bytes=10_000)
    tensors = {"a": torch.ones(10_000, dtype=torch.uint8), "b": torch.ones(30_000, dtype=torch.uint8)}
    match = rf"{shards[1].file}: File too large: it takes {shards[1].nbytes:,} bytes, [\d,]+ are free"
    with pytest.raises(LowRankError, match=match) as caught:
        write_shards(tmp_path, shards, lambda shard: [(h.name, tensors[h.name]) for h in shard.headers])
    assert "--max-shard-bytes" in str(caught.value.hint)
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == {shards[0].file: shards[0].nbytes}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
@pytest.mark.parametrize("size", [100, 10_000_000])
def test_a_full_disk(tmp_path: Path, size: int) -> None:
    (shard,) = plan_shards([[("a", "U8", (size,))]])
    (tmp_path / f".{shard.file}.tmp").symlink_to("/dev/full")
    match = rf"{shard.file}: No space left on device: it takes {shard.nbytes:,} bytes, [\d,]+ are free"
    with pytest.raises(LowRankError, match=match) as caught:
        write_shard(tmp_path, shard, [("a", torch.ones(size, dtype=torch.uint8))])
    assert "another disk" in str(caught.value.hint)
    assert not list(tmp_path.iterdir())


def test_transformers_loads_the_shards(tmp_path: Path, tiny_llama_folder: Path) -> None:
    tensors = load_file(tiny_llama_folder / "model.safetensors")
    assert len(write(tmp_path, tensors, 20_000)) > 3
    (tmp_path / "config.json").write_bytes((tiny_llama_folder / "config.json").read_bytes())
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, LlamaForCausalLM)
    assert not any(found.values())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def test_a_bit_that_changed_anywhere_is_seen(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 2), "b": torch.arange(5), "c": torch.tensor(1.5), "d": torch.ones(0, 4)}
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors, {"told": "of tensors"})
    assert not is_damaged(path)
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert is_damaged(path), place
    for end in range(len(data)):
        path.write_bytes(data[:end])
        assert is_damaged(path), end
    save_file(tensors, path)  # of somebody else
    assert is_damaged(path)
