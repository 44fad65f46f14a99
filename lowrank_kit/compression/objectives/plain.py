"""Plain: the nearest matrix of a rank."""

from torch import Tensor

from lowrank_kit.compression.objectives.base import Objective, Options, Statistics
from lowrank_kit.linalg.factor import Factors, truncated_svd


def _factorize(W: Tensor, statistics: Statistics, options: Options) -> Factors:
    return truncated_svd(W)


PLAIN = Objective("error of the weights, |W - BA|", _factorize, "Eckart and Young, 1936")
