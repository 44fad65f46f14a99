"""Compressed folders in vLLM: a plugin that vLLM finds by its entry point, where both are installed.

`vllm serve FOLDER` then takes a folder of `lowrank compress` as it is. Matrices that vLLM runs as one (q, k, v; gate,
up) are one product with all A and one with each B; what stays dense among them is dense. A pivoted matrix is made into
factors when it is loaded. Refused, each with one error: tensor parallelism, experts of low rank, a factorized head.

What is tested of this: the arithmetic and the loading without vLLM, and the classes below against stand-ins with the
interface that vLLM 0.33 has in its sources. Not tested: vLLM itself, so no model served, no CUDA graph, no GPU. Its
`transformers` backend is not for these folders.
"""

from __future__ import annotations

from typing import Any

QUANT_METHOD = "lowrank"


def register() -> None:
    """Make vLLM know the method "lowrank"; a second call does nothing. vLLM calls this in each of its processes."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(_config_class())


def _config_class() -> type:
    """The config, a subclass of vLLM's own, which there is only where vLLM is."""
    import torch
    from torch import Tensor, nn
    from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    from lowrank_kit.serving import fused
    from lowrank_kit.serving.checks import check_matrices, refuse_head, refuse_sharded

    class LowRankMethod(LinearMethodBase):
        """Weights and forward of one layer of vLLM, some of whose matrices are of low rank."""

        def __init__(self, prefix: str, config: VllmLowRankConfig) -> None:
            self.prefix, self.config = prefix, config

        def create_weights(
            self,
            layer: nn.Module,
            input_size_per_partition: int,
            output_partition_sizes: list[int],
            input_size: int,
            output_size: int,
            params_dtype: torch.dtype,
            **extra: Any,
        ) -> None:
            """Parameters under the names of the checkpoint."""
            refuse_sharded(
                self.prefix, (input_size_per_partition, sum(output_partition_sizes)), (input_size, output_size)
            )
            parts = self.config.parts(self.prefix, output_partition_sizes)
            fused.create_weights(layer, parts, input_size, params_dtype)

        def process_weights_after_loading(self, layer: nn.Module) -> None:
            """Refuse what is not whole, and make factors of what is pivoted."""
            fused.finish(layer)

        def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
            """The outputs of the parts side by side."""
            return fused.apply(layer, x, bias)

    class VllmLowRankConfig(QuantizationConfig):
        """`quantization_config` of a compressed folder, as vLLM takes it."""

        def __init__(self, matrices: dict[str, dict[str, Any]]) -> None:
            super().__init__()
            self.matrices = matrices

        @classmethod
        def get_name(cls) -> str:
            """Of the method."""
            return QUANT_METHOD

        @classmethod
        def get_supported_act_dtypes(cls) -> list[torch.dtype]:
            """Those of any linear layer."""
            return [torch.bfloat16, torch.float16, torch.float32]

        @classmethod
        def get_min_capability(cls) -> int:
            """Plain matrix products run everywhere."""
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            """All is in config.json."""
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> VllmLowRankConfig:
            """From `quantization_config`; refuses a newer format and experts of low rank."""
            return cls(check_matrices(config))

        def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
            """Take the names that vLLM gives the modules, those of the parts of fused ones as they are."""
            renamed = getattr(hf_to_vllm_mapper, "get_rename_mapper", lambda: hf_to_vllm_mapper)()
            self.matrices = renamed.apply_dict(self.matrices)

        def parts(self, prefix: str, output_sizes: list[int]) -> list[fused.Part]:
            """The matrices of a layer."""
            return fused.parts_of(prefix, self.packed_modules_mapping, self.matrices, output_sizes)

        def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
            """How a layer is run: ours if one of its matrices is of low rank."""
            if not isinstance(layer, LinearBase):
                refuse_head(prefix, self.matrices)
                return None
            names = {prefix, *fused.names_in(prefix, self.packed_modules_mapping)}
            return UnquantizedLinearMethod() if names.isdisjoint(self.matrices) else LowRankMethod(prefix, self)

    return VllmLowRankConfig
