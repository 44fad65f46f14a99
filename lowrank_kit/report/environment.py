"""The machine and the packages a result came from: recorded in result files, printed by `lowrank env`."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "lowrank-kit",
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "tokenizers",
    "datasets",
    "lm-eval",
    "numpy",
)


def environment(*, with_devices: bool = False) -> dict[str, str | None]:
    """What a result depends on besides its settings: package versions, source commit, Python, OS, processor, memory.

    Args:
        with_devices: also say what torch can compute on, which imports torch.

    Returns:
        Label -> text, in the order to print. A package that is not installed is None, and so is the commit of a
        lowrank-kit that does not run from its own git checkout.
    """
    found = {name: _version(name) for name in PACKAGES[:1]}
    found["commit"] = source_commit()
    found |= {name: _version(name) for name in PACKAGES[1:]}
    found |= {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "os": platform.platform(),
        "processor": _processor(),
        "cpus": str(_usable_cpus()),
        "memory": _memory(),
    }
    return found | _devices() if with_devices else found


def source_commit() -> str | None:
    """The commit this package's own checkout is at, with `-dirty` if tracked files differ from it; else None."""
    checkout = Path(__file__).resolve().parents[2]
    top = _git(checkout, "rev-parse", "--show-toplevel")
    # A package installed into somebody's project lies inside their repository: its commit is not ours.
    if top is None or Path(top).resolve() != checkout:
        return None
    return _git(checkout, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40")


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or None: no git, no repository, no commit yet, or no answer within two seconds."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _usable_cpus() -> int:
    """The CPUs this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    """The processor's model name where Linux tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> str | None:
    """Physical memory in GiB; None where the system does not say (Windows)."""
    try:
        return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    except (AttributeError, ValueError, OSError):
        return None


def _devices() -> dict[str, str | None]:
    import torch

    cuda = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "torch threads": str(torch.get_num_threads()),
        "cuda": torch.version.cuda,
        "cuda devices": ", ".join(f"{each.name} ({each.total_memory / 2**30:.0f} GiB)" for each in cuda) or None,
        "mps": "yes" if torch.backends.mps.is_available() else None,
    }
