"""The layers of a serving engine that has q, k, v and gate, up in one: one product with all A, then one with each B.

Plain torch; nothing here knows an engine. A layer of the engine is given parameters under the names of the checkpoint
(`A.weight`, `B.weight`, `C.weight`, `index`, `weight`, `B.bias`), each with a `weight_loader` that is called with a
tensor from the file and, in a fused layer, the part that it is of: "q", "k", "v" or a number.

Shape legend: O out, I in, R rank of a part, S sum of the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_kit.errors import LowRankError
from lowrank_kit.linalg.pivot import expand

Loader = Callable[..., None]
# What an engine calls the parts of its fused attention input.
_PARTS = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True)
class Part:
    """One matrix of the checkpoint in a layer of the engine.

    Args:
        name: in the checkpoint.
        out_features: O.
        form: "factors", "pivoted", or "dense".
        rank: R; 0 of a dense one.
    """

    name: str
    out_features: int
    form: str = "dense"
    rank: int = 0


def parts_of(
    prefix: str,
    packed: Mapping[str, Sequence[str]],
    matrices: Mapping[str, Mapping[str, Any]],
    output_sizes: Sequence[int],
) -> list[Part]:
    """The matrices that a layer of the engine is made of.

    Args:
        prefix: path of the layer in the engine, as `model.layers.0.self_attn.qkv_proj`.
        packed: name of a fused layer -> names of its parts in the checkpoint.
        matrices: of `quantization_config`.
        output_sizes: outputs of each part, as the engine has them; of one that is fused in the checkpoint too, any.

    Raises:
        LowRankError: other parts than the engine has outputs of.
    """
    names = [prefix] if prefix in matrices else names_in(prefix, packed)
    sizes = [sum(output_sizes)] if len(names) == 1 else list(output_sizes)
    if len(names) != len(sizes):
        raise LowRankError(f"{prefix}: {len(names)} parts in the checkpoint, {len(sizes)} in the engine")
    return [Part(name, size, **matrices.get(name, {})) for name, size in zip(names, sizes, strict=True)]


def names_in(prefix: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
    """Names in the checkpoint of what is fused in a layer; of one that is not, its own."""
    owner, dot, leaf = prefix.rpartition(".")
    return [f"{owner}{dot}{part}" for part in packed.get(leaf, [leaf])]


class _Loaded(nn.Module):
    """Parameters under the names that the checkpoint has below `A`, `B` and `C`."""


def create_weights(layer: Any, parts: Sequence[Part], in_features: int, dtype: torch.dtype) -> None:
    """Give a layer its parameters, empty and ready to be loaded.

    Args:
        layer: of the engine; its `bias`, if it has one, may be made later.
        parts: some of them of low rank.
        in_features: I.
        dtype: of the parameters.
    """
    layer.lowrank_parts, layer.lowrank_loaded = tuple(parts), dict[tuple[int, str], Tensor | None]()
    layer.A, layer.B, layer.C = _Loaded(), _Loaded(), _Loaded()
    _register(layer.A, "weight", torch.empty(sum(p.rank for p in parts), in_features, dtype=dtype), _load_a(layer))
    for number, part in enumerate(parts):
        shape = (part.out_features, part.rank) if part.rank else (part.out_features, in_features)
        _register(layer.B, f"part_{number}", torch.empty(shape, dtype=dtype))
    # Names of the checkpoint that lead to places in the parts: empty themselves.
    _register(layer.B, "weight", torch.empty(0, dtype=dtype), _load_b(layer))
    _register(layer.B, "bias", torch.empty(0, dtype=dtype), _load_bias(layer))
    _register(layer.C, "weight", torch.empty(0, dtype=dtype), _load_later(layer, "C"))
    _register(layer, "index", torch.empty(0, dtype=torch.int32), _load_later(layer, "index"))
    _register(layer, "weight", torch.empty(0, dtype=dtype), _load_weight(layer))


def finish(layer: Any) -> None:
    """Make B of what is pivoted, once all is loaded. A second call does nothing.

    Raises:
        LowRankError: a tensor of the layer was not in the checkpoint.
    """
    loaded = layer.lowrank_loaded
    for number, part in enumerate(layer.lowrank_parts):
        wanted = {"dense": ["weight"], "factors": ["A", "B"], "pivoted": ["A", "C", "index"]}[part.form]
        if missing := [name for name in wanted if (number, name) not in loaded]:
            raise LowRankError(
                f"{part.name}: {missing[0]} is missing in the checkpoint", hint="copy or download the model again"
            )
        coefficients, index = loaded.get((number, "C")), loaded.get((number, "index"))
        if coefficients is not None and index is not None:
            B = layer.B.get_parameter(f"part_{number}")
            B.data.copy_(expand(coefficients.to(B.device), index.to(B.device)))
            loaded[number, "C"] = loaded[number, "index"] = None


def apply(layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """What the layer makes of x [..., I]: [..., sum of O], the parts side by side."""
    parts = layer.lowrank_parts
    weights = [layer.B.get_parameter(f"part_{number}") for number in range(len(parts))]
    return fused_linear(x, layer.A.weight, weights, [part.rank for part in parts], bias)


def fused_linear(
    x: Tensor, A: Tensor, weights: Sequence[Tensor], ranks: Sequence[int], bias: Tensor | None = None
) -> Tensor:
    """Outputs of matrices that read the same input, side by side.

    Args:
        x: [..., I].
        A: [S, I], those of the parts one below the other.
        weights: of each part B [O, R], or of one with rank 0 its weight [O, I].
        ranks: of the parts.
        bias: [sum of O].

    Returns:
        [..., sum of O].
    """
    inner = nn.functional.linear(x, A).split([rank for rank in ranks if rank], dim=-1)
    biases = [None] * len(weights) if bias is None else bias.split([len(weight) for weight in weights])
    reads = iter(inner)
    outputs = [
        nn.functional.linear(next(reads) if rank else x, weight, part_bias)
        for rank, weight, part_bias in zip(ranks, weights, biases, strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _register(owner: nn.Module, name: str, tensor: Tensor, loader: Loader | None = None) -> None:
    parameter: Any = nn.Parameter(tensor, requires_grad=False)
    if loader is not None:
        parameter.weight_loader = loader
    owner.register_parameter(name, parameter)


def _part(layer: Any, shard: str | int | None, what: str) -> tuple[int, Part]:
    """Number and part that a tensor is of, noted as loaded."""
    parts = layer.lowrank_parts
    if isinstance(shard, tuple) or (shard is None and len(parts) > 1):
        raise LowRankError(f"{parts[0].name}: one {what} for several parts, {len(parts)} are wanted")
    number = _PARTS[shard] if isinstance(shard, str) else shard or 0
    layer.lowrank_loaded[number, what] = None
    return number, parts[number]


def _copy(target: Tensor, loaded: Tensor, part: Part, what: str) -> None:
    if target.shape != loaded.shape:
        raise LowRankError(
            f"{part.name}: {what} is {list(loaded.shape)} in the checkpoint, {list(target.shape)} by config.json",
            hint="config.json and the safetensors files seem to belong to different models",
        )
    target.copy_(loaded)


def _load_a(layer: Any) -> Loader:
    def load(parameter: Tensor, loaded: Tensor, shard: Any = None) -> None:
        number, part = _part(layer, shard, "A")
        start = sum(one.rank for one in layer.lowrank_parts[:number])
        _copy(parameter.data[start : start + part.rank], loaded, part, "A")

    return load


def _load_b(layer: Any) -> Loader:
    def load(parameter: Tensor, loaded: Tensor, shard: Any = None) -> None:
        number, part = _part(layer, shard, "B")
        _copy(layer.B.get_parameter(f"part_{number}").data, loaded, part, "B")

    return load


def _load_bias(layer: Any) -> Loader:
    def load(parameter: Tensor, loaded: Tensor, shard: Any = None) -> None:
        number, part = _part(layer, shard, "bias")
        if getattr(layer, "bias", None) is None:
            raise LowRankError(f"{part.name} has a bias in the checkpoint and none in the engine")
        start = sum(one.out_features for one in layer.lowrank_parts[:number])
        _copy(layer.bias.data[start : start + part.out_features], loaded, part, "bias")

    return load


def _load_later(layer: Any, what: str) -> Loader:
    """Of a pivoted part, whose B is made when C and the index are there."""

    def load(parameter: Tensor, loaded: Tensor, shard: Any = None) -> None:
        number, part = _part(layer, shard, what)
        shape = (part.out_features - part.rank, part.rank) if what == "C" else (part.out_features,)
        _copy(torch.empty(shape, dtype=loaded.dtype), loaded, part, what)
        layer.lowrank_loaded[number, what] = loaded.clone()

    return load


def _load_weight(layer: Any) -> Loader:
    """The sentinel of a part of low rank, which is let go, or the weight of a dense one."""

    def load(parameter: Tensor, loaded: Tensor, shard: Any = None) -> None:
        number, part = _part(layer, shard, "weight")
        target = torch.empty(1) if part.rank else layer.B.get_parameter(f"part_{number}").data
        _copy(target, loaded, part, "the sentinel" if part.rank else "weight")

    return load
