"""What lies beside the weights in a model folder: the tokenizer, generation settings, the chat template."""

from __future__ import annotations

import shutil
from pathlib import Path

from lowrank_kit.checkpoint.folder import CONFIG_FILE, REPORT_FILE

# What an export says of itself, in the folder it made.
EXPORT_FILE = "export.json"
_COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja")
# What a folder says of how it was made is made anew.
_NOT_COPIED = (CONFIG_FILE, REPORT_FILE, EXPORT_FILE, "run.json")
# Indices of the source's shards, in whatever format.
_INDEX_SUFFIX = ".index.json"


def copy_beside(source: Path, folder: Path) -> None:
    """Copy what lies beside the weights and is not made anew into another folder."""
    for file in source.iterdir():
        wanted = file.suffix in _COPIED_SUFFIXES and file.name not in _NOT_COPIED
        if wanted and file.is_file() and not file.name.endswith(_INDEX_SUFFIX):
            shutil.copyfile(file, folder / file.name)
