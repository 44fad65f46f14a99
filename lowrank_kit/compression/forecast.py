"""What a plan will cost in loss, told before the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lowrank_kit.compression.allocation import Evidence
from lowrank_kit.compression.plan import PlannedMatrix

# Errors of matrices and tokens add up coherently, where the curvature of each matrix takes them to be independent: the
# median of outcome / sum of tails, in evals/compressor. The outcomes lay within a factor of LOSS_SPREAD of it.
LOSS_FACTOR, LOSS_SPREAD = 6.5, 1.6
# Nats per token = SPECTRUM_FACTOR x (mean share of the energy of W that is cut)^SPECTRUM_POWER, fitted there too.
SPECTRUM_FACTOR, SPECTRUM_POWER, SPECTRUM_SPREAD = 10.0, 1.2, 3.0
# What a refinement leaves of the increase, there.
LEFT_BY = {"none": 1.0, "block": 0.4, "e2e": 0.3, "both": 0.3}


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
    if all(one.loss_scores is not None for _, one in known):
        nats = LOSS_FACTOR * sum(
            float(one.loss_scores[m.rank :].sum()) for m, one in known if one.loss_scores is not None
        )
        factor, source = LOSS_SPREAD, "curvature of the loss"
    elif all(one.singular_values is not None for _, one in known):
        cut = [_cut_share(one.singular_values, m.rank) for m, one in known if one.singular_values is not None]
        nats = SPECTRUM_FACTOR * (sum(cut) / len(matrices)) ** SPECTRUM_POWER
        factor, source = SPECTRUM_SPREAD, "singular values of the weights"
    else:
        return None
    return {"nats": LEFT_BY[refine] * nats, "factor": factor, "from": source}


def _cut_share(singular_values: torch.Tensor, rank: int | None) -> float:
    energy = singular_values.double().square()
    total = energy.sum().item()
    return energy[rank:].sum().item() / total if total else 0.0
