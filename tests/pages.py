"""A text for tests that train, calibrate and score: short documents, no two alike, of few words."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = (
    *("river", "mill", "wheel", "gate", "boy", "path", "basket", "wall", "road", "miller"),
    *("flour", "sack", "noon", "hedge", "bird", "sun", "hill", "day", "stone", "water"),
)


def write_pages(path: Path, *, num_pages: int = 60, num_words: int = 40) -> Path:
    """Write a .jsonl of pages "Page 7. gate miller ... ."; some 60 tokens of a tiny tokenizer each."""
    draw = random.Random(0)
    rows = [{"text": f"Page {page}. {' '.join(draw.choices(WORDS, k=num_words))}."} for page in range(num_pages)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
