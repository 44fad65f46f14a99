"""What allocations want to know of the matrices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from lowrank_kit.checkpoint.folder import Checkpoint, refuse_non_finite
from lowrank_kit.checkpoint.stacks import Unit
from lowrank_kit.compression.allocation import Evidence
from lowrank_kit.compression.targets import foldable as foldable
from lowrank_kit.linalg.spectrum import singular_values_of_gram


def finite_weights(checkpoint: Checkpoint, units: Iterable[Unit]) -> Iterator[tuple[Unit, Tensor]]:
    """`Checkpoint.weights`, each refused that has a number that is none.

    Raises:
        LowRankError: NaN or Inf in a matrix.
    """
    for unit, W in checkpoint.weights(units):
        refuse_non_finite(checkpoint, unit.tensors[0] if unit.count == 1 else unit.matrix.name, W)
        yield unit, W


def weight_evidence(checkpoint: Checkpoint) -> dict[str, Evidence]:
    """Singular values of every matrix that can be factorized, one shard at a time and one weight in memory.

    Those of the experts of a weight are one spectrum in which energies add up.

    Args:
        checkpoint: of a dense model.

    Returns:
        Name of the matrix -> its evidence.

    Raises:
        UsageError: the model has no matrix.
        LowRankError: NaN or Inf in a matrix.
    """
    units = foldable(checkpoint)
    evidence: dict[str, Evidence] = {}
    with tqdm(total=len(units), desc="spectra", unit="matrix", disable=None) as bar:
        for unit, W in finite_weights(checkpoint, units):
            spectra = [singular_values_of_gram(W_OI) for W_OI in (W if W.ndim == 3 else [W])]
            values = torch.stack(spectra).square().sum(0).sqrt() if len(spectra) > 1 else spectra[0]
            evidence[unit.matrix.name] = Evidence(singular_values=values)
            bar.update()
    return evidence
