"""Where on disk the matrices of a model are.

Names on disk are mostly the names of the parameters, but not always: `gpt2` stores `h.0.attn.c_attn.weight` for
`transformer.h.0.attn.c_attn.weight`, a mixture of experts stores each expert apart although the model holds one fused
3-D tensor, and a compressed matrix is two factors or a pivoted form. The renaming is transformers' own, the one
`from_pretrained` uses.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from lowrank_kit.checkpoint.headers import TensorHeader
from lowrank_kit.errors import LowRankError
from lowrank_kit.linalg.pivot import expand
from lowrank_kit.matrices import Matrix, find_head, find_matrices, role_of

# Roles of the two halves of a fused gate_up tensor, in the order in which they are stacked.
HALVES_OF_GATE_UP = ("gate", "up")
# Form of storage -> what is stored of a matrix under its path, besides the sentinel.
COMPRESSED_LEAVES = {"factors": ("B.weight", "A.weight"), "pivoted": ("A.weight", "C.weight", "index")}


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix and the tensors that hold it on disk.

    Args:
        matrix: what it is; `matrix.transposed` says how it lies on disk. An expert stored apart from the fused tensor
            it belongs to is named by its path on disk.
        tensors: one name, of a 2-D weight or of a fused 3-D tensor of which `matrix.expert` is one slice;
            of a compressed matrix two names (B, A), its factors, or three (A, C, index), its pivoted form.
        form: "dense", "factors" or "pivoted".
    """

    matrix: Matrix
    tensors: tuple[str, ...]
    form: str = "dense"

    @property
    def compressed(self) -> bool:
        """Whether something of low rank is stored instead of the weight."""
        return self.form != "dense"

    def factors(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """B [out, r] and A [r, in] of a compressed matrix in float64, from the tensors named in `tensors`."""
        if self.form == "pivoted":
            A, C, index = tensors
            return expand(C.double(), index), A.double()
        B, A = tensors
        return B.double(), A.double()

    def weight(self, *tensors: Tensor) -> Tensor:
        """W from the tensors named in `tensors`, given in that order.

        Returns:
            [out, in]; a view in the dtype on disk, or B A in float64 of a compressed matrix.
        """
        if self.compressed:
            B, A = self.factors(*tensors)
            return B @ A
        (stored,) = tensors
        W = stored[self.matrix.expert] if stored.ndim == 3 else stored
        return W.mT if self.matrix.transposed else W


@dataclass(frozen=True)
class _Source:
    """A tensor on disk that belongs to a parameter: the whole of it, or one expert's share of one of its `parts`."""

    header: TensorHeader
    expert: int | None = None
    part: int = 0
    parts: int = 1


def stored_matrices(
    model: PreTrainedModel, headers: Mapping[str, TensorHeader], *, head: bool = False
) -> list[StoredMatrix]:
    """Find every matrix of a model among the tensors of its checkpoint.

    Args:
        model: the model, on the meta device.
        headers: what is on disk.
        head: whether the LM head is to be one of them.

    Returns:
        In the order of `find_matrices`; a fused expert that is stored in parts gives one entry for each part. The head
        is last.

    Raises:
        UsageError: the model has no matrix, or a head that is none.
        LowRankError: a matrix is not on disk, or with another shape than the config asks for.
    """
    parameters = model.state_dict()
    sources = _sources_by_parameter(model, parameters.keys(), headers)
    stored: list[StoredMatrix] = []
    absent: list[str] = []
    for matrix in [*find_matrices(model), *([find_head(model)] if head else [])]:
        candidates = sources[matrix.parameter]
        found = list(_locate(matrix, tuple(parameters[matrix.parameter].shape), candidates, headers))
        stored += found
        if len(found) < max((source.parts for source in candidates), default=1):
            absent.append(matrix.name)
    if absent:
        raise LowRankError(
            f"{len(absent)} matrices of {type(model).__name__} are not in the checkpoint, or only in part, "
            f"first {absent[0]}",
            hint="config.json and the safetensors files seem to belong to different models",
        )
    return stored


def disk_names(model: PreTrainedModel, headers: Mapping[str, TensorHeader]) -> dict[str, str]:
    """Parameter name -> name on disk, of the parameters that are one tensor there with the same shape.

    Args:
        model: the model, on the meta device.
        headers: what is on disk.
    """
    parameters = model.state_dict()
    sources = _sources_by_parameter(model, parameters.keys(), headers)
    return {
        name: found[0].header.name
        for name, found in sources.items()
        if name in parameters and len(found) == 1 and found[0].header.shape == tuple(parameters[name].shape)
    }


def _sources_by_parameter(
    model: PreTrainedModel, parameters: Collection[str], headers: Mapping[str, TensorHeader]
) -> dict[str, list[_Source]]:
    """Parameter name -> the tensors on disk that fill it, as `from_pretrained` would map them."""
    conversions = get_model_conversion_mapping(model)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    sources: dict[str, list[_Source]] = defaultdict(list)
    for header in headers.values():
        renamed = header.name
        for renaming in renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        for converter in converters:
            target, pattern = converter.rename_source_key(renamed)
            target = _with_prefix(target, model.base_model_prefix, parameters)
            if pattern is not None and target in parameters:
                expert = _number_at_star(pattern, renamed)
                part, parts = converter.source_patterns.index(pattern), len(converter.source_patterns)
                sources[target].append(_Source(header, expert, part, parts))
                break
        else:
            # A renaming meant for another layout of the same family may hit a name that was right already.
            candidates = (_with_prefix(name, model.base_model_prefix, parameters) for name in (renamed, header.name))
            target = next((name for name in candidates if name in parameters), header.name)
            sources[target].append(_Source(header))
    return sources


def _with_prefix(name: str, prefix: str, known: Collection[str]) -> str:
    """`name`, or the name with the base model's prefix added or taken away where that one is known."""
    if name in known or not prefix:
        return name
    added, stripped = f"{prefix}.{name}", name.removeprefix(f"{prefix}.")
    return next((candidate for candidate in (added, stripped) if candidate in known), name)


def _number_at_star(pattern: str, name: str) -> int | None:
    """The number that stands in `name` where a source pattern such as `experts.*.w1.weight` has its star."""
    match = re.search(pattern.replace("*.", r"(?P<number>\d+)\.", 1), name)
    return int(match["number"]) if match and "number" in match.groupdict() else None


def _locate(
    matrix: Matrix, parameter_shape: tuple[int, ...], sources: list[_Source], headers: Mapping[str, TensorHeader]
) -> Iterator[StoredMatrix]:
    for source in sorted(sources, key=lambda source: source.part):
        name = source.header.name
        if (compressed := _compressed(matrix, name.removesuffix("weight"), headers)) is not None:
            yield compressed
        elif source.expert is None:
            _check_shape(matrix.name, parameter_shape, source.header)
            yield StoredMatrix(matrix, (name,))
        elif source.expert == matrix.expert:
            yield _stored_apart(matrix, source)


def _compressed(matrix: Matrix, path: str, headers: Mapping[str, TensorHeader]) -> StoredMatrix | None:
    """A matrix that is stored as factors or pivoted under a path that ends with a dot; None if it is not."""
    for form, leaves in COMPRESSED_LEAVES.items():
        names = tuple(f"{path}{leaf}" for leaf in leaves)
        if all(name in headers for name in names):
            _check_parts(matrix, form, [headers[name] for name in names])
            return StoredMatrix(replace(matrix, transposed=False), names, form)
    return None


def _stored_apart(matrix: Matrix, source: _Source) -> StoredMatrix:
    """One expert's matrix that is a tensor of its own on disk, such as `experts.3.gate_proj.weight`."""
    path = source.header.name.removesuffix(".weight")
    if matrix.role == "gate_up" and source.parts == len(HALVES_OF_GATE_UP):
        role = HALVES_OF_GATE_UP[source.part]
    else:
        role = matrix.role if source.parts == 1 else role_of(path.rpartition(".")[2])
    shape = (matrix.shape[0] // source.parts, matrix.shape[1])
    # On disk it is an nn.Linear's weight, [out, in], however the fused tensor lies.
    apart = replace(matrix, name=path, role=role, shape=shape, transposed=source.header.shape == shape[::-1] != shape)
    _check_shape(path, shape[::-1] if apart.transposed else shape, source.header)
    return StoredMatrix(apart, (source.header.name,))


def _check_shape(name: str, expected: tuple[int, ...], header: TensorHeader) -> None:
    if header.shape != expected:
        raise LowRankError(
            f"{header.file}: tensor {header.name} has shape {list(header.shape)}, "
            f"config.json asks for {list(expected)} for matrix {name}",
            hint="config.json and the safetensors files seem to belong to different models",
        )


def _check_parts(matrix: Matrix, form: str, parts: list[TensorHeader]) -> None:
    rows, columns = matrix.shape
    A = next(part for part in parts if part.name.endswith(".A.weight"))
    rank = A.shape[0] if A.shape else 0
    shapes = {"factors": [(rows, rank), (rank, columns)], "pivoted": [(rank, columns), (rows - rank, rank), (rows,)]}
    if [part.shape for part in parts] != shapes[form]:
        told = " and ".join(f"{part.name} {list(part.shape)}" for part in parts)
        raise LowRankError(
            f"{form} {told} do not make matrix {matrix.name} of shape {list(matrix.shape)}",
            hint="config.json and the safetensors files seem to belong to different models",
        )
