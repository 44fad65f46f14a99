"""Anchored: the nearest outputs on the inputs that the compressed model really has, errors by size or by loss."""

from torch import Tensor

from lowrank_kit.compression.objectives.base import Objective, Options, Statistics
from lowrank_kit.linalg.factor import Factors, anchored_target, ridged, two_sided_svd, whitened_svd


def _target_and_gram(W: Tensor, statistics: Statistics, options: Options) -> tuple[Tensor, Tensor]:
    assert statistics.changed_gram is not None
    assert statistics.cross is not None
    gram = statistics.changed_gram
    target = anchored_target(W, gram, statistics.cross, options.blend, options.ridge)
    return target, ridged(gram, options.ridge)


def _anchored(W: Tensor, statistics: Statistics, options: Options) -> Factors:
    return whitened_svd(*_target_and_gram(W, statistics, options))


def _anchored_two_sided(W: Tensor, statistics: Statistics, options: Options) -> Factors:
    assert statistics.output_gram is not None
    target, gram = _target_and_gram(W, statistics, options)
    return two_sided_svd(target, gram, statistics.output_gram, options.damping)


ANCHORED = Objective(
    "error of the outputs on the compressed model's inputs Y, |W ((1 - b) Y + b X) - BA Y|",
    _anchored,
    "AA-SVD, arXiv 2604.02119; SAES-SVD, arXiv 2602.03051",
    frozenset({"changed_gram", "cross"}),
)
ANCHORED_TWO_SIDED = Objective(
    "the same, errors weighed by what they do to the loss",
    _anchored_two_sided,
    "the sum of the two, in no paper we know of",
    frozenset({"changed_gram", "cross", "output_gram"}),
)
