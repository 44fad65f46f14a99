"""No pickle is read, and no code that comes with a model is run: by what the sources say, and by what a run does."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cli.main import run
from tests.pages import write_pages

ROOT = Path(__file__).parents[1]
SOURCES = [path for folder in ("lowrank_kit", "cli", "evals", "examples") for path in (ROOT / folder).rglob("*.py")]
PICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
TORCH_PICKLING = {"torch.load", "torch.save", "torch.hub.load", "torch.jit.load"}
RUNNING = {"exec", "eval", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "np.load", "numpy.load"}
# Of the libraries' classes; what is missing here is asked for on the terminal.
LOADERS = {f"{name}.from_pretrained" for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "AutoModel")}


def unsafe(source: str) -> Iterator[str]:
    """What a source does with pickles, or with code that comes with a model."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in PICKLING)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PICKLING:
            yield str(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in RUNNING:
            yield ast.unparse(node.func)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in LOADERS:
            yield from [] if "trust_remote_code=False" in map(ast.unparse, node.keywords) else ["trust_remote_code"]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in TORCH_PICKLING:
            yield ast.unparse(node)
        elif isinstance(node, ast.keyword) and ast.unparse(node) != "trust_remote_code=False":
            yield from ["trust_remote_code"] if node.arg == "trust_remote_code" else []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources(path: Path) -> None:
    # Examples are of users' own models, and as one writes them.
    found = [what for what in unsafe(path.read_text()) if what != "trust_remote_code" or "examples" not in path.parts]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "import torch\ntorch.load('x')",
        "load(x, trust_remote_code=True)",
        "load(x, trust_remote_code=given)",
        "AutoConfig.from_pretrained(x)",
        "eval('1')",
        "yaml.load(x, y)",
    ],
)
def test_what_would_be_found(source: str) -> None:
    assert list(unsafe(source))


# Commands on a folder that brings code or a pickle, which would leave a mark.

COMMANDS = {
    "train": "MODEL --steps 1 TEXT -o OUT",
    "train from its config": "--model-config MODEL/config.json --vocab-size 300 --steps 1 TEXT -o OUT",
    "train with its tokenizer": "--model-config CONFIG --tokenizer MODEL --steps 1 TEXT -o OUT",
    "train for its size": "--model-config CONFIG --vocab-size 300 --mup-base MODEL --steps 1 TEXT -o OUT",
    "compress": "MODEL --keep .5 --objective whiten --calibration-blocks 6 --check-blocks 1 TEXT -o OUT",
    "compress to a plan": "MODEL --keep .5 --objective plain --dry-run",
    "eval": "MODEL --blocks 1 TEXT",
    "analyze": "MODEL",
    "bench": "MODEL --prompt 4 --new-tokens 2 --batch 1 --rounds 1 --warmup 0 --device cpu",
    "scale table": "--base MODEL --target CONFIG",
    "export": "MODEL --to lora --base BASE -o OUT",
}
CODE = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"


@pytest.fixture
def foreign(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    """A Llama with code for its config, model and tokenizer."""
    folder = Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))
    (folder / "modeling_foreign.py").write_text(CODE)
    own = {f"Auto{what}": f"modeling_foreign.{what}" for what in ("Config", "Model", "ModelForCausalLM")}
    edit(folder / "config.json", auto_map=own)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_foreign.Tokenizer", None]})
    return folder


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def code_of(command: str, model: Path) -> int:
    """Exit code of one of the commands on a model."""
    sizes = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2}
    config = model.parent / "plain.json"
    config.write_text(json.dumps({**sizes, "num_attention_heads": 4, "num_key_value_heads": 2}))
    base = shutil.copytree(model, model.parent / "base", dirs_exist_ok=True)
    for weights in base.glob("*.safetensors"):
        save_file({name: 1.01 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    text = f"--text {write_pages(model.parent / 'pages.jsonl')} --block-tokens 16 --device cpu"
    words = COMMANDS[command].replace("TEXT", text).replace("MODEL", str(model)).replace("CONFIG", str(config))
    words = words.replace("BASE", str(base))
    verb = "scale table" if command == "scale table" else command.split()[0]
    return run([*verb.split(), *words.replace("OUT", str(model.parent / "out")).split(), "-q"])


@pytest.mark.usefixtures("same_process_after")
@pytest.mark.parametrize("command", COMMANDS)
def test_code_of_a_folder_is_never_run(command: str, foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(command, foreign) == 0, capsys.readouterr().err
    edit(foreign / "config.json", model_type="foreign")
    shutil.rmtree(foreign.parent / "out", ignore_errors=True)
    code, told = code_of(command, foreign), capsys.readouterr().err
    if command != "train with its tokenizer":
        assert code == 2, told
        assert "foreign" in told
        assert "this is a bug" not in told
    assert not list(foreign.parent.rglob("ran"))


class Bomb:
    """Read as a pickle, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.usefixtures("same_process_after")
@pytest.mark.parametrize("command", ["train", "compress", "compress to a plan", "eval", "analyze", "bench", "export"])
def test_a_pickle_is_never_read(
    command: str, tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    assert code_of(command, folder) == 2
    told = capsys.readouterr().err
    assert "model: no model.safetensors and no model.safetensors.index.json in this folder\nhint: " in told
    assert "pytorch_model.bin is a pickle; convert it once: " in told
    assert not (tmp_path / "ran").exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "ran").exists()


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
        "export small --to dense -q -o plain",
        "export small --to int8 -q -o codes",
        "export plain --to lora --base model -q -o adapters",
        "analyze codes -q",
    ]
    assert watched(lines, tmp_path) == "[]"


def test_a_pickle_would_be_noticed(tmp_path: Path) -> None:
    assert watched([], tmp_path, "check") == "[('builtins', 'print')]"
