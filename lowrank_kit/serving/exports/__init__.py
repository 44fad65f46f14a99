"""What a model can be exported to. A new kind is a file here, that has a `KIND`, and a line in the table."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lowrank_kit.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from lowrank_kit.serving.exports.base import Kind

# Kind, and module beside this one -> what it is, in a few words. Imported on use: the command's help shows this table.
KINDS = {
    "dense": "plain weights for tools that do not know low rank",
    "lora": "the difference to a base as PEFT adapters",
    "onnx": "one graph for onnxruntime",
    "int8": "factors of 8-bit codes",
}


def check_kind(name: str) -> str:
    """The name of a kind.

    Raises:
        UsageError: there is none of this name.
    """
    if name not in KINDS:
        raise UsageError(f'no such kind of export "{name}"', hint=did_you_mean(name, KINDS))
    return name


def find_kind(name: str) -> Kind:
    """The kind of a name.

    Raises:
        UsageError: there is none.
    """
    kind: Kind = importlib.import_module(f"{__name__}.{check_kind(name)}").KIND
    return kind
