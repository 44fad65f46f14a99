"""What a model multiplies its embeddings with before the first block: by sqrt(width) as Gemma does, most by 1."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lowrank_kit.matrices import block_path
from lowrank_kit.scaling.parts import find_parts
from lowrank_kit.scaling.sizes import cut_vocabulary, set_depth

_VOCABULARY = 8


def embedding_scale(config: PreTrainedConfig) -> float:
    """The factor, found by running what lies before the first block; 1 where a norm there makes it no matter.

    Args:
        config: of a causal LM of any width: blocks are not built.
    """
    small = copy.deepcopy(config)
    set_depth(small, 1)
    cut_vocabulary(small, _VOCABULARY)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small, dtype=torch.float64).eval()
    block = next(block_path(part.name) for part in find_parts(model).values() if part.inside)
    _fill_outside(model, block)
    embeddings: nn.Parameter = model.get_input_embeddings().weight
    signs = torch.ones_like(embeddings)
    signs[:, ::3] = -1
    nothing, once, twice = (_read_by(model, block, embeddings, by * signs) for by in (0, 1, 2))
    added = once - nothing  # to positions that are no embeddings
    if not torch.allclose(twice - nothing, 2 * added):
        return 1.0
    return float((added / signs[1])[0, 0, 0])


def _fill_outside(model: PreTrainedModel, block: str) -> None:
    """Give what is outside of the block its memory and values; all other embeddings, of positions, are 0."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for path, module in model.named_modules():
            if path == block or path.startswith(f"{block}."):
                continue
            module.to_empty(device="cpu", recurse=False)
            model._init_weights(module)
            if isinstance(module, nn.Embedding):
                module.weight.zero_()


class _Reached(Exception):
    """The first block was called."""


@torch.no_grad()
def _read_by(model: PreTrainedModel, block: str, embeddings: nn.Parameter, values: Tensor) -> Tensor:
    read: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read.append((args[0] if args else kwargs["hidden_states"]).clone())
        raise _Reached

    embeddings.copy_(values)
    handle = model.get_submodule(block).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with suppress(_Reached):
            model(input_ids=torch.ones(1, 2, dtype=torch.long), use_cache=False)
    finally:
        handle.remove()
    return read[0]
