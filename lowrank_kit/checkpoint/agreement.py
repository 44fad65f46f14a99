"""Whether config.json and the tensors of a folder say the same of its matrices of low rank."""

from __future__ import annotations

from collections.abc import Mapping

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.stored import COMPRESSED_LEAVES, StoredMatrix, factor_names, sources_by_parameter
from lowrank_kit.errors import LowRankError
from lowrank_kit.layers import STACKED
from lowrank_kit.matrices import embedding_names, find_head

_HINT = "the file is damaged or of another model: compress or download the model again"


def agreed(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, with its LM head among the matrices if that is of low rank, once all is as config.json says.

    Args:
        checkpoint: dense or compressed.

    Raises:
        UsageError, LowRankError: as `Checkpoint.matrices`; a factor is missing, or has another rank or form than
            config.json says, or is not named there.
    """
    named = checkpoint.quantization().matrices
    _refuse_missing(checkpoint, named)
    model = checkpoint.meta_model()
    if set(named) & set(embedding_names(model)) and find_head(model).name in named:
        checkpoint = checkpoint.with_head()
    unknown = set(named)
    for stored in checkpoint.matrices():
        name = _name(stored)
        unknown.discard(name)
        entry = named.get(name, {"form": "dense", "rank": None})
        found = {"form": stored.form, "rank": rank_of(checkpoint, stored)}
        if any(found[key] != entry[key] for key in found):
            raise LowRankError(
                f"{checkpoint.path}: {name} is {_told(found)} in the files, and {_told(entry)} in config.json",
                hint=_HINT,
            )
    if unknown:
        raise LowRankError(
            f"{checkpoint.path}: config.json names {min(unknown)}, which is no matrix of {type(model).__name__}",
            hint=_HINT,
        )
    return checkpoint


def rank_of(checkpoint: Checkpoint, stored: StoredMatrix) -> int | None:
    """Rank of a matrix as it is stored; None of a dense one."""
    return checkpoint.headers[stored.A].shape[-2] if stored.compressed else None


def _name(stored: StoredMatrix) -> str:
    """As `quantization_config` has it: the path of the module, of experts that of their weight."""
    return stored.matrix.parameter if stored.form == STACKED else stored.matrix.name


def _refuse_missing(checkpoint: Checkpoint, named: Mapping[str, Mapping[str, object]]) -> None:
    sources = sources_by_parameter(checkpoint.meta_model(), checkpoint.headers)
    for name, entry in named.items():
        if entry["form"] == STACKED:
            missing = [one for one in factor_names(name) if not sources[one]]
        else:
            sentinel = sources[f"{name}.weight"]
            path = sentinel[0].header.name.removesuffix("weight") if sentinel else f"{name}."
            wanted = [f"{path}{leaf}" for leaf in ("weight", *COMPRESSED_LEAVES[str(entry["form"])])]
            missing = [one for one in wanted if one not in checkpoint.headers]
        if missing:
            raise LowRankError(
                f"{checkpoint.path}: {name} is {_told(entry)} in config.json, and {missing[0]} is in no file",
                hint=_HINT,
            )


def _told(entry: Mapping[str, object]) -> str:
    return "dense" if entry["rank"] is None else f"{entry['form']} of rank {entry['rank']}"
