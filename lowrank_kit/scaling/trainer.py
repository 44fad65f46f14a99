"""The training function of a sweep: a base config at any width and depth, under any rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lowrank_kit.scaling.family import Size, resized
from lowrank_kit.scaling.mup import MuP
from lowrank_kit.scaling.transfer import RULES
from lowrank_kit.scaling.trial import TrialSettings, draw_batches, train_rates


class SizeTrainer:
    """Trains models of one architecture and reads the same batches at every size.

    Args:
        base: config of the base.
        blocks: int [N, T] token ids.
        settings: of the training.
        prepare: changes a model that has just been initialized, in place.
        device: to train on.
    """

    def __init__(
        self,
        base: PreTrainedConfig,
        blocks: Tensor,
        settings: TrialSettings,
        *,
        prepare: Callable[[PreTrainedModel], None] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.base, self.blocks, self.settings, self.prepare = base, blocks, settings, prepare
        self.device = device

    def __call__(self, size: Size, rule: str, rates: Sequence[float], seed: int) -> list[float]:
        """Losses at learning rates, as `train_rates` gives them."""
        target = resized(self.base, size)
        depth = RULES[rule]
        scaling = None if depth is None else MuP(self.base, target, optimizer=self.settings.optimizer, depth=depth)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build(target, scaling).to(self.device)
            batches = draw_batches(self.blocks, self.settings, seed).to(self.device)
            return train_rates(model, scaling, batches, rates, self.settings)

    def build(self, target: PreTrainedConfig, scaling: MuP | None) -> PreTrainedModel:
        """A model in float32 that an ensemble can be made of."""
        model = AutoModelForCausalLM.from_config(target, dtype=torch.float32) if scaling is None else scaling.build()
        model.set_attn_implementation("eager")  # others are one call for one model
        if self.prepare is not None:
            self.prepare(model)
        return model
