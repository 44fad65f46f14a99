"""Load the model and the tokenizer of a checkpoint: whole and fitting together, or refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lowrank_kit.checkpoint.folder import Checkpoint, told_where
from lowrank_kit.checkpoint.quantizer import QUANT_METHOD
from lowrank_kit.data.answers import AnswerTokens
from lowrank_kit.data.blocks import TokenBlocks
from lowrank_kit.errors import LowRankError, UsageError


def load_model(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The causal LM of a checkpoint, dense or compressed, in evaluation mode.

    Args:
        checkpoint: opened, hence with complete files.
        device: where the weights go.
        dtype: of the weights; "auto" is the checkpoint's own.

    Raises:
        LowRankError: it cannot be loaded, or tensors are missing or of another shape; transformers would fill in
            random numbers and only warn.
    """
    _refuse_larger(checkpoint)
    with told_where(checkpoint.path), _told_if_not_loaded():
        model, found = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told in one error below
            trust_remote_code=False,
        )
    if mismatched := sorted(found["mismatched_keys"]):
        name, there, wanted = mismatched[0]
        raise LowRankError(
            f"{checkpoint.path}: {len(mismatched)} tensors have other shapes than {type(model).__name__} asks for, "
            f"first {name}: {list(there)} in the files, {list(wanted)} wanted",
            hint="config.json and the safetensors files seem to belong to different models",
        )
    if missing := sorted(found["missing_keys"]):
        raise LowRankError(
            f"{checkpoint.path}: {len(missing)} tensors of {type(model).__name__} are missing, first {missing[0]}",
            hint="config.json and the safetensors files seem to belong to different models",
        )
    return model.to(device)


def _refuse_larger(checkpoint: Checkpoint) -> None:
    """Refuse a config that asks for far more than is there: transformers would make room for it, and fill it at random.

    Raises:
        LowRankError: with both numbers.
    """
    quantization = checkpoint.config.get("quantization_config") or {"quant_method": QUANT_METHOD}
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        return  # of codes there are fewer than of numbers
    apart = tuple(quantization.get("matrices") or ())
    model = checkpoint.meta_model()
    wanted = sum(p.numel() for name, p in model.named_parameters() if name.removesuffix(".weight") not in apart)
    there = sum(math.prod(header.shape) for header in checkpoint.headers.values())
    if wanted > 2 * there:
        raise LowRankError(
            f"{checkpoint.path}: config.json asks for a model of {wanted:,} numbers, the files hold {there:,}",
            hint="config.json and the safetensors files seem to belong to different models",
        )


@contextmanager
def _told_if_not_loaded() -> Iterator[None]:
    """A config can be wrong in as many ways as there are architectures and quantizers, each with its own exception."""
    try:
        yield
    except (LowRankError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise LowRankError(
            f"the model cannot be loaded: {type(error).__name__}: {reason}",
            hint="config.json asks for a package that is not here, or is damaged: copy or download it again",
        ) from error


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own training flag is put back at the end."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        # Not module.train(), which would set the children too.
        for module in training:
            module.training = True


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder.

    Raises:
        UsageError: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer("a")  # some damage shows with the first text
    # Files missing, damaged or of an unknown kind: each tokenizer class has its own exceptions.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UsageError(f"{folder}: no tokenizer can be loaded ({reason})", hint=_SAVE_TOKENIZER) from error
    # Some classes load from nothing, and then know their special tokens only.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UsageError(f"{folder}: no tokenizer in this folder", hint=_SAVE_TOKENIZER)
    return tokenizer


_SAVE_TOKENIZER = "put the tokenizer's files beside the model: tokenizer.save_pretrained(folder)"


def check_blocks(model: PreTrainedModel, blocks: TokenBlocks | AnswerTokens) -> None:
    """Refuse token ids that the model has no embedding for, and blocks longer than its context.

    Raises:
        UsageError: one of the two, with both numbers.
    """
    name = model.name_or_path or type(model).__name__
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if blocks.largest_id >= vocabulary:
        raise UsageError(
            f"the text has the token id {blocks.largest_id}, but {name} knows {vocabulary} tokens",
            hint="make the blocks with the model's own tokenizer",
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and blocks.block_tokens > context:
        raise UsageError(
            f"blocks of {blocks.block_tokens} tokens are longer than the context of {name}, {context}",
            hint=f"--block-tokens {context}, or fewer",
        )
