"""Where and in which number format work runs: the meaning of `--device` and `--dtype`, and what a device can do."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from lowrank_kit.errors import UsageError, did_you_mean

# Of glibc's malloc.h; larger tensors are mapped each by itself, and gone when they are freed. From 4 MB on that takes a
# tenth less memory and a fifth more time.
M_MMAP_THRESHOLD, MAPPED_BYTES, MAPPED_BYTES_FEWER = -3, 16 * 2**20, 4 * 2**20
# How many may be mapped, and from how many free bytes on the heap shrinks: glibc's defaults, and what it takes at most.
M_MMAP_MAX, MAPPED, M_TRIM_THRESHOLD, TRIMMED_BYTES, MOST = -4, 65536, -1, 128 * 2**10, 2**31 - 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str = "auto") -> torch.device:
    """The torch device of a name; `auto` is CUDA where there is one, then MPS, then the CPU.

    Raises:
        UsageError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f'unknown device "{name}"', hint=did_you_mean(name, ("auto", "cpu", "cuda", "mps"))) from None
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, False):
        raise UsageError(f'device "{name}" is not available on this machine', hint="--device auto, or --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UsageError(f'device "{name}": this machine has {count} CUDA devices', hint=f"--device cuda:{count - 1}")
    return device


def resolve_dtype(name: str = "auto") -> torch.dtype | str:
    """The torch dtype of a name; `auto` stays "auto", which transformers reads as the checkpoint's own."""
    if name == "auto":
        return "auto"
    if name not in DTYPES:
        raise UsageError(f'unknown dtype "{name}"', hint=did_you_mean(name, ("auto", *DTYPES)))
    return DTYPES[name]


def return_freed_memory(*, at_any_cost: bool = False) -> None:
    """Have memory of the CPU go back to the system as soon as a tensor is freed, for the rest of the process.

    glibc keeps what is freed of all but tensors as large as the largest one freed so far, up to 32 MB: in the end that
    is as much again as is in use.

    Args:
        at_any_cost: smaller tensors too, which takes time.
    """
    _mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES_FEWER if at_any_cost else MAPPED_BYTES)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Have freed memory of the CPU stay in the process, as allocators of servers do, and as torch's does on a GPU.

    Pages that are given back and taken again for every large tensor are zeroed each time: an eighth of the time of a
    prefill of 2,048 tokens by a 60M model of low rank, and a thirtieth of its dense model's.
    """
    _mallopt(M_MMAP_MAX, 0)
    _mallopt(M_TRIM_THRESHOLD, MOST)
    try:
        yield
    finally:
        _mallopt(M_MMAP_MAX, MAPPED)
        _mallopt(M_TRIM_THRESHOLD, TRIMMED_BYTES)
        return_fragments()


def _mallopt(option: int, value: int) -> None:
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(option, value)


def return_fragments() -> None:
    """Give back what is free between smaller things that are in use: it grows with every block that is worked on."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def available_memory(device: torch.device) -> int:
    """Bytes that this process can still take on a device.

    Of a CUDA device what is free there; of the CPU, and of MPS which shares its memory, what the machine has left
    without swapping, or the process's cgroup if that is less.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return min([psutil.virtual_memory().available, *cgroup_rooms()])


def cgroup_rooms(membership: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes left under each memory limit of the process's cgroup and those above it; empty where there is none.

    Args:
        membership: a line `id:controllers:path` for each hierarchy.
        mount: of version 2, and folder of the mount `memory` of version 1.
    """
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:  # not Linux
        return []
    rooms = []
    for _, controllers, path in lines:
        if controllers and "memory" not in controllers.split(","):
            continue
        top, names = (mount / "memory", _CGROUP_1) if controllers else (mount, _CGROUP_2)
        # A container often sees its own cgroup as the mount, whatever the path says.
        inner = top / path.strip("/")
        rooms += [_room(folder, *names) for folder in {top, inner, *inner.parents} if folder.is_relative_to(top)]
    return [room for room in rooms if room is not None]


# Limit, use and the key in memory.stat of the cache that can be given back, of both versions of cgroups.
_CGROUP_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_CGROUP_2 = ("memory.max", "memory.current", "inactive_file")


def _room(folder: Path, limit: str, use: str, cache: str) -> int | None:
    try:
        most = int((folder / limit).read_text())
        used = int((folder / use).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such cgroup here, or "max"
        return None
    return max(most - used + int(stat.get(cache, 0)), 0)


def product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Multiplications and additions a second in products of square matrices, the best within 0.3 s."""
    side = 384 if device.type == "cpu" else 4096
    A, best = torch.randn(side, side, device=device, dtype=dtype), float("inf")  # some devices are faster on constants
    until = time.perf_counter() + 0.3
    while best == float("inf") or time.perf_counter() < until:
        started = time.perf_counter()
        (A @ A)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best
