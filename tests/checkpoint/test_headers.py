"""Headers are what the safetensors library says they are, and damage is found before any work."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from lowrank_kit.checkpoint.headers import INDEX_FILE, SINGLE_FILE, TensorHeader, headers_by_name, read_shards
from lowrank_kit.errors import LowRankError, UsageError

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def read_headers(folder: Path | str) -> dict[str, TensorHeader]:
    return headers_by_name(read_shards(folder).values())


def raw_file(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: list[Any], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.bfloat16)}, tmp_path / SINGLE_FILE)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, tmp_path / FIRST)
    save_file({"c": torch.zeros(2, 2)}, tmp_path / SECOND)
    write_index(tmp_path, {"a": FIRST, "b": FIRST, "c": SECOND})
    return tmp_path


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_headers_say_what_the_library_says(tmp_path: Path, tiny_llama: Callable[..., Any], max_shard_size: str) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size=max_shard_size)
    headers = read_headers(tmp_path)
    seen = set()
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a dict
                tensor, header = shard.get_tensor(name), headers[name]
                assert (header.name, header.shape, header.file) == (name, tuple(tensor.shape), file.name)
                assert header.dtype == shard.get_slice(name).get_dtype()
                assert header.nbytes == tensor.nbytes
                raw = file.read_bytes()[header.offset : header.offset + header.nbytes]
                assert raw == tensor.view(torch.uint8).numpy().tobytes()
                seen.add(name)
    assert seen == set(headers)


def test_order_is_that_of_the_shards_and_their_bytes(sharded: Path) -> None:
    text = raw_file({"z": entry("U8", [2], 0, 2), "__metadata__": {}, "a": entry("U8", [1], 2, 3)}, b"123")
    (sharded / SECOND).write_bytes(text)
    save_file({"y": torch.zeros(1)}, sharded / FIRST)
    write_index(sharded, {"a": SECOND, "z": SECOND, "y": FIRST})
    assert list(read_headers(sharded)) == ["y", "z", "a"]


def test_a_single_file_wins_over_an_index(sharded: Path) -> None:
    save_file({"only": torch.zeros(1)}, sharded / SINGLE_FILE)
    assert list(read_headers(sharded)) == ["only"]


@pytest.mark.parametrize(
    ("file", "hint"),
    [("pytorch_model.bin", "convert"), ("adapter_model.safetensors", "adapter"), ("x", "save_pretrained")],
)
def test_a_folder_without_safetensors(tmp_path: Path, file: str, hint: str) -> None:
    (tmp_path / file).touch()
    with pytest.raises(UsageError, match=r"no model\.safetensors") as caught:
        read_headers(tmp_path)
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize("change", [-1, 1, -60], ids=["one byte short", "one byte more", "half the data"])
def test_a_file_of_the_wrong_size(single: Path, change: int) -> None:
    path = single / SINGLE_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:change] if change < 0 else whole + b"\0")
    with pytest.raises(LowRankError, match=rf"model\.safetensors: {len(whole) + change} bytes, .* {len(whole)}\n"):
        read_headers(single)


GOOD = entry("F32", [2], 0, 8)
DAMAGED = {
    "empty": (b"", "0 bytes, too short"),
    "absurd length": (raw_file({}, length=2**63), r"header is 9223372036854775808 bytes long, the file has 10"),
    "header longer than the file": (raw_file({}, length=3), "header is 3 bytes long, the file has 10"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    "not JSON": (raw_file(b'{"a": '), "not valid JSON"),
    "not UTF-8": (raw_file(b'{"\xff\xfe": 1}'), "not valid JSON"),
    "deep JSON": (raw_file(b"[" * 100_000), "not valid JSON"),
    "not an object": (raw_file(b"[1]"), "object is expected, found list"),
    "name twice": (raw_file(b'{"a": 1, "a": 2}'), "name 'a' occurs twice"),
    "dtype twice": (raw_file(b'{"a": {"dtype": "U8", "dtype": "I8"}}'), "name 'dtype' occurs twice"),
    "no offsets": (raw_file({"a": {"dtype": "F32", "shape": [2]}}, b"8" * 8), "tensor a has no proper"),
    "entry is a list": (raw_file({"a": [1, 2]}), "tensor a has no proper"),
    "unknown dtype": (raw_file({"a": entry("F7", [2], 0, 8)}, b"8" * 8), "tensor a has the unknown dtype 'F7'"),
    "negative side": (raw_file({"a": entry("F32", [-2, -1], 0, 8)}, b"8" * 8), r"tensor a has the shape \[-2, -1\]"),
    "fractional side": (raw_file({"a": entry("F32", [2.0], 0, 8)}, b"8" * 8), r"tensor a has the shape \[2.0\]"),
    "sides beyond 64 bits": (raw_file({"a": entry("F32", [10**400], 0, 8)}, b"8" * 8), r"tensor a has the shape \[10"),
    "numbers beyond 64 bits": (
        raw_file({"a": entry("F32", [2**62] * 300, 0, 8)}, b"8" * 8),
        r"tensor a has the shape \[4611686018427387904, ",
    ),
    "offsets backwards": (raw_file({"a": entry("F32", [2], 8, 0)}, b"8" * 8), "tensor a has no proper"),
    "offset is true": (raw_file({"a": entry("U8", [1], 0, True)}, b"8"), "tensor a has no proper"),
    "metadata of no text": (raw_file({"__metadata__": {"a": [0]}}), "__metadata__ is not text by name"),
    "UTF-16": (raw_file('{"a": 1}'.encode("utf-16")), "not valid JSON"),
    "shape and offsets differ": (raw_file({"a": entry("F32", [3], 0, 8)}, b"8" * 8), r"needs 12 bytes.*0\.\.8 hold 8"),
    "hole": (
        raw_file({"a": GOOD, "b": entry("U8", [1], 9, 10)}, b"8" * 10),
        "tensor b starts at byte 9, expected 8.*hole",
    ),
    "hole at the start": (raw_file({"b": entry("U8", [1], 1, 2)}, b"88"), "tensor b starts at byte 1, expected 0"),
    "overlap": (raw_file({"a": GOOD, "b": entry("U8", [2], 7, 9)}, b"8" * 9), "tensor b starts at byte 7.*overlaps"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(content)
    with pytest.raises(LowRankError, match=message) as caught:
        read_headers(tmp_path)
    assert SINGLE_FILE in caught.value.message
    assert caught.value.exit_code == 1


def test_numbers_of_less_than_a_byte(tmp_path: Path) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(raw_file({"a": entry("F4", [2, 3], 0, 3)}, b"123"))
    assert read_headers(tmp_path)["a"].nbytes == 3


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": FIRST, "b": FIRST, "c": SECOND, "d": FIRST}, "1 of the 4 tensors .* d is not in model-00001"),
        ({"a": FIRST, "b": SECOND, "c": SECOND}, "1 of the 3 tensors .* b is not in model-00002"),
        ({"a": FIRST, "c": SECOND}, "1 of the 3 tensors of the shards are not in .* b in model-00001"),
        ({"a": FIRST, "b": FIRST, "c": "model-3.safetensors"}, "1 of the 2 shards .* missing: model-3.safetensors"),
        ({}, "no weight_map"),
        ([FIRST], "no weight_map"),
    ],
)
def test_index_and_shards_disagree(sharded: Path, weight_map: object, message: str) -> None:
    write_index(sharded, weight_map)
    with pytest.raises(LowRankError, match=message):
        read_headers(sharded)


def test_a_name_twice_in_the_index(sharded: Path) -> None:
    (sharded / INDEX_FILE).write_text(f'{{"weight_map": {{"a": "{FIRST}", "b": "{FIRST}", "a": "{SECOND}"}}}}')
    with pytest.raises(LowRankError, match=rf"{INDEX_FILE}: the name 'a' occurs twice"):
        read_headers(sharded)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    save_file({"a": torch.zeros(1), "c": torch.zeros(1)}, sharded / SECOND)
    with pytest.raises(LowRankError, match=r"tensor a is in two shards, model-00001.* and model-00002"):
        read_headers(sharded)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "a/../../b", "..\\b", "C:\\b", "", 3, None])
def test_an_index_does_not_lead_out_of_the_folder(sharded: Path, file: object) -> None:
    save_file({"c": torch.zeros(1)}, sharded.parent / "outside.safetensors")
    write_index(sharded, {"a": FIRST, "b": FIRST, "c": file})
    with pytest.raises(LowRankError, match="not a file inside the folder"):
        read_headers(sharded)


FLIPS = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4)


@given(flips=FLIPS, cut=st.none() | st.integers(0, 400))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_a_damaged_file_is_refused_or_read_as_the_library_reads_it(
    flips: list[tuple[int, int]], cut: int | None
) -> None:
    """Never another exception, and nothing accepted that the library would stumble over half-way through the work."""
    with TemporaryDirectory() as name:
        path = Path(name, SINGLE_FILE)
        save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, path, metadata={"format": "pt"})
        content = bytearray(path.read_bytes())
        for position, byte in flips:
            content[position % len(content)] = byte
        path.write_bytes(content[:cut])
        try:
            headers = read_headers(name)
        except LowRankError:
            return
        with safe_open(path, framework="pt") as shard:
            assert set(shard.keys()) == headers.keys()
            for key, header in headers.items():
                assert shard.get_slice(key).get_dtype() == header.dtype
                assert tuple(shard.get_slice(key).get_shape()) == header.shape


def test_a_file_cut_anywhere_is_refused(single: Path) -> None:
    path = single / SINGLE_FILE
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(LowRankError, match=rf"{SINGLE_FILE}: "):
            read_headers(single)


@given(st.dictionaries(st.text(max_size=4), st.text(max_size=6) | st.just("x" * 300), min_size=1, max_size=3))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_index_is_refused_unless_it_is_right(weight_map: dict[str, str]) -> None:
    with TemporaryDirectory() as name:
        save_file({"a": torch.zeros(1)}, Path(name, "x"))
        write_index(Path(name), weight_map)
        try:
            assert read_headers(name).keys() == weight_map.keys() == {"a"}
        except LowRankError:
            assert weight_map != {"a": "x"}


@pytest.mark.parametrize("content", ["", "{", "[]", "\N{LATIN SMALL LETTER E WITH ACUTE}"])
def test_an_index_that_is_no_json_object(sharded: Path, content: str) -> None:
    (sharded / INDEX_FILE).write_text(content, encoding="latin-1")
    with pytest.raises(LowRankError, match=rf"{INDEX_FILE}: (not valid JSON|a JSON object is expected)"):
        read_headers(sharded)


CACHED = "models--tests--tiny/snapshots/0123"


@pytest.mark.parametrize(
    ("folder", "target", "inside"),
    [
        (CACHED, "models--tests--tiny/blobs/x", True),
        (CACHED, "blobs/ab/x", True),  # the store that all repositories of a cache share
        (CACHED, "models--tests--other/blobs/x", False),
        (CACHED, "models--tests--tiny/x", False),
        ("model/snapshots/0123", "model/blobs/x", False),
        ("model", "model/parts/x", True),
        ("model", "model-2/x", False),
        ("model", "x", False),
    ],
)
@pytest.mark.parametrize("through_link", [False, True])
def test_links_lead_nowhere_but_into_the_folder_and_its_cache(
    single: Path, folder: str, target: str, inside: bool, through_link: bool
) -> None:
    home, blob = single / folder, single / target
    home.mkdir(parents=True)
    blob.parent.mkdir(parents=True, exist_ok=True)
    (single / SINGLE_FILE).rename(blob)
    (home / SINGLE_FILE).symlink_to(blob)
    if through_link:  # the folder itself may be a link
        home = single / "here"
        home.symlink_to(single / folder)
    if inside:
        assert list(read_headers(home)) == ["a", "b"]
        return
    with pytest.raises(LowRankError, match=r"model.safetensors: a symbolic link out of the model's folder") as caught:
        read_headers(home)
    assert str(blob) in caught.value.message


def test_an_index_that_is_a_link_out(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    index = tmp_path_factory.mktemp("elsewhere") / "index"
    (sharded / INDEX_FILE).rename(index)
    (sharded / INDEX_FILE).symlink_to(index)
    with pytest.raises(LowRankError, match=rf"{INDEX_FILE}: a symbolic link out of the model's folder, to .*/index"):
        read_headers(sharded)


@pytest.mark.parametrize("target", ["nothing", SINGLE_FILE])
def test_a_link_to_nothing(tmp_path: Path, target: str) -> None:
    (tmp_path / SINGLE_FILE).symlink_to(target)
    with pytest.raises(UsageError, match=r"no model\.safetensors"):
        read_headers(tmp_path)
