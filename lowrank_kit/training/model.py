"""The model a run trains."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lowrank_kit.checkpoint.folder import Checkpoint, told_where
from lowrank_kit.checkpoint.hub import resolve_model
from lowrank_kit.checkpoint.loading import load_model, load_tokenizer
from lowrank_kit.checkpoint.quantizer import LowRankConfig, LowRankQuantizer
from lowrank_kit.errors import DoesNotFitError, UsageError
from lowrank_kit.layers import INT8
from lowrank_kit.scaling.mup import MuP
from lowrank_kit.training.lora import add_adapters, check_peft
from lowrank_kit.training.presets import model_config
from lowrank_kit.training.settings import TrainSettings


def build_model(
    settings: TrainSettings, tokenizer: PreTrainedTokenizerBase, rule: MuP | None = None
) -> PreTrainedModel:
    """The model to train, in float32: random from its config, or the checkpoint to fine-tune, with LoRA adapters.

    Args:
        settings: of the run.
        tokenizer: of the run.
        rule: that scales the random weights.

    Raises:
        UsageError: none can be made, or it cannot keep its attention inside documents and should.
    """
    model = _build(settings, tokenizer) if rule is None else rule.build()
    if settings.packing == "documents":
        check_packing(model)
    return model


def scaling_rule(settings: TrainSettings, tokenizer: PreTrainedTokenizerBase | None) -> MuP | None:
    """What carries the settings over from `mup_base` to the model; None where there is none.

    Args:
        settings: of the run.
        tokenizer: of the run; None where it is still to be trained.

    Raises:
        UsageError: no such base, or one that the model is not a larger one of.
    """
    if settings.mup_base is None:
        return None
    vocabulary = len(tokenizer) if tokenizer else settings.vocab_size
    target = _config(settings, tokenizer, vocab_size=vocabulary)
    base = model_config(settings.mup_base, vocab_size=vocabulary, context=settings.block_tokens)
    return MuP(base, target, optimizer=settings.optimizer, depth=settings.mup_depth_rule)


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
        checkpoint = Checkpoint.open(settings.model)
        _refuse_codes(checkpoint)
        model = load_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
        return model if settings.lora is None else add_adapters(model, settings)
    config = _config(settings, tokenizer, vocab_size=len(tokenizer))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def outline_model(settings: TrainSettings) -> PreTrainedModel:
    """The model of a run on the meta device: names and shapes, no memory. No text is read.

    A tokenizer that is still to be trained counts with all of `vocab_size`, of which a short text yields fewer.

    Raises:
        UsageError: as `build_model`.
        DoesNotFitError: a tensor has more numbers than torch can count.
    """
    if settings.model is not None:
        return _outline_checkpoint(settings, Checkpoint.open(settings.model))
    tokenizer = load_tokenizer(resolve_model(settings.tokenizer)) if settings.tokenizer else None
    config = _config(settings, tokenizer, vocab_size=len(tokenizer) if tokenizer else settings.vocab_size)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except RuntimeError as error:
        raise DoesNotFitError(
            f"{settings.model_config}: a tensor of this model has more bytes than can be counted: {error}",
            hint="--model-config 1m, or another preset",
        ) from error


def _refuse_codes(checkpoint: Checkpoint) -> None:
    """Refuse factors of 8-bit codes, which no step can change by a little."""
    entries = checkpoint.quantization().matrices
    if codes := next((name for name, entry in entries.items() if entry["form"].endswith(INT8)), None):
        raise UsageError(
            f"{checkpoint.path}: {codes} has factors of 8-bit codes, which cannot be trained",
            hint="train the model that lowrank export --to int8 was given, or a dense one",
        )


def _outline_checkpoint(settings: TrainSettings, checkpoint: Checkpoint) -> PreTrainedModel:
    _refuse_codes(checkpoint)
    checkpoint.matrices()  # refuses other numbers than weights, and files that do not fit config.json
    model = checkpoint.meta_model().float()
    compressed = checkpoint.config.get("quantization_config")
    if compressed:
        with told_where(checkpoint.path):
            LowRankQuantizer(LowRankConfig(**compressed)).preprocess_model(model)
    if settings.lora is None:
        return model
    check_peft()
    with torch.device("meta"):
        return add_adapters(model, settings)


def _config(settings: TrainSettings, tokenizer: PreTrainedTokenizerBase | None, *, vocab_size: int) -> PreTrainedConfig:
    """The config of a model from scratch; without a tokenizer all special tokens are 0, as in one trained here."""
    assert settings.model_config is not None
    return model_config(
        settings.model_config,
        vocab_size=vocab_size,
        context=settings.block_tokens,
        bos_token_id=tokenizer.bos_token_id if tokenizer else 0,
        eos_token_id=tokenizer.eos_token_id if tokenizer else 0,
        pad_token_id=tokenizer.pad_token_id if tokenizer else 0,
    )
