"""Anchored: the nearest outputs on the inputs that the compressed model really has."""

from torch import Tensor

from lowrank_kit.compression.objectives.base import Objective, Options, Statistics
from lowrank_kit.linalg.factor import Factors, anchored_target, ridged, whitened_svd


def _factorize(W: Tensor, statistics: Statistics, options: Options) -> Factors:
    assert statistics.changed_gram is not None
    assert statistics.cross is not None
    gram = statistics.changed_gram
    target = anchored_target(W, gram, statistics.cross, options.blend, options.ridge)
    return whitened_svd(target, ridged(gram, options.ridge))


ANCHORED = Objective(
    "error of the outputs on the compressed model's inputs Y, |W ((1 - b) Y + b X) - BA Y|",
    _factorize,
    "AA-SVD, arXiv 2604.02119; SAES-SVD, arXiv 2602.03051",
    frozenset({"changed_gram", "cross"}),
)
