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
    data = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        tags=["lowrank-kit", "low-rank", "compressed"],
    )
    lines = "\n".join(f"- {key}: {value}" for key, value in how.items() if value is not None)
    return f"""---
{data.to_yaml()}
---
# {base_model}, compressed with lowrank-kit

The matrices of this model are stored as two thin ones each. Everything else is as in the dense model.

```python
import lowrank_kit  # registers the format
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

Without the import, loading stops with an error about shapes. Do not pass `ignore_mismatched_sizes=True`.

## Size

{markdown_table(summary)}

## Ranks

{markdown_table(matrices)}

## How it was made

{lines}

`compression.json` has the same per matrix, with errors, seeds, hashes and versions.
"""
