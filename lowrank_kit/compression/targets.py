"""Which matrices a compression may factorize, and what is said of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from fractions import Fraction

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.stacks import Unit
from lowrank_kit.compression.recipe import own_keeps
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.errors import UsageError
from lowrank_kit.matrices import embedding_names, find_head, names_matching

EXCLUDED, NOT_INCLUDED = "excluded", "not included"


@dataclass(frozen=True)
class Targets:
    """What the settings say of matrices by name.

    Args:
        dense: name of a matrix that is no target -> why.
        keeps: name of a target -> its own keep.
    """

    dense: dict[str, str] = field(default_factory=dict)
    keeps: dict[str, Fraction] = field(default_factory=dict)


def targeted(checkpoint: Checkpoint, settings: CompressSettings) -> Checkpoint:
    """The checkpoint as the settings want it: with its LM head among the matrices if an include names the head.

    Raises:
        UsageError: a head that is tied to the embeddings, or none.
    """
    if not settings.include or checkpoint.head:
        return checkpoint
    model = checkpoint.meta_model()
    ends = set(embedding_names(model)) & set(settings.include)
    return checkpoint.with_head() if ends and find_head(model).name in ends else checkpoint


def targets(checkpoint: Checkpoint, settings: CompressSettings) -> Targets:
    """Sort the matrices by what include, exclude and keeps say.

    Args:
        checkpoint: as `targeted` gives it.
        settings: with the patterns.

    Raises:
        UsageError: a pattern or a rule without a matrix, embeddings included, nothing left to factorize.
    """
    units = checkpoint.units()
    matrices = [unit.matrix for unit in units]
    names = [matrix.name for matrix in matrices]
    included = _matching(settings.include, names, checkpoint)
    excluded = _matching(settings.exclude, names, checkpoint)
    dense = {unit.matrix.name: unit.reason for unit in units if unit.reason}
    dense |= {name: NOT_INCLUDED for name in names if settings.include and name not in included}
    dense |= dict.fromkeys((name for name in names if name in excluded), EXCLUDED)
    if len(dense) == len(names) and (settings.include or settings.exclude):
        raise UsageError(
            f"nothing is left to factorize: {len(names)} of {len(names)} matrices stay dense",
            hint="fewer --exclude, or a wider --include",
        )
    keeps = own_keeps(settings.keeps, matrices)
    return Targets(dense, {name: keep for name, keep in keeps.items() if name not in dense})


def foldable(checkpoint: Checkpoint, settings: CompressSettings | None = None) -> list[Unit]:
    """What may be factorized, of what the settings leave: matrices, and the experts of a fused weight together."""
    dense = targets(checkpoint, settings).dense if settings is not None else {}
    return [unit for unit in checkpoint.units() if not unit.reason and unit.matrix.name not in dense]


def _matching(patterns: Iterable[str], names: list[str], checkpoint: Checkpoint) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) or name == pattern for name in names):
            _refuse_embeddings(pattern, checkpoint)
        found.update(names_matching(pattern, names, "matrices"))
    return found


def _refuse_embeddings(pattern: str, checkpoint: Checkpoint) -> None:
    """Say of a pattern that matches no matrix, but embeddings or the head, that these are none."""
    model = checkpoint.meta_model()
    matched = [name for name in embedding_names(model) if fnmatchcase(name, pattern)]
    if not matched:
        return
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
    if head in matched:
        raise UsageError(
            f'the pattern "{pattern}" matches no matrix, only the LM head: it is a target by its full name alone',
            hint=f"--include {head}; it stays dense unless it is included",
        )
    raise UsageError(
        f'the pattern "{pattern}" matches no matrix, only the embeddings {", ".join(matched)}, which stay dense',
        hint="a row is looked up, not multiplied: leave the pattern out",
    )
