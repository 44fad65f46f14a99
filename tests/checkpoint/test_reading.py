"""Tensors are read as the safetensors library reads them, in little memory, and from the files that were opened."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.headers import DTYPE_BITS, SINGLE_FILE
from lowrank_kit.checkpoint.reading import TORCH_DTYPES, opened, read_tensor
from lowrank_kit.errors import LowRankError
from tests.checkpoint.test_headers import entry, raw_file
from tests.families import build

CONFIG = '{"model_type": "llama"}'


def folder_of(folder: Path, content: bytes | dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(CONFIG)
    if isinstance(content, bytes):
        (folder / SINGLE_FILE).write_bytes(content)
    else:
        save_file(content, folder / SINGLE_FILE, metadata={"format": "pt"})
    return folder


def of_dtype(dtype: torch.dtype, *shape: int) -> Tensor:
    """Random bytes that are numbers of a dtype."""
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 2 if dtype == torch.bool else 120, (count,), dtype=torch.uint8).view(dtype).reshape(shape)


def same(one: Tensor, other: Tensor) -> bool:
    flat = (t.reshape(-1).view(torch.uint8) for t in (one, other))
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*flat)


def test_every_dtype_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    assert set(DTYPE_BITS) - set(TORCH_DTYPES) == {"F6_E2M3", "F6_E3M2"}
    tensors = {word: of_dtype(dtype, 3, 4) for word, dtype in TORCH_DTYPES.items()}
    tensors |= {f"scalar {word}": of_dtype(dtype) for word, dtype in TORCH_DTYPES.items() if word != "F4"}
    tensors |= {f"empty {word}": of_dtype(dtype, 0, 4) for word, dtype in TORCH_DTYPES.items()}
    folder = folder_of(tmp_path, tensors)
    library, ours = load_file(folder / SINGLE_FILE), dict(Checkpoint.open(folder).tensors())
    assert ours.keys() == library.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same(ours[name], tensor), name
        assert same(ours[name], library[name]), name


def test_what_is_read_is_its_own(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"a": torch.zeros(8)})
    ((_, tensor),) = Checkpoint.open(folder).tensors()
    tensor += 1
    assert not load_file(folder / SINGLE_FILE)["a"].any()
    (folder / SINGLE_FILE).write_bytes(b"")  # a mapped file would be gone with its memory
    assert tensor.sum() == 8


MEMORY = """
import sys
from pathlib import Path
from lowrank_kit.checkpoint.folder import Checkpoint

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

checkpoint = Checkpoint.open(sys.argv[1])
next(checkpoint.tensors())  # what the first one loads besides
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = peak()
if sys.argv[2] == "read":
    for name, tensor in checkpoint.tensors():
        del tensor
else:
    checkpoint.verify()
print(peak() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 tensors of 8 MB, all holes."""
    side = 8_000_000
    header = {f"t{i}": entry("BF16", [side // 2], i * side, (i + 1) * side) for i in range(24)}
    folder = folder_of(tmp_path_factory.mktemp("large"), raw_file(header))
    os.truncate(folder / SINGLE_FILE, (folder / SINGLE_FILE).stat().st_size + 24 * side)
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
@pytest.mark.parametrize("how", ["read", "verify"])
def test_one_tensor_is_in_memory(large: Path, how: str) -> None:
    command = [sys.executable, "-c", MEMORY, str(large), how]
    # glibc would keep freed tensors for later ones, as many as it likes: by this it gives each back
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=True)
    assert 4_000_000 < int(done.stdout) < 4 * 8_000_000  # of 192 MB


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F4"])
def test_a_dtype_that_torch_has_not(tmp_path: Path, dtype: str) -> None:
    shape = [4, 2] if dtype != "F4" else [2, 3]
    content = raw_file({"a": entry(dtype, shape, 0, 6 if dtype != "F4" else 3)}, b"123456"[: 6 if dtype != "F4" else 3])
    checkpoint = Checkpoint.open(folder_of(tmp_path, content))
    with pytest.raises(LowRankError, match=rf"torch has no dtype for tensor a, {dtype} \[{shape[0]}, {shape[1]}\]"):
        next(checkpoint.tensors())
    assert checkpoint.verify() == {SINGLE_FILE: hashlib.sha256(content).hexdigest()}


def other_bytes(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"x")


def replaced(path: Path) -> None:
    content = path.read_bytes()
    path.rename(path.with_name("old"))
    path.write_bytes(content)


CHANGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 1),
    "other bytes": other_bytes,
    "another file": replaced,
    "touched": lambda path: os.utime(path, ns=(0, path.stat().st_mtime_ns + 1)),
}


@pytest.mark.parametrize(
    ("change", "when"),
    # "another file" between two tensors: what was opened is read to its end, whatever has its name.
    [(name, when) for name in CHANGES for when in ("before", "between") if (name, when) != ("another file", "between")],
)
def test_a_shard_that_changed_is_refused(tmp_path: Path, change: str, when: str) -> None:
    path = folder_of(tmp_path, {"a": torch.zeros(8), "b": torch.zeros(8)}) / SINGLE_FILE
    os.utime(path, (0, 0))
    checkpoint = Checkpoint.open(tmp_path)
    tensors = checkpoint.tensors()
    if when == "between":
        next(tensors)
    CHANGES[change](path)
    with pytest.raises(LowRankError, match=r"model\.safetensors: changed between plan and run: \d+ bytes") as caught:
        next(tensors)
    assert f"{path.stat().st_size} bytes of" in caught.value.message.rpartition("then")[2]
    assert caught.value.hint is not None
    with pytest.raises(LowRankError, match="changed between plan and run"):
        checkpoint.verify()


def test_a_file_that_ends_too_early(tmp_path: Path) -> None:
    """As one does that is cut after the look at its size."""
    path = folder_of(tmp_path, {"a": torch.zeros(8)}) / SINGLE_FILE
    ((file, shard),) = Checkpoint.open(tmp_path).shards.items()
    (header,) = shard.headers
    with opened(path, shard) as stream:
        message = rf"{file}: ends at byte {shard.nbytes}, {shard.nbytes + 5} were expected"
        with pytest.raises(LowRankError, match=message) as caught:
            read_tensor(stream, path, shard, replace(header, offset=header.offset + 5))
    assert "copy it again" in str(caught.value.hint)


def test_a_shard_that_is_gone(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"a": torch.zeros(8)})
    checkpoint = Checkpoint.open(folder)
    (folder / SINGLE_FILE).unlink()
    with pytest.raises(LowRankError, match=r"model\.safetensors: cannot be read any more \(No such file"):
        next(checkpoint.tensors())


def test_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    files = {path.name: path.stat().st_size for path in tmp_path.glob("*.safetensors")}
    checkpoint = Checkpoint.open(tmp_path)
    assert {file: shard.nbytes for file, shard in checkpoint.shards.items()} == files
    assert checkpoint.nbytes == sum(files.values())


def test_a_pass_of_verification_gives_the_hashes(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.glob("*.safetensors")}
    assert len(hashes) > 1
    found = Checkpoint.open(tmp_path).verify()
    assert found == hashes
    assert list(found) == sorted(hashes)


WITH_BAD = [word for word, dtype in TORCH_DTYPES.items() if dtype.is_floating_point and word not in ("F4", "C64")]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", WITH_BAD)
def test_numbers_that_are_none_are_counted(tmp_path: Path, dtype: str, bad: float) -> None:
    numbers = torch.ones(3, 5)
    numbers[1, 2] = numbers[2, 4] = bad
    tensor = numbers.to(TORCH_DTYPES[dtype])
    count = int((~tensor.float().isfinite()).sum())  # some formats have no infinity
    checkpoint = Checkpoint.open(folder_of(tmp_path, {"good": torch.ones(4), "x": tensor, "ints": torch.ones(2).int()}))
    if count == 0:
        checkpoint.verify()
        return
    with pytest.raises(LowRankError, match=rf"{tmp_path}: NaN or Inf in x: {count} of 15 numbers"):
        checkpoint.verify()


def test_numbers_that_are_none_in_several_chunks(tmp_path: Path) -> None:
    tensor = torch.zeros(2 * 2**20 + 5, dtype=torch.bfloat16)
    tensor[:: 2**20] = math.nan
    checkpoint = Checkpoint.open(folder_of(tmp_path, {"x": tensor}))
    with pytest.raises(LowRankError, match=r"NaN or Inf in x: 3 of 2,097,157 numbers"):
        checkpoint.verify()
