"""Lets `AutoModelForCausalLM.from_pretrained` load a compressed folder: a quantizer registered with transformers.

transformers builds the model on the meta device, this exchanges the factorized layers while they are empty, and the
factors are loaded like any other weight: no dense weight is ever in memory.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowrank_kit.checkpoint.headers import TensorHeader, headers_by_name, read_shard
from lowrank_kit.checkpoint.parts import COMPRESSED_LEAVES, check_parts, check_rank, find_parts, refuse_missing
from lowrank_kit.errors import LowRankError
from lowrank_kit.layers import (
    INT8,
    LAYERS,
    STACKED,
    Int8Linear,
    LowRankExperts,
    LowRankLinear,
    LowRankStack,
    PivotedLinear,
    exchange,
)
from lowrank_kit.layers.pivoted import check_index

if TYPE_CHECKING:
    # transformers is still being imported when this module is.
    from transformers import PreTrainedModel

QUANT_METHOD = "lowrank"
# Form of storage -> the format version that brought it. Folders have the lowest that they can do with, so that an older
# lowrank-kit reads what it can, and refuses the rest.
FORMS = {"factors": 1, "pivoted": 2, STACKED: 3} | {f"{form}{INT8}": 4 for form in LAYERS}
FORMAT_VERSION = max(FORMS.values())
_AGAIN = "config.json is damaged: copy or download it again"


def needed_version(matrices: dict[str, dict[str, Any]]) -> int:
    """Format version of a checkpoint with these matrices, as `quantization_config` has them."""
    return max((FORMS[entry["form"]] for entry in matrices.values()), default=1)


class LowRankConfig(QuantizationConfigMixin):
    """`quantization_config` of a compressed checkpoint.

    Args:
        matrices: path of the module, for experts of their weight -> {"rank": r, "form": one of FORMS}.
        format_version: of the checkpoint format; raised to what the forms need.
        quant_method: always "lowrank".
        extra: keys of the same format version that this code does not use; kept when the model is saved again.

    Raises:
        LowRankError: a newer format version, an unknown form or a rank below 1.
    """

    def __init__(
        self,
        matrices: dict[str, dict[str, Any]] | None = None,
        format_version: int = 1,
        quant_method: str = QUANT_METHOD,
        **extra: Any,
    ) -> None:
        if type(format_version) is not int or not 1 <= format_version <= FORMAT_VERSION:
            raise LowRankError(
                f"the checkpoint has format version {format_version!r}, this lowrank-kit reads up to {FORMAT_VERSION}",
                hint="pip install --upgrade lowrank-kit",
            )
        self.quant_method = quant_method
        self.matrices = {} if matrices is None else matrices
        if not isinstance(self.matrices, dict):
            raise LowRankError(
                f"quantization_config: matrices is {self.matrices!r:.80}, not names with ranks", hint=_AGAIN
            )
        for name, entry in self.matrices.items():
            rank, form = (entry.get("rank"), entry.get("form")) if isinstance(entry, dict) else (entry, None)
            if type(rank) is not int or rank < 1 or not isinstance(form, str) or form not in FORMS:
                raise LowRankError(
                    f"quantization_config: {name} has rank {rank!r:.80} and form {form!r:.80}; "
                    f"a rank of at least 1 and one of the forms {', '.join(FORMS)} are wanted",
                    hint=_AGAIN,
                )
        self.format_version = max(format_version, needed_version(self.matrices))
        for key, value in extra.items():
            setattr(self, key, value)


class LowRankQuantizer(HfQuantizer):
    """Exchanges the factorized layers before the weights are loaded, and lets go of the model afterwards."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from transformers.initialization import no_init_weights

        headers = _headers(checkpoint_files or [])
        known = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
        prefix = f"{model.base_model_prefix}."
        with torch.device("meta"), no_init_weights():  # the files have the numbers
            for name, entry in self.quantization_config.matrices.items():
                # AutoModel, or a head on top of it, adds or drops the prefix of the base model.
                candidates = (name, name.removeprefix(prefix), prefix + name)
                found = next((candidate for candidate in candidates if candidate in known), None)
                if found is None and model.base_model is model and "." not in name:
                    continue  # a head, which the base model has not
                if found is None:
                    raise LowRankError(
                        f"quantization_config names {name}, but {type(model).__name__} has no such module or weight",
                        hint="config.json and the model class seem to belong to different models",
                    )
                layer = exchange(model, found, entry["rank"], entry["form"])
                _check_layer(candidates, entry, layer, headers)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, module in model.named_modules():
            if isinstance(module, PivotedLinear) and not module.index.is_meta:
                check_index(module.index, module.out_features, name)
        # A quantizer that stays makes Trainer refuse to train and save_pretrained ignore a given state dict. The
        # config keeps its `quantization_config`, which is all that saving needs.
        for owner, attribute in (
            (model, "hf_quantizer"),
            (model, "quantization_method"),
            (model.config, "_is_quantized"),
        ):
            if hasattr(owner, attribute):
                delattr(owner, attribute)
        model.is_quantized = False
        return model

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Tensor parallelism: what is split of a layer's output is split of B's, what of its input, of A's.

        A pivoted layer has to have all of its output, so that it stays whole, and with it all beside it: what reads
        the whole cannot be split either. Experts of low rank, and layers of 8-bit codes, stay whole too.
        """
        for experts in _plan_names(model, LowRankExperts):
            for name in [name for name in plan if name == experts or name.startswith(f"{experts}.")]:
                del plan[name]
        codes = {name.rpartition(".")[0] for name in _plan_names(model, Int8Linear)}
        for parent in {name.rpartition(".")[0] for name in _plan_names(model, PivotedLinear) | codes}:
            for name in [name for name in plan if name.rpartition(".")[0] == parent]:
                del plan[name]
        for name in _plan_names(model, LowRankLinear):
            leaf = {"colwise": "B", "rowwise": "A"}.get(plan.get(name, ""))
            if leaf is not None:
                plan[f"{name}.{leaf}"] = plan.pop(name)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Factors are ordinary weights."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Factors are ordinary weights."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Factors are ordinary weights."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Two matrix products."""
        return True


def _headers(files: list[str]) -> dict[str, TensorHeader]:
    """Tensor name -> header of the safetensors files that a model is loaded from."""
    paths = [Path(file) for file in files]
    if pickled := [path for path in paths if path.suffix != ".safetensors"]:
        raise LowRankError(
            f"{pickled[0]}: may be a pickle, which is not read: a compressed model has its weights in safetensors",
            hint="copy or download the folder again, or compress the dense model again",
        )
    return headers_by_name(read_shard(path, path.name) for path in paths)


def _check_layer(
    names: tuple[str, ...],
    entry: dict[str, Any],
    layer: LowRankLinear | PivotedLinear | LowRankStack,
    headers: dict[str, TensorHeader],
) -> None:
    """See that the files hold a layer as `quantization_config` describes it: transformers fills in what is not there.

    Args:
        names: that it may have.
        entry: of `quantization_config`.
        layer: empty, as it is to be.
        headers: what is in the files. What they hold under none of the names is left to transformers' renaming.
    """
    if isinstance(layer, LowRankStack):
        return
    for name in names:
        if any(f"{name}.{leaf}" in headers for leaf in ("weight", *COMPRESSED_LEAVES[entry["form"]])):
            found = find_parts(name, headers)
            if found is None:
                refuse_missing(name, entry["form"], headers)
                continue
            rank = check_parts(name, (layer.out_features, layer.in_features), *found)
            check_rank(found[1][0].file, name, entry, found[0], rank)
            return


def _plan_names(model: PreTrainedModel, kind: type[torch.nn.Module]) -> set[str]:
    """Names of the layers of a kind as a parallel plan has them, with a star for the block."""
    layers = (name for name, module in model.named_modules() if isinstance(module, kind))
    return {re.sub(r"\.\d+\.", ".*.", layer) for layer in layers}


def register() -> None:
    """Make transformers know the method "lowrank", by this code and no other; a second call does nothing.

    Another may be there: that of a folder loaded with `trust_remote_code`, see `lowrank_kit.checkpoint.standalone`.
    """
    if AUTO_QUANTIZATION_CONFIG_MAPPING.get(QUANT_METHOD) is LowRankConfig:
        return
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)
    AUTO_QUANTIZER_MAPPING.pop(QUANT_METHOD, None)
    register_quantization_config(QUANT_METHOD)(LowRankConfig)
    register_quantizer(QUANT_METHOD)(LowRankQuantizer)
