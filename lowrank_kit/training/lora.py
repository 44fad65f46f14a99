"""LoRA: adapters beside frozen matrices while training; a whole model, and the adapters apart, when it is done."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowrank_kit.errors import LowRankError, UsageError, need_packages
from lowrank_kit.matrices import find_matrices
from lowrank_kit.training.settings import TrainSettings

logger = logging.getLogger(__name__)

# Folder of the adapters, in the folder of the run.
ADAPTER = "adapter"
# As PEFT names its files, and what it puts before the names of the model.
_CONFIG, _WEIGHTS, _PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


def check_peft() -> None:
    """Refuse `--lora` where PEFT is not installed, before any work.

    Raises:
        UsageError: it is not.
    """
    need_packages(["peft"], extra="lora", wanted_by="--lora")


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
    role_of = {matrix.name: matrix.role.partition(".")[0] for matrix in matrices}  # of a factor that of its layer
    roles = dict.fromkeys(role_of.values())
    if unknown := [role for role in settings.lora_roles if role not in roles]:
        raise UsageError(
            f'no matrix of {type(model).__name__} has the role "{unknown[0]}"', hint=f"its roles: {', '.join(roles)}"
        )
    wanted = [matrix for matrix in matrices if not settings.lora_roles or role_of[matrix.name] in settings.lora_roles]
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
    config = model.peft_config["default"]
    config.target_modules = sorted(config.target_modules)  # a set, whose order is another one in every process
    # Embeddings are never trained here; asked for "auto", PEFT looks the base model up on the hub to find that out.
    model.save_pretrained(folder / ADAPTER, save_embedding_layers=False)
    return model.merge_and_unload(safe_merge=True)


def load_adapters(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Put saved adapters beside the matrices of a model, dense or compressed.

    Args:
        model: the base that they were trained beside.
        folder: with `adapter_config.json` and `adapter_model.safetensors`, as `lowrank train --lora` and PEFT save it.

    Returns:
        The model as PEFT wraps it; `merge_and_unload()` of it is the whole model, in the form it had.

    Raises:
        UsageError: no adapters, or those of another base, which PEFT would load in part or tell of in pages.
        LowRankError: a damaged file.
    """
    check_peft()
    from peft import PeftModel

    base, shapes = _saved_adapters(folder)
    modules = dict(model.named_modules())
    for name, shape in shapes.items():
        path, _, part = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if part not in ("lora_A", "lora_B"):
            continue
        found = _side(modules.get(path), part)
        wanted = shape[1] if part == "lora_A" else shape[0]
        if found != wanted:
            side = "reads" if part == "lora_A" else "makes"
            here = f"{side} {found} numbers" if found else "is no linear layer"
            raise UsageError(
                f"{folder} holds adapters for another base{base and f', {base}'}: {path} {side} {wanted} numbers "
                f"there, and {here} in {model.name_or_path or type(model).__name__}",
                hint="load them onto the model, dense or compressed to the same ranks, that they were trained beside",
            )
    return PeftModel.from_pretrained(model, folder)


def _saved_adapters(folder: Path) -> tuple[str, dict[str, tuple[int, ...]]]:
    """Name of the base, "" where it is not known, and tensor -> shape."""
    if missing := [name for name in (_CONFIG, _WEIGHTS) if not (folder / name).is_file()]:
        raise UsageError(
            f"{folder}: no adapters in this folder, it has no {missing[0]}", hint="lowrank train --lora 16"
        )
    try:
        config = json.loads((folder / _CONFIG).read_text())
        with safe_open(folder / _WEIGHTS, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (ValueError, SafetensorError) as error:
        raise LowRankError(f"{folder}: damaged adapters: {error}", hint="copy or train them again") from error
    return str(config.get("base_model_name_or_path") or ""), shapes


def _side(module: nn.Module | None, part: str) -> int | None:
    """How many numbers a linear layer reads (of lora_A) or makes (of lora_B)."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0 if part == "lora_A" else 1])
    if isinstance(module, nn.Linear):
        return module.in_features if part == "lora_A" else module.out_features
    return None
