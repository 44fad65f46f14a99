"""Where and in which number format work runs: the meaning of `--device` and `--dtype`."""

from __future__ import annotations

import torch

from lowrank_kit.errors import UsageError, did_you_mean

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
