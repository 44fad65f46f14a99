"""Whiten: the nearest outputs."""

from torch import Tensor

from lowrank_kit.compression.objectives.base import Objective, Options, Statistics
from lowrank_kit.linalg.factor import Factors, whitened_svd


def _factorize(W: Tensor, statistics: Statistics, options: Options) -> Factors:
    assert statistics.gram is not None
    return whitened_svd(W, statistics.gram)


WHITEN = Objective("error of the outputs, |(W - BA) X|", _factorize, "SVD-LLM, arXiv 2403.07378", frozenset({"gram"}))
