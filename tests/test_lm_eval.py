"""lm-eval's own command on compressed folders: through this package, and without it on a standalone folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_kit.checkpoint.standalone import add_standalone
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings

TASK = """\
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
# As where lowrank-kit is not installed.
WITHOUT = "import sys; sys.modules['lowrank_kit'] = None; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    rows = [
        {"question": f"The miller had {n} sacks and the boy", "choices": [" one", " the river"], "label": n % 2}
        for n in range(4)
    ]
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.yaml").write_text(TASK.format(data=folder / "rows.jsonl"))
    return folder


def lm_eval(how: list[str], model_args: str, tasks: Path, output: Path) -> float:
    """The accuracy that lm-eval's command writes."""
    words = ["--model", "hf", "--model_args", model_args, "--tasks", "tiny", "--include_path", str(tasks)]
    words += ["--device", "cpu", "--output_path", str(output)]
    done = subprocess.run(
        [sys.executable, *how, *words],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = output.rglob("results*.json")
    return float(json.loads(file.read_text())["results"]["tiny"]["acc,none"])


def test_lm_eval_takes_a_compressed_folder(tiny_llama_folder: Path, tasks: Path, tmp_path: Path) -> None:
    compress(tiny_llama_folder, tmp_path / "half", CompressSettings(keep=0.5, objective="plain", form="auto"))
    add_standalone(tmp_path / "half", tmp_path / "alone")
    ours = lm_eval(["-m", "lowrank_kit.lm_eval"], f"pretrained={tmp_path / 'half'}", tasks, tmp_path / "one")
    alone = f"pretrained={tmp_path / 'alone'},trust_remote_code=True"
    assert lm_eval(["-c", WITHOUT], alone, tasks, tmp_path / "other") == ours
