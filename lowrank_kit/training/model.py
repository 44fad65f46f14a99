"""The model a run trains."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.loading import load_model
from lowrank_kit.training.presets import model_config
from lowrank_kit.training.settings import TrainSettings


def build_model(settings: TrainSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model to train, in float32: random from its config, or the checkpoint to fine-tune."""
    if settings.model is not None:
        return load_model(Checkpoint.open(settings.model), device=torch.device("cpu"), dtype=torch.float32)
    assert settings.model_config is not None
    config = model_config(
        settings.model_config,
        vocab_size=len(tokenizer),
        context=settings.block_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
