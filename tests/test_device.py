"""What --device and --dtype mean, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from lowrank_kit.device import DTYPES, resolve_device, resolve_dtype
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
