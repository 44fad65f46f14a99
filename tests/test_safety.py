"""No pickle is read, and no code that comes with a model is run: by what the sources say, and by what a run does."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [path for folder in ("lowrank_kit", "cli", "evals", "examples") for path in (ROOT / folder).rglob("*.py")]
PICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
TORCH_PICKLING = {"torch.load", "torch.save", "torch.hub.load", "torch.jit.load"}


def unsafe(source: str) -> Iterator[str]:
    """What a source does with pickles, or with code that comes with a model."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in PICKLING)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PICKLING:
            yield str(node.module)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in TORCH_PICKLING:
            yield ast.unparse(node)
        elif isinstance(node, ast.keyword) and ast.unparse(node) != "trust_remote_code=False":
            yield from ["trust_remote_code"] if node.arg == "trust_remote_code" else []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources(path: Path) -> None:
    assert list(unsafe(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "import torch\ntorch.load('x')",
        "load(x, trust_remote_code=True)",
        "load(x, trust_remote_code=given)",
    ],
)
def test_what_would_be_found(source: str) -> None:
    assert list(unsafe(source))


# Python tells of every class and function that a pickle names before it is looked up.
WATCHED = """
import sys
found = []
sys.addaudithook(lambda event, arguments: found.append(arguments) if event == "pickle.find_class" else None)
from cli.main import run
for line in sys.stdin.read().splitlines():
    if run(line.split()) != 0:
        sys.exit(f"failed: {line}")
if sys.argv[1:] == ["check"]:
    import pickle
    pickle.loads(pickle.dumps(print))
print(sorted(set(found)), file=sys.stderr)
"""


def watched(lines: list[str], folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *arguments],
        input="\n".join(lines),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()[-1]


def test_no_pickle_from_training_to_scores(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "model.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 64, **sizes}))
    text = "-q --max-bytes 200000 --batch-size 2 --block-tokens 32"
    train = f"train --model-config model.json --vocab-size 300 --save-every 2 {text} -o model"
    assert watched([f"{train} --steps 3"], tmp_path) == "[]"
    record = json.loads((tmp_path / "model" / "run.json").read_text())
    (tmp_path / "model" / "run.json").write_text(json.dumps(record | {"finished": False}))  # as if interrupted
    lines = [
        f"{train} --steps 3 --resume",
        f"compress model --keep .5 --refine e2e --calibration-blocks 4 --refine-blocks 4 {text} -o small",
        "eval model small -q --blocks 2 --block-tokens 32",
        "analyze small -q -o spectra",
    ]
    assert watched(lines, tmp_path) == "[]"


def test_a_pickle_would_be_noticed(tmp_path: Path) -> None:
    assert watched([], tmp_path, "check") == "[('builtins', 'print')]"
