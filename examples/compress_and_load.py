"""Compress a checkpoint from Python and load the result as any other model.

python examples/compress_and_load.py MODEL OUTPUT [KEEP]
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

# Importing lowrank_kit is what makes from_pretrained load the result.
from lowrank_kit import CompressSettings, compress


def main(model: str, output: str, keep: float = 0.5) -> str:
    """Compress, load and generate; returns the generated text."""
    settings = CompressSettings(keep=keep, objective="whiten", calibration_blocks=32, block_tokens=64)
    report = compress(model, Path(output), settings)
    print(
        f"kept {report['totals']['matrix_keep']:.1%} of the matrices, {report['totals']['model_keep']:.1%} of the model"
    )
    compressed = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    inputs = tokenizer("def main(", return_tensors="pt", return_token_type_ids=False)
    return tokenizer.decode(compressed.generate(**inputs, max_new_tokens=8, do_sample=False)[0])


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2], *map(float, sys.argv[3:4])))
