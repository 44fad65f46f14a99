"""What --device and --dtype mean, and what they refuse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from lowrank_kit.device import (
    DTYPES,
    available_memory,
    cgroup_rooms,
    product_flops,
    resolve_device,
    resolve_dtype,
)
from lowrank_kit.errors import UsageError


def has(monkeypatch: pytest.MonkeyPatch, *, cuda: int = 0, mps: bool = False) -> None:
    """A machine with so many CUDA devices, and with or without MPS."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "chosen"), [(0, False, "cpu"), (0, True, "mps"), (1, False, "cuda"), (1, True, "cuda")]
)
def test_auto_takes_the_best_there_is(cuda: int, mps: bool, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, cuda=cuda, mps=mps)
    assert resolve_device("auto") == resolve_device() == torch.device(chosen)


def test_a_device_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, cuda=2)
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("xyzzy", 'unknown device "xyzzy"\nhint: choose from: auto, cpu, cuda, mps'),
        ("cdua", 'unknown device "cdua"\nhint: did you mean "cuda"?'),
        ("mps", 'device "mps" is not available on this machine\nhint: --device auto, or --device cpu'),
        ("meta", 'device "meta" is not available on this machine\nhint: --device auto, or --device cpu'),
        ("cuda:2", 'device "cuda:2": this machine has 2 CUDA devices\nhint: --device cuda:1'),
    ],
)
def test_a_device_that_is_not_there(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, cuda=2)
    with pytest.raises(UsageError) as raised:
        resolve_device(name)
    assert str(raised.value) == message


def test_dtypes() -> None:
    assert resolve_dtype("auto") == "auto"
    assert {name: resolve_dtype(name) for name in DTYPES} == DTYPES
    with pytest.raises(UsageError) as raised:
        resolve_dtype("bfloat")
    assert str(raised.value) == 'unknown dtype "bfloat"\nhint: did you mean "bfloat16"?'


def test_memory_that_is_left_is_the_machines_or_the_cgroups(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert 0 < available_memory(cpu) <= psutil.virtual_memory().total
    monkeypatch.setattr("lowrank_kit.device.cgroup_rooms", lambda: [10**6, 5000])
    assert available_memory(cpu) == 5000


def cgroup(folder: Path, limit: str, used: int, cache: int, *, version: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}[version]
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    key = {1: "total_inactive_file", 2: "inactive_file"}[version]
    (folder / "memory.stat").write_text(f"anon 5\n{key} {cache}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_cgroups_are_those_of_the_process_and_of_all_above(version: int, tmp_path: Path) -> None:
    top = tmp_path / "memory" if version == 1 else tmp_path
    cgroup(top / "a" / "b", "1000", 400, 100, version=version)
    cgroup(top / "a", "max", 500, 0, version=version)
    cgroup(top / "other", "10", 5, 0, version=version)
    membership = tmp_path / "membership"
    membership.write_text("5:cpuset:/x\n" + ("4:cpu,memory:/a/b\n" if version == 1 else "0::/a/b\n"))
    assert cgroup_rooms(membership, tmp_path) == [700]
    # A container sees its own group as the mount.
    cgroup(top, "300", 500, 0, version=version)
    assert sorted(cgroup_rooms(membership, tmp_path)) == [0, 700]
    assert cgroup_rooms(tmp_path / "none", tmp_path) == []


def test_the_speed_of_products_is_measured() -> None:
    # Any computer of this century does more than 0.1 and less than 10^5 GFLOP/s.
    assert 1e8 < product_flops(torch.device("cpu"), torch.float32) < 1e14


FREED = """
import sys
import torch
from lowrank_kit.device import return_fragments, return_freed_memory

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def fill_and_free(count, numbers):
    freed, kept = [], []
    for _ in range(count):
        freed.append(torch.ones(numbers))
        kept.append(torch.ones(2**8))
    return kept

return_freed_memory(at_any_cost=bool(int(sys.argv[1])))
megabytes = int(sys.argv[2])
torch.ones(30 * 2**18)  # what is smaller than one that was freed, glibc keeps
before, kept = resident(), [fill_and_free(100 // megabytes, megabytes * 2**18)]
large = resident() - before
kept.append(fill_and_free(2000, 2**14))
kept_by_glibc = resident() - before
return_fragments()
print(large, kept_by_glibc, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's memory")
@pytest.mark.parametrize(("at_any_cost", "megabytes"), [(False, 20), (True, 5)])
def test_freed_memory_goes_back_to_the_system(at_any_cost: bool, megabytes: int) -> None:
    """100 MB in large tensors at once, and 130 MB in tensors of 64 kB when asked for; others are in between."""
    words = [sys.executable, "-c", FREED, str(int(at_any_cost)), str(megabytes)]
    large, before, after = map(int, subprocess.check_output(words, text=True).split())
    assert large < 2 * 10**7
    assert before > 10**8
    assert after < 3 * 10**7


KEPT = """
import psutil, torch
from lowrank_kit.device import freed_memory_kept
def resident():
    return psutil.Process().memory_info().rss
before = resident()
with freed_memory_kept():
    torch.ones(64, 2**18)  # 64 MB, which glibc gives back
    kept = resident() - before
print(kept, resident() - before)
torch.ones(64, 2**18)
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_is_kept_while_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
    within, *after = map(int, done.stdout.split())
    assert within > 60e6
    assert max(after) < 20e6
