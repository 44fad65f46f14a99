"""A compressed folder that loads without lowrank-kit: with the code of its layers in it, for `trust_remote_code=True`.

The code is one file, put together from the modules of this package that the quantizer needs. transformers runs it only
where a user says `trust_remote_code=True`; with lowrank-kit imported the folder loads as any other, and the file is
not looked at.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
from pathlib import Path

import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.hub import CONFIG_FILE
from lowrank_kit.errors import UsageError
from lowrank_kit.report.files import new_folder, write_text

MODULE = "modeling_lowrank"
_PACKAGE = "lowrank_kit"
_FIRST = f"{_PACKAGE}.checkpoint.quantizer"

_HEADER = '''"""Layers of low rank, for `trust_remote_code=True`: one file, put together from lowrank-kit (Apache-2.0).

Do not edit: lowrank_kit.checkpoint.standalone.add_standalone writes it again.
"""

from __future__ import annotations
'''

_FOOTER = '''
# A lowrank-kit that is imported has registered the format already, and then its own layers are taken.
if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register()


class {config}(transformers.{config}):
    """As transformers has it. Of this file, so that save_pretrained takes the file along."""


class {model}(transformers.{model}):
    """As transformers has it; its matrices are exchanged for the stored layers before the weights are loaded."""

    config_class = {config}
'''


def add_standalone(source: Path | str, output: Path | str) -> Path:
    """A copy of a compressed folder that needs no lowrank-kit where `trust_remote_code=True` is said.

    The weights are the same files where the disk can link them. It loads with lowrank-kit and without
    `trust_remote_code` as before, too.

    Args:
        source: a compressed folder, or a hub id of one.
        output: the folder to make.

    Returns:
        The folder that was made.

    Raises:
        UsageError: the source is not compressed, or the output is taken.
        LowRankError: damaged files.
    """
    checkpoint = Checkpoint.open(source)
    checkpoint.matrices()  # refuses what is no matrix of this model, or of a newer format
    if not checkpoint.config.get("quantization_config"):
        raise UsageError(
            f"{source} is dense: it needs no code of its own", hint=f"lowrank compress {source} --keep 0.5 -o SMALL"
        )
    model = checkpoint.meta_model()
    names = {"config": type(model.config).__name__, "model": type(model).__name__}
    auto_map = {
        AutoConfig.__name__: f"{MODULE}.{names['config']}",
        AutoModelForCausalLM.__name__: f"{MODULE}.{names['model']}",
    }
    with new_folder(output) as folder:
        for file in checkpoint.path.iterdir():
            if file.is_file() and file.name not in (CONFIG_FILE, f"{MODULE}.py"):
                _link_or_copy(file.resolve(), folder / file.name)
        write_text(folder / f"{MODULE}.py", modeling_source(**names))
        write_text(folder / CONFIG_FILE, json.dumps({**checkpoint.config, "auto_map": auto_map}, indent=2) + "\n")
    return Path(output)


def modeling_source(*, config: str, model: str) -> str:
    """The text of `modeling_lowrank.py`.

    Args:
        config, model: names of the classes in transformers that it is for.

    Raises:
        UsageError: transformers has no such class.
    """
    for name in (config, model):
        if not hasattr(transformers, name):
            raise UsageError(f"transformers {transformers.__version__} has no {name} of its own")
    imports: dict[str, set[str]] = {"": {"import transformers"}}
    bodies: dict[str, str] = {}
    _add_module(_FIRST, imports, bodies)
    plain = sorted(imports.pop(""))
    froms = [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(imports.items())]
    body = "\n\n".join(text.strip("\n") + "\n" for text in bodies.values() if text.strip())
    return "\n".join([_HEADER, *plain, *froms, "", "", body, _FOOTER.format(config=config, model=model)])


def _add_module(name: str, imports: dict[str, set[str]], bodies: dict[str, str]) -> None:
    """Put what a module imports, then what it says itself, behind what there is; a second time nothing."""
    if name in bodies:
        return
    bodies[name] = ""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).read_text(encoding="utf-8")
    lines = text.splitlines()
    dropped: set[int] = set()
    for position, node in enumerate(ast.parse(text).body):
        docstring = position == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if docstring or isinstance(node, ast.Import | ast.ImportFrom):
            dropped.update(range(node.lineno - 1, node.end_lineno or node.lineno))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(_PACKAGE):
            _add_module(node.module or "", imports, bodies)
        elif isinstance(node, ast.Import):
            imports[""].add(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            names = (f"{one.name} as {one.asname}" if one.asname else one.name for one in node.names)
            imports.setdefault(node.module or "", set()).update(names)
    del bodies[name]  # behind those that it imports
    bodies[name] = "\n".join(line for number, line in enumerate(lines) if number not in dropped)


def _link_or_copy(source: Path, target: Path) -> None:
    """Weights are linked: they are large, and nobody writes into them."""
    if source.suffix == ".safetensors":
        try:
            os.link(source, target)
        except OSError:  # another disk, or one without links
            pass
        else:
            return
    shutil.copyfile(source, target)
