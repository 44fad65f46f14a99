"""The model card of a compressed checkpoint: the README.md of its folder."""

from __future__ import annotations

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


_LOADING = """\
```python
import lowrank_kit  # registers the format
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

Without the import, loading stops with an error about shapes. Do not pass `ignore_mismatched_sizes=True`."""


def _head(base_model: str, *tags: str) -> str:
    data = ModelCardData(
        base_model=base_model, library_name="transformers", tags=["lowrank-kit", "low-rank", "compressed", *tags]
    )
    return f"---\n{data.to_yaml()}\n---"
