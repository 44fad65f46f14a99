"""Scaled: errors count by the size of the input they meet."""

from torch import Tensor

from lowrank_kit.compression.objectives.base import Objective, Options, Statistics
from lowrank_kit.linalg.factor import Factors, scaled_svd


def _factorize(W: Tensor, statistics: Statistics, options: Options) -> Factors:
    assert statistics.gram is not None
    return scaled_svd(W, statistics.gram, options.exponent)


SCALED = Objective(
    "error of the weights, columns scaled by the size of their inputs",
    _factorize,
    "ASVD, arXiv 2312.05821",
    frozenset({"gram"}),
)
