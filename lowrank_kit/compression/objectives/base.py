"""What every objective is given and gives back.

Shape legend: O out, I in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

from torch import Tensor

from lowrank_kit.linalg.factor import Factors, stacked


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What a calibration knows of one matrix. Sums over the tokens, in float64.

    Of the experts of a fused weight, Grams have one dimension more in front.

    Args:
        tokens: number of them.
        gram: [I, I], sum of x x^T over the inputs of the dense model.
        output_gram: [O, O], sum of g g^T, g the gradient of a token's loss by the output of the matrix.
        changed_gram: [I, I], sum of y y^T, y the input in the model compressed up to here.
        cross: [I, I], sum of x y^T.
    """

    tokens: int = 0
    gram: Tensor | None = None
    output_gram: Tensor | None = None
    changed_gram: Tensor | None = None
    cross: Tensor | None = None

    def of(self, expert: int) -> Statistics:
        """Those of one expert."""
        grams = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tokens"}
        return replace(self, **{name: gram[expert] for name, gram in grams.items() if gram is not None})


@dataclass(frozen=True, kw_only=True)
class Options:
    """Numbers an objective may ask for.

    Args:
        blend: anchored: 0 keeps the map from the compressed model's inputs, 1 the outputs of the dense model.
        ridge: anchored: how much of the mean of the Gram's diagonal holds the target to W.
        damping: two-sided: how much of the mean of the curvature's diagonal is added to it.
        exponent: scaled: of the size of an input.
    """

    blend: float = 1.0
    ridge: float = 1e-3
    damping: float = 0.1
    exponent: float = 0.5


@dataclass(frozen=True)
class Objective:
    """An objective and how it is reached.

    Args:
        title: what it minimizes.
        one: (W [O, I], statistics, options) -> nested factors of full rank.
        source: where it comes from.
        needs: fields of `Statistics` that it asks for.
    """

    title: str
    one: Callable[[Tensor, Statistics, Options], Factors]
    source: str
    needs: frozenset[str] = field(default=frozenset())

    def factorize(self, W: Tensor, statistics: Statistics, options: Options) -> Factors:
        """Nested factors of full rank, of experts one by one.

        Args:
            W: [O, I], or of E experts [E, O, I].
            statistics: of the same.
            options: numbers that the objective may ask for.
        """
        if W.ndim == 2:
            return self.one(W, statistics, options)
        return stacked([self.one(W_OI, statistics.of(expert), options) for expert, W_OI in enumerate(W)])

    @property
    def needs_text(self) -> bool:
        """Whether it asks for calibration text."""
        return bool(self.needs)

    @property
    def sequential(self) -> bool:
        """Whether it asks for the inputs of the model compressed so far, hence for block after block."""
        return "cross" in self.needs
