"""Every example runs, and does what it says."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.pyplot as plt
import pytest
from click.testing import CliRunner

from cli.main import lowrank
from lowrank_kit.compression.recipe import RECIPE_FILE
from tests.pages import write_pages

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


def test_the_notebook(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its cells in order, in one namespace: what they do needs no kernel, and IPython brings thirty packages."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text())
    assert notebook["nbformat"] == 4
    names: dict[str, Any] = {"__name__": "__main__"}
    for place, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None), "clear the outputs"
            exec(compile("".join(cell["source"]), f"tour.ipynb, cell {place}", "exec"), names)
    plt.close("all")
    told = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"step +\d+  loss ([\d.]+)", told)]
    divergences = [float(nats) for nats in re.findall(r"perplexity [\d.]+  KL ([\d.]+)", told)]
    assert losses[-1] < losses[0] - 0.5
    assert divergences[0] == 0 < divergences[1] < divergences[2] < divergences[3]
    assert "in_features=64, out_features=176, rank=" in told
    assert not names["folder"].exists()


def test_every_recipe_has_a_test() -> None:
    assert {file.name for file in EXAMPLES.glob("recipes/*")} == {"careful.yaml"}


def test_the_careful_recipe(tiny_llama_folder: Path, tmp_path: Path, same_process_after: None) -> None:
    words = ["compress", str(tiny_llama_folder), "--recipe", str(EXAMPLES / "recipes" / "careful.yaml")]
    words += ["--text", str(write_pages(tmp_path / "pages.jsonl", num_pages=30)), "--block-tokens", "32"]
    done = CliRunner().invoke(lowrank, [*words, "--json", "-o", str(tmp_path / "out")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    kept = {row["matrix"].removeprefix("model.layers."): row for row in report["matrices"]}
    assert report["settings"]["allocation"] == "erank"
    assert 0.48 < report["totals"]["matrix_keep"] <= 0.5
    assert kept["0.self_attn.v_proj"]["note"] == "kept whole by the recipe"
    assert kept["1.self_attn.k_proj"]["note"] == "excluded"
    assert 0.65 < kept["0.mlp.up_proj"]["kept"] <= 0.7
    assert 0.75 < kept["1.self_attn.o_proj"]["kept"] <= 0.8
    assert (tmp_path / "out" / RECIPE_FILE).exists()
