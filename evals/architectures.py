"""Compress a tiny random model of every family in tests, and write what comes of it to docs/architectures.md.

python -m evals.architectures [FAMILY ...]     from the root of the repository; of some families it prints the rows
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from lowrank_kit.data.tokenizer import train_tokenizer
from lowrank_kit.matrices import LEAF_ROLES, find_matrices
from lowrank_kit.report.files import write_text
from lowrank_kit.report.tables import markdown_table
from tests.architectures import REFUSED, WHOLE, Outcome, check
from tests.families import FAMILIES, build_from
from tests.more_families import EXAMPLES, MORE, VOCABULARY, tiny_config
from tests.pages import write_pages

TABLE = Path(__file__).parents[1] / "docs" / "architectures.md"
ABOVE = """\
# Architectures

What `lowrank compress` does with a model of each family, as [`evals/architectures.py`](../evals/architectures.py) found
with tiny random ones, in transformers {version}; `python -m evals.architectures` writes this page anew. A model is
built from its config, saved with a tokenizer, compressed with `--objective whiten`, and loaded by plain
`from_pretrained`. Holds: at keep 1.0 the logits are the dense model's to the bit; at keep .6 (or what the notes say,
where so much stays dense that .6 is impossible) the loss is finite, the files have the bytes that were planned, and
saved and loaded once more the weights, the logits and the text that it generates are the same; tied embeddings are on
disk once; and where the matrices really are of low rank, the logits are the dense model's within 0.001. Streamed: one
block at a time was in memory. Whole: its blocks cannot be run one by one, and all of it was. Embeddings, norms, routers
and convolutions always stay dense, and are not listed. The families in bold are tested with every change.

"""


def main(wanted: list[str]) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    families: dict[str, Callable[[], PreTrainedConfig]] = {
        **{family: partial(config, vocab_size=VOCABULARY) for family, config in FAMILIES.items()},
        **{family: partial(tiny_config, family, given) for family, (_, given) in sorted(MORE.items())},
    }
    with tempfile.TemporaryDirectory() as folder:
        rows = list(_rows({family: families[family] for family in wanted or families}, Path(folder)))
    table = markdown_table(rows)
    if wanted:
        print(table)
    else:
        write_text(TABLE, ABOVE.format(version=transformers.__version__) + table + "\n")


def _rows(families: dict[str, Callable[[], PreTrainedConfig]], folder: Path) -> Iterator[dict[str, str]]:
    text, tokenizer = _text(folder)
    for family, config in families.items():
        model = build_from(config())
        told = _particular(model)
        (folder / family).mkdir()
        outcome = check(model, tokenizer, text, folder / family)
        print(f"{family}: {outcome.way}{', fails' * bool(outcome.failed)}", file=sys.stderr)
        yield {
            "family": f"**{family}**" if family in FAMILIES else family,
            "models": EXAMPLES[family],
            "what the model that was tried has": ", ".join(told),
            "compressed": "fails" if outcome.failed else outcome.way,
            "notes": "; ".join(_notes(outcome)),
        }


def _text(folder: Path) -> tuple[str, PreTrainedTokenizerFast]:
    path = write_pages(folder / "pages.jsonl", num_pages=40)
    pages = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    return str(path), train_tokenizer(pages, vocab_size=VOCABULARY, model_max_length=64)


def _particular(model: PreTrainedModel) -> Iterator[str]:
    matrices, config = find_matrices(model), model.config.get_text_config()
    heads, keys = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    plain = [matrix for matrix in matrices if matrix.expert is None]
    roles = dict.fromkeys(matrix.role for matrix in plain)
    if heads and keys and keys < heads and "k" in roles:
        yield "grouped queries"
    if any(getattr(model.get_submodule(matrix.name), "bias", None) is not None for matrix in plain):
        yield "biases"
    yield from (f"fused {name}" for role, name in (("qkv", "qkv"), ("gate_up", "gate and up")) if role in roles)
    if any(isinstance(module, Conv1D) for module in model.modules()):
        yield "Conv1D"
    if model.get_input_embeddings().weight is model.get_output_embeddings().weight:
        yield "tied"
    if len(matrices) > len(plain):
        yield "fused experts"
    others = dict.fromkeys(
        next(part for part in reversed(matrix.name.split(".")) if not part.isdigit())
        for matrix in plain
        if matrix.role not in LEAF_ROLES
    )
    if others:
        yield f"also {', '.join(others)}"
    yield from _stacks(model, {matrix.parameter for matrix in matrices})


def _stacks(model: nn.Module, known: set[str]) -> Iterator[str]:
    """3-D weights that are no matrices, and no convolutions."""
    found = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        for leaf, p in module.named_parameters(prefix=name, recurse=False)
        if p.ndim == 3 and min(p.shape) > 1 and leaf not in known and not isinstance(module, nn.modules.conv._ConvNd)
    }
    if found:
        yield f"3-D weights of {', '.join(sorted(found))}, which stay dense"


def _notes(outcome: Outcome) -> Iterator[str]:
    if outcome.failed:
        yield ", ".join(outcome.failed)
    if outcome.keep not in (None, 0.6):
        yield f"keep {outcome.keep}"
    if outcome.stacked:
        yield "experts as stacked factors"
    yield from (f"dense: {reason}" for reason in outcome.dense)
    if outcome.way in (WHOLE, REFUSED):
        yield outcome.why.partition(", and the model has to")[0].replace("|", "\\|")


if __name__ == "__main__":
    main(sys.argv[1:])
