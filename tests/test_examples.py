"""Every example runs, and does what it says."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
LOOPS = ("numuon_loop", "numuon_trainer", "numuon_accelerate")


def load(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_has_a_test() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.py")} == {*LOOPS, "numuon_fsdp2", "compress_and_load"}


@pytest.mark.parametrize("name", LOOPS)
def test_numuon_in_anybody_s_loop(name: str) -> None:
    losses = load(name).main()
    assert losses[-1] < 0.8 * losses[0]


def test_numuon_under_fsdp2() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(EXAMPLES / "numuon_fsdp2.py")], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    first, last = re.findall(r"\d+\.\d+", done.stdout)
    assert float(last) < 0.8 * float(first)


def test_compress_and_load(tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = load("compress_and_load").main(str(tiny_llama_folder), str(tmp_path / "half"))
    assert text.startswith("def main(")
    assert "of the matrices" in capsys.readouterr().out
