"""The model a run trains."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.loading import load_model
from lowrank_kit.errors import UsageError
from lowrank_kit.training.lora import add_adapters, check_peft
from lowrank_kit.training.presets import model_config
from lowrank_kit.training.settings import TrainSettings


def build_model(settings: TrainSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model to train, in float32: random from its config, or the checkpoint to fine-tune, with LoRA adapters.

    Raises:
        UsageError: none can be made, or it cannot keep its attention inside documents and should.
    """
    model = _build(settings, tokenizer)
    if settings.packing == "documents":
        check_packing(model)
    return model


def check_packing(model: PreTrainedModel) -> None:
    """Refuse a model whose logits depend on the document before, where position ids begin at 0 with each document.

    Raises:
        UsageError: they do, or the model takes no position ids.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    # Two rows that differ in the first document only.
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 4, 5, 6]]) % vocabulary
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            output = model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2] * 2] * 2), use_cache=False)
    except TypeError:
        kept_apart = False
    else:
        one, other = output.logits[:, 3:].float()
        kept_apart = torch.allclose(one, other, rtol=0, atol=1e-5 * float(one.abs().max()))
    finally:
        model.train(training)
    if not kept_apart:
        raise UsageError(
            f"{type(model).__name__} cannot keep its attention inside documents", hint="--packing blocks, the default"
        )


def _build(settings: TrainSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    if settings.model is not None:
        if settings.lora is not None:
            check_peft()
        model = load_model(Checkpoint.open(settings.model), device=torch.device("cpu"), dtype=torch.float32)
        return model if settings.lora is None else add_adapters(model, settings)
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
