"""What a recipe says of matrices by name, role and block: keeps of their own, beside the settings of a compression."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from lowrank_kit.config import to_dict
from lowrank_kit.errors import UsageError, did_you_mean
from lowrank_kit.matrices import Matrix, names_matching
from lowrank_kit.report.files import write_text

# Beside compression.json, where a command needs what cannot be said on the command line.
RECIPE_FILE = "recipe.yaml"
_EXAMPLE = '{role: down, keep: 0.4}, {blocks: 28-31, keep: 0.8} or {match: "*.k_proj", keep: 1.0}'


@dataclass(frozen=True, kw_only=True)
class KeepRule:
    """What is kept of some matrices, each by itself. A matrix has to meet all that is said of it.

    Args:
        keep: fraction of the numbers of each, 0 < keep <= 1; 1 leaves them dense.
        match: pattern of names, as in a shell.
        role: of the matrices, as the plan tells it.
        block: index of their block.
        blocks: first and last of their blocks, as "28-31".

    Raises:
        UsageError: keep outside (0, 1], nothing said of the matrices, or blocks of another form.
    """

    keep: float
    match: str | None = None
    role: str | None = None
    block: int | None = None
    blocks: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise UsageError(f"keep must be in (0, 1], got {self.keep:g}", hint="1 leaves the matrices dense")
        if self.match is self.role is self.block is self.blocks is None:
            raise UsageError("a keep of which matrices is not said", hint=_EXAMPLE)
        if self.block is not None and self.blocks is not None:
            raise UsageError("block and blocks cannot both be said", hint="blocks: 0-3, or block: 0")
        if self.blocks is not None and (not (found := re.fullmatch(r"(\d+)-(\d+)", self.blocks)) or _empty(found)):
            raise UsageError(f'blocks are said as first-last, got "{self.blocks}"', hint="blocks: 28-31")

    def takes(self, matrix: Matrix, matching: Iterable[str]) -> bool:
        """Whether a matrix meets it; `matching` are the names that its pattern matches."""
        return (
            (self.match is None or matrix.name in matching)
            and (self.role is None or matrix.role == self.role)
            and (self.block is None or matrix.block == self.block)
            and (self.blocks is None or (matrix.block is not None and matrix.block in self._range))
        )

    @property
    def _range(self) -> range:
        assert self.blocks is not None
        first, last = map(int, self.blocks.split("-"))
        return range(first, last + 1)

    @property
    def words(self) -> str:
        """As one would write it."""
        return ", ".join(f"{name}: {value}" for name, value in to_dict(self).items() if value is not None)


def own_keeps(rules: Iterable[KeepRule], matrices: Iterable[Matrix]) -> dict[str, Fraction]:
    """Name of a matrix -> its own keep as it is written, by the first rule that takes it.

    Raises:
        UsageError: a rule takes no matrix, the rules before it left aside.
    """
    matrices = list(matrices)
    names = [matrix.name for matrix in matrices]
    found: dict[str, Fraction] = {}
    for rule in rules:
        matching = set() if rule.match is None else set(names_matching(rule.match, names, "matrices"))
        taken = [matrix.name for matrix in matrices if rule.takes(matrix, matching)]
        if not taken:
            raise UsageError(
                f"the recipe's {{{rule.words}}} takes none of {len(names)} matrices", hint=_hint(rule, matrices)
            )
        for name in taken:
            found.setdefault(name, Fraction(str(rule.keep)))
    return found


def write_recipe(folder: Path, rules: Iterable[KeepRule]) -> None:
    """Write the rules as a recipe that the command can name."""
    keeps = [{name: value for name, value in to_dict(rule).items() if value is not None} for rule in rules]
    document: dict[str, Any] = {"keeps": keeps}
    write_text(folder / RECIPE_FILE, yaml.safe_dump(document, sort_keys=False, allow_unicode=True))


def _hint(rule: KeepRule, matrices: list[Matrix]) -> str:
    roles = {matrix.role for matrix in matrices}
    if rule.role is not None and rule.role not in roles:
        return did_you_mean(rule.role, roles)
    blocks = [matrix.block for matrix in matrices if matrix.block is not None]
    return f"blocks are {min(blocks)} to {max(blocks)}; all that a rule says has to hold" if blocks else _EXAMPLE


def _empty(found: re.Match[str]) -> bool:
    return int(found[1]) > int(found[2])
