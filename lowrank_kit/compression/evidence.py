"""What allocations want to know of the matrices."""

from __future__ import annotations

from tqdm import tqdm

from lowrank_kit.checkpoint.folder import Checkpoint, refuse_non_finite
from lowrank_kit.compression.allocation import Evidence
from lowrank_kit.compression.targets import foldable as foldable
from lowrank_kit.linalg.spectrum import singular_values_of_gram


def weight_evidence(checkpoint: Checkpoint) -> dict[str, Evidence]:
    """Singular values of every matrix that can be factorized, one shard at a time and one tensor in memory.

    Args:
        checkpoint: of a dense model.

    Returns:
        Name of the matrix -> its evidence.

    Raises:
        UsageError: the model has no matrix.
        LowRankError: NaN or Inf in a matrix.
    """
    stored = {s.tensors[0]: s for s in foldable(checkpoint)}
    evidence: dict[str, Evidence] = {}
    with tqdm(total=len(stored), desc="spectra", unit="matrix", disable=None) as bar:
        for name, tensor in checkpoint.tensors(stored):
            refuse_non_finite(checkpoint, name, tensor)
            values = singular_values_of_gram(stored[name].weight(tensor))
            evidence[stored[name].matrix.name] = Evidence(singular_values=values)
            bar.update()
    return evidence
