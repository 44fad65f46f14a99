"""The model card of a compressed checkpoint: the README.md of its folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCardData

from lowrank_kit.report.tables import markdown_table


def compressed_card(
    *, base_model: str, summary: list[dict[str, Any]], matrices: list[dict[str, Any]], how: dict[str, Any]
) -> str:
    """Text of a model card.

    Args:
        base_model: hub name or folder name of the dense model.
        summary: rows of the table of sizes.
        matrices: rows of the table of ranks by role.
        how: settings and versions, shown as a list.
    """
    lines = "\n".join(f"- {key}: {value}" for key, value in how.items() if value is not None)
    return f"""{_head(base_model)}
# {base_model}, compressed with lowrank-kit

The matrices of this model are stored as two thin ones each. Everything else is as in the dense model.

{_LOADING}

## Size

{markdown_table(summary)}

## Ranks

{markdown_table(matrices)}

## How it was made

{lines}

`compression.json` has the same per matrix, with errors, seeds, hashes and versions.
"""


def trained_card(*, base_model: str, adapters: bool, reported: bool) -> str:
    """Text of the model card of a compressed model that was trained further.

    Args:
        base_model: hub name or folder name of the compressed model.
        adapters: whether LoRA adapters beside the factors were trained, and merged into them.
        reported: whether the compressed model's compression.json stands beside the card.
    """
    trained = "by LoRA adapters, which are merged into them" if adapters else "themselves"
    report = "`compression.json` is that of the compressed model: ranks and forms are those of this one"
    if not reported:
        report = "The compressed model had no `compression.json`: what it was compressed with is not known"
    else:
        report += ", errors, losses and sizes in bytes are of before the training"
    return f"""{_head(base_model, "fine-tuned")}
# {base_model}, fine-tuned with lowrank-kit

The matrices of {base_model} are stored as two thin ones each. Those were trained {trained}; ranks and forms of storage
are what they were.

{_LOADING}

`run.json` has settings, text and versions, `log.jsonl` the losses. {report}.
"""


def dense_card(*, base_model: str, reported: bool, bytes_before: int, nbytes: int) -> str:
    """Text of the model card of a compressed model whose factors were multiplied.

    Args:
        base_model: hub name or folder name of the compressed model.
        reported: whether the compressed model's compression.json stands beside the card.
        bytes_before, nbytes: of the weights' files, of the compressed and of this model.
    """
    report = " `compression.json` is that of the compressed model." if reported else ""
    return f"""{_head(base_model)}
# {base_model}, as a dense model

The factors of {base_model}, a model that lowrank-kit has compressed, multiplied: a plain model of its architecture,
which any tool loads, with the outputs of the compressed one up to rounding. Its matrices are of low rank still, and no
longer stored so: {nbytes:,} bytes of weights, where the compressed model has {bytes_before:,}.

`export.json` has the rank of each matrix, and versions.{report}
"""


def int8_card(*, base_model: str, bytes_before: int, nbytes: int, worst: float) -> str:
    """Text of the model card of a compressed model whose factors became 8-bit codes.

    Args:
        base_model: hub name or folder name of the compressed model.
        bytes_before, nbytes: of the weights' files, of that model and of this one.
        worst: largest error of a matrix, relative to its norm.
    """
    return f"""{_head(base_model, "int8")}
# {base_model}, with factors of 8-bit codes

The factors of {base_model}, a model that lowrank-kit has compressed, as 8-bit codes with one scale for each row:
{nbytes:,} bytes of weights, where that model has {bytes_before:,}. Matrices differ by {100 * worst:.2g} % at most, in
norm. Everything else is as it was.

{_LOADING}

`export.json` has the error of each matrix, and versions.
"""


def adapter_card(*, base_model: str, model: str, rank: int, error: float, left_out: int) -> str:
    """Text of the model card of adapters that are a difference of two models.

    Args:
        base_model: hub name or folder name of the base, as the user gave it.
        model: of the model that differs from it.
        rank: of the adapters.
        error: share of the differences that the adapters leave out, in norm.
        left_out: tensors that differ and that no adapter holds.
    """
    rest = f" {left_out} tensors differ too that adapters do not hold, and stay as in the base." if left_out else ""
    return f"""{_head(base_model, "lora", library="peft")}
# {model} as adapters for {base_model}

LoRA adapters of rank {rank}: for each matrix the best approximation of what it is in {model} less what it is in
{base_model}. Of the differences they leave out {100 * error:.1f} %, in Frobenius norm over all matrices.{rest}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base_model}"), "path/to/this/folder")
```

`export.json` has the same per matrix, and versions.
"""


def graph_card(*, base_model: str, graph: str, inputs: Sequence[str], output: str) -> str:
    """Text of the model card of a graph for onnxruntime.

    Args:
        base_model: hub name or folder name of the model it was made of.
        graph: its file.
        inputs, output: their names.
    """
    feed = ", ".join(f'"{name}": encoded["{name}"]' for name in inputs)
    return f"""{_head(base_model, "onnx", library="onnx")}
# {base_model} as a graph for onnxruntime

`{graph}` goes from {" and ".join(f"`{name}`" for name in inputs)} [batch, sequence] to `{output}`
[batch, sequence, vocabulary], for any number and length of sequences. It has no cache of keys and values. Layers of low
rank are two products.

```python
import onnxruntime
from transformers import AutoTokenizer

encoded = AutoTokenizer.from_pretrained("path/to/this/folder")(["Some text"], return_tensors="np")
session = onnxruntime.InferenceSession("path/to/this/folder/{graph}")
(logits,) = session.run(["{output}"], {{{feed}}})
```

`config.json` is that of the model. `export.json` has by how much logits differed when the graph was made, and versions.
"""


_LOADING = """\
```python
import lowrank_kit  # registers the format
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

Without the import, loading stops with an error about shapes. Do not pass `ignore_mismatched_sizes=True`."""


def _head(base_model: str, *tags: str, library: str = "transformers") -> str:
    tags = ("low-rank", "compressed", *tags) if library == "transformers" else tags
    data = ModelCardData(base_model=base_model, library_name=library, tags=["lowrank-kit", *tags])
    return f"---\n{data.to_yaml()}\n---"
