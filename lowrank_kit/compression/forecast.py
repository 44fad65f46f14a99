"""What a plan will cost in loss, told before the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lowrank_kit.compression.allocation import Evidence
from lowrank_kit.compression.plan import PlannedMatrix

# Increase of the loss = constant x evidence^power, in nats per token; and the largest factor that an outcome was off:
# fitted to three checkpoints of 0.7M parameters at four budgets (evals/compressor/forecast.py), a guess elsewhere.
# Tails of the curvature take the errors of matrices and tokens to be independent, and are too low for that.
LAWS = {
    ("curvature of the loss", False): (1.6, 0.736, 1.6),
    ("curvature of the loss", True): (0.535, 0.63, 1.6),
    ("singular values of the weights", False): (0.889, 1.36, 7.0),
    ("singular values of the weights", True): (0.129, 1.63, 20.0),
}


def forecast(
    matrices: Sequence[PlannedMatrix], evidence: Mapping[str, Evidence] | None, refine: str
) -> dict[str, float | str] | None:
    """Forecast of the increase in loss, in nats per token, from what is known of the spectra.

    Args:
        matrices: of the plan.
        evidence: name of a matrix -> what is known of it; loss scores are preferred to singular values.
        refine: none, block, e2e or both.

    Returns:
        The forecast, the factor that outcomes lay within, and what it is made from; None without evidence.
    """
    known = [(m, (evidence or {}).get(m.stored.matrix.name, Evidence())) for m in matrices if m.rank is not None]
    if not known:
        return {"nats": 0.0, "factor": 1.0, "from": "nothing is factorized"}
    tails = [one.loss_scores[m.rank :].sum().item() for m, one in known if one.loss_scores is not None]
    cuts = [_cut_share(one.singular_values, m.rank) for m, one in known if one.singular_values is not None]
    if len(tails) == len(known):
        source, amount = "curvature of the loss", sum(tails)
    elif len(cuts) == len(known):
        source, amount = "singular values of the weights", sum(cuts) / len(matrices)
    else:
        return None
    constant, power, factor = LAWS[source, refine != "none"]
    return {"nats": constant * amount**power, "factor": factor, "from": source}


def _cut_share(singular_values: torch.Tensor, rank: int | None) -> float:
    energy = singular_values.double().square()
    total = energy.sum().item()
    return energy[rank:].sum().item() / total if total else 0.0
