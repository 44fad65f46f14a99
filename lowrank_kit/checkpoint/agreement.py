"""Whether config.json and the tensors of a folder say the same of its matrices of low rank."""

from __future__ import annotations

from collections.abc import Mapping

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.parts import COMPRESSED_LEAVES
from lowrank_kit.checkpoint.stored import factor_names, sources_by_parameter
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
    known = {stored.entry_name for stored in checkpoint.matrices()}
    if unknown := set(named) - known:
        raise LowRankError(
            f"{checkpoint.path}: config.json names {min(unknown)}, which is no matrix of {type(model).__name__}",
            hint=_HINT,
        )
    return checkpoint


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
                f"{checkpoint.path}: {name} has rank {entry['rank']}, form {entry['form']} in config.json, and "
                f"{missing[0]} is in no file",
                hint=_HINT,
            )
