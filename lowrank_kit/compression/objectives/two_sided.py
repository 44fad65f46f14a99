"""Two-sided: errors count by the inputs they meet and by what they do to the loss."""

from torch import Tensor

from lowrank_kit.compression.objectives.base import Objective, Options, Statistics
from lowrank_kit.linalg.factor import Factors, two_sided_svd


def _factorize(W: Tensor, statistics: Statistics, options: Options) -> Factors:
    assert statistics.gram is not None
    assert statistics.output_gram is not None
    return two_sided_svd(W, statistics.gram, statistics.output_gram, options.damping)


TWO_SIDED = Objective(
    "second-order increase of the loss, |G^1/2 (W - BA) X|",
    _factorize,
    "OBD-LLM, arXiv 2604.00821; IO-SVD, arXiv 2605.15626",
    frozenset({"gram", "output_gram"}),
)
