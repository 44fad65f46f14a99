"""What a factorization minimizes. A new objective is a function in `linalg/` and a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lowrank_kit.linalg.factor import Factors, truncated_svd, whitened_svd


@dataclass(frozen=True)
class Objective:
    """An objective and how it is reached.

    Args:
        title: what it minimizes.
        needs_gram: whether it asks for the Gram of the inputs, hence for calibration text.
        factorize: (W [out, in], Gram [in, in] or None) -> nested factors of full rank.
        source: where it comes from.
    """

    title: str
    needs_gram: bool
    factorize: Callable[[Tensor, Tensor | None], Factors]
    source: str


def _plain(W: Tensor, gram: Tensor | None) -> Factors:
    return truncated_svd(W)


def _whiten(W: Tensor, gram: Tensor | None) -> Factors:
    assert gram is not None
    return whitened_svd(W, gram)


OBJECTIVES: dict[str, Objective] = {
    "plain": Objective("error of the weights, |W - BA|", False, _plain, "Eckart and Young, 1936"),
    "whiten": Objective("error of the outputs, |(W - BA) X|", True, _whiten, "SVD-LLM, arXiv 2403.07378"),
}
