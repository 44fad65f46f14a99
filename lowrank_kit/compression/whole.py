"""Refinement end to end: the one stage that has both models whole in memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lowrank_kit.checkpoint.loading import load_model
from lowrank_kit.compression.calibration import timed
from lowrank_kit.compression.fold import Folded, errors_of, others, stored_dtype
from lowrank_kit.compression.plan import Plan
from lowrank_kit.compression.refine import refine_end_to_end
from lowrank_kit.compression.statistics import input_grams
from lowrank_kit.compression.texts import Texts


def refine_whole(
    plan: Plan, sections: Iterable[Folded], texts: Texts, *, device: torch.device, seconds: dict[str, float]
) -> Folded:
    """Train all factors, norms and biases against the dense model.

    Args:
        plan: with settings that leave nothing open.
        sections: what became of each.
        texts: with refinement text.
        device: where both models go, in float32.
        seconds: the time it takes is added here.

    Raises:
        LowRankError: the loss is not finite.
    """
    assert texts.refinement is not None
    settings, made = plan.settings, Folded()
    model = load_model(plan.checkpoint, device=device, dtype=torch.float32)
    for section in sections:
        for piece in section.pieces.values():
            piece.install(model)
        made.pieces |= section.pieces
        made.others |= section.others
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in made.others.items():
            parameters[name].copy_(tensor)
    dense = load_model(plan.checkpoint, device=device, dtype=torch.float32)
    with timed(seconds, "refine end to end"):
        made.refined["end to end"] = refine_end_to_end(
            model,
            dense,
            texts.refinement.ids,
            texts.check.ids,
            epochs=settings.e2e_epochs,
            rate=settings.e2e_rate,
            batch_size=settings.batch_size,
            seed=settings.seed,
            stored=stored_dtype(plan),
        )
    made.pieces = {name: piece.read_back(model) for name, piece in made.pieces.items()}
    made.others = others(plan, model)
    cut = [matrix for piece in made.pieces.values() for matrix in piece.planned.stored.matrices]
    grams = input_grams(dense, cut, texts.check, batch_size=settings.batch_size)
    made.errors = errors_of(plan.checkpoint, made.pieces, grams)
    return made
