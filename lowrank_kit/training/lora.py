"""LoRA: adapters beside frozen matrices while training; a whole model, and the adapters apart, when it is done."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import PreTrainedModel

from lowrank_kit.errors import UsageError
from lowrank_kit.matrices import find_matrices
from lowrank_kit.training.settings import TrainSettings

logger = logging.getLogger(__name__)

# Folder of the adapters, in the folder of the run.
ADAPTER = "adapter"


def check_peft() -> None:
    """Refuse `--lora` where PEFT is not installed, before any work.

    Raises:
        UsageError: it is not.
    """
    try:
        import peft  # noqa: F401
    except ImportError:
        raise UsageError(
            "--lora needs the package peft, which is not installed", hint='pip install peft, or ".[lora]" in a clone'
        ) from None


def add_adapters(model: PreTrainedModel, settings: TrainSettings) -> PreTrainedModel:
    """Freeze a model and put an adapter of rank `settings.lora` beside each of its matrices.

    Fused experts get none. In a compressed model the adapters stand beside the factors.

    Args:
        model: the whole model.
        settings: rank, alpha and roles.

    Returns:
        The model as PEFT wraps it; the adapters are the only trainable parameters, and begin as zero.

    Raises:
        UsageError: a role that no matrix has, or only fused experts.
    """
    from peft import LoraConfig, get_peft_model

    assert settings.lora is not None
    matrices = find_matrices(model)
    roles = dict.fromkeys(matrix.role for matrix in matrices)
    if unknown := [role for role in settings.lora_roles if role not in roles]:
        raise UsageError(
            f'no matrix of {type(model).__name__} has the role "{unknown[0]}"', hint=f"its roles: {', '.join(roles)}"
        )
    wanted = [matrix for matrix in matrices if not settings.lora_roles or matrix.role in settings.lora_roles]
    plain = [matrix for matrix in wanted if matrix.expert is None]
    if not plain:
        raise UsageError(
            f"no adapter can be made: all {len(wanted)} matrices are fused experts", hint="leave out --lora"
        )
    if len(plain) < len(wanted):
        logger.warning("%d of %d matrices are fused experts and get no adapter", len(wanted) - len(plain), len(wanted))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora,
        lora_alpha=settings.chosen_lora_alpha,
        # Whole names: PEFT takes one that is the end of another module's name for that one too.
        target_modules=[matrix.name for matrix in plain],
        fan_in_fan_out=plain[0].transposed,
    )
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = settings.model
    return adapted


def save_adapters(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Save the adapters in PEFT's format in `folder`/adapter, and merge them into the model.

    Returns:
        The whole model, dense or compressed as it was, with the names and shapes it had.
    """
    # Embeddings are never trained here; asked for "auto", PEFT looks the base model up on the hub to find that out.
    model.save_pretrained(folder / ADAPTER, save_embedding_layers=False)
    return model.merge_and_unload(safe_merge=True)
