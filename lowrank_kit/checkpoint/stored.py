"""Where on disk the matrices of a model are.

Names on disk are mostly the names of the parameters, but not always: `gpt2` stores `h.0.attn.c_attn.weight` for
`transformer.h.0.attn.c_attn.weight`, a mixture of experts stores each expert apart although the model holds one fused
3-D tensor, and a compressed matrix is two factors or a pivoted form. The renaming is transformers' own, the one
`from_pretrained` uses.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from lowrank_kit.checkpoint.headers import TensorHeader
from lowrank_kit.checkpoint.parts import COMPRESSED_LEAVES, check_parts, find_parts
from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.layers import INT8, STACKED
from lowrank_kit.layers.experts import PROJECTIONS
from lowrank_kit.layers.pivoted import check_index
from lowrank_kit.linalg.pivot import expand
from lowrank_kit.matrices import Matrix, find_head, find_matrices, role_of

# Roles of the two halves of a fused gate_up tensor, in the order in which they are stacked.
HALVES_OF_GATE_UP = ("gate", "up")


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix and the tensors that hold it on disk.

    Args:
        matrix: what it is; `matrix.transposed` says how it lies on disk. An expert stored apart from the fused tensor
            it belongs to is named by its path on disk.
        tensors: one name, of a 2-D weight or of a fused 3-D tensor of which `matrix.expert` is one slice;
            of a compressed matrix two names (B, A), its factors, or three (A, C, index), its pivoted form; of codes
            the two scales behind them.
        form: "dense", one of `COMPRESSED_LEAVES`, or "stacked": of all experts, of which `matrix.expert` is one slice.
        part, parts: of a compressed expert: which of so many equal runs of its output rows the matrix is.
    """

    matrix: Matrix
    tensors: tuple[str, ...]
    form: str = "dense"
    part: int = 0
    parts: int = 1

    # What it has in common with a `StoredStack`.
    count: ClassVar[int] = 1
    reason: ClassVar[str] = ""

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """The one matrix."""
        return (self.matrix,)

    @property
    def module(self) -> str:
        """Path of the module that holds it."""
        return self.matrix.name

    @property
    def entry_name(self) -> str:
        """What it is called in `quantization_config`: the module's path, and of experts that of their weight."""
        return self.matrix.parameter if self.form == STACKED else self.module

    @property
    def disk_path(self) -> str:
        """What the names of its tensors on disk begin with; of experts of low rank, all of theirs."""
        leaf = COMPRESSED_LEAVES.get(self.form, (self.tensors[0].rpartition(".")[2],))[0]
        return self.tensors[0].removesuffix(f".{leaf}")

    @property
    def A(self) -> str:
        """Name of the tensor of a compressed matrix that has as many rows as the rank."""
        return next(name for name in self.tensors if re.search(r"\.A(\.weight|\.codes)?$", name))

    @property
    def compressed(self) -> bool:
        """Whether something of low rank is stored instead of the weight."""
        return self.form != "dense"

    def factors(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """B [out, r] and A [r, in] of a compressed matrix in float64, from the tensors named in `tensors`.

        Raises:
            LowRankError: an index of a pivoted matrix that is none.
        """
        if self.form.endswith(INT8):
            first, second, *others = (tensor.double() for tensor in tensors)
            tensors = (first * others[-2], second * others[-1], *tensors[2:-2])
        if self.form.removesuffix(INT8) == "pivoted":
            A, C, index = tensors
            check_index(index, self.matrix.shape[0], self.matrix.name)
            return expand(C.double(), index), A.double()
        B, A = tensors
        if self.form == STACKED:
            B, A = B[self.matrix.expert].chunk(self.parts)[self.part], A[self.matrix.expert]
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
class Source:
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
        UsageError: the model has no matrix, a head that is none, or blocks that share their weights.
        LowRankError: a matrix is not on disk or only in part, or with another shape than the config asks for.
    """
    parameters = model.state_dict()
    sources = sources_by_parameter(model, headers)
    stored: list[StoredMatrix] = []
    absent: list[str] = []
    for matrix in [*find_matrices(model), *([find_head(model)] if head else [])]:
        candidates = sources[matrix.parameter]
        factors = [sources[name] for name in factor_names(matrix.parameter)] if matrix.expert is not None else []
        if all(factors) and factors:
            found = list(_compressed_experts(matrix, [found[0].header for found in factors], candidates))
        else:
            found = list(_locate(matrix, tuple(parameters[matrix.parameter].shape), candidates, headers))
        stored += found
        if len(found) < max((source.parts for source in candidates), default=1):
            absent.append(matrix.name)
    if absent and (shared := _shared(model, absent)):
        raise UsageError(
            f"{type(model).__name__} has the weight of {shared[0]} in several of its blocks",
            hint="lowrank-kit works on models whose blocks have weights of their own",
        )
    if absent:
        raise LowRankError(
            f"{len(absent)} matrices of {type(model).__name__} are not in the checkpoint, or only in part, "
            f"first {absent[0]}",
            hint="config.json and the safetensors files seem to belong to different models",
        )
    return stored


def _shared(model: PreTrainedModel, names: Collection[str]) -> list[str]:
    """Those of some matrices whose weight has other names too."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    count = Counter(map(id, weights.values()))
    return [name for name in names if count[id(weights.get(f"{name}.weight"))] > 1]


def disk_names(model: PreTrainedModel, headers: Mapping[str, TensorHeader]) -> dict[str, str]:
    """Parameter name -> name on disk, of the parameters that are one tensor there with the same shape.

    Args:
        model: the model, on the meta device.
        headers: what is on disk.
    """
    parameters = model.state_dict()
    sources = sources_by_parameter(model, headers)
    return {
        name: found[0].header.name
        for name, found in sources.items()
        if name in parameters and len(found) == 1 and found[0].header.shape == tuple(parameters[name].shape)
    }


def sources_by_parameter(model: PreTrainedModel, headers: Mapping[str, TensorHeader]) -> defaultdict[str, list[Source]]:
    """Name of a parameter, or of the factors of experts -> the tensors on disk that fill it.

    Args:
        model: the model, on the meta device.
        headers: what is on disk.
    """
    find = Renaming(model)
    sources: defaultdict[str, list[Source]] = defaultdict(list)
    for header in headers.values():
        target, expert, part, parts = find(header.name)
        sources[target].append(Source(header, expert, part, parts))
    return sources


class Renaming:
    """Finds what a tensor on disk is in the model, as `from_pretrained` would map it.

    Args:
        model: the model, on the meta device.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        conversions = get_model_conversion_mapping(model)
        self._renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
        self._converters = [one for one in conversions if isinstance(one, WeightConverter)]
        self._prefix = model.base_model_prefix
        parameters = model.state_dict()
        fused = {matrix.parameter for matrix in find_matrices(model) if matrix.expert is not None}
        self._known = parameters.keys() | {name for one in fused for name in factor_names(one)}

    def __call__(self, name: str) -> tuple[str, int | None, int, int]:
        """Name in the model, and of an expert's share of a parameter: expert, part and parts.

        Args:
            name: on disk; given back where the model knows it under no name.
        """
        renamed = name
        for renaming in self._renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        for converter in self._converters:
            target, pattern = converter.rename_source_key(renamed)
            target = _with_prefix(target, self._prefix, self._known)
            if pattern is not None and target in self._known:
                patterns = converter.source_patterns
                return target, _number_at_star(pattern, renamed), patterns.index(pattern), len(patterns)
        # A renaming meant for another layout of the same family may hit a name that was right already.
        candidates = (_with_prefix(one, self._prefix, self._known) for one in (renamed, name))
        return next((one for one in candidates if one in self._known), name), None, 0, 1


def factor_names(parameter: str) -> tuple[str, ...]:
    """Names in the model of the factors of a fused weight of experts; none if such a weight has no factors."""
    path, _, leaf = parameter.rpartition(".")
    return tuple(f"{path}.{PROJECTIONS[leaf]}.{factor}" for factor in "BA") if leaf in PROJECTIONS else ()


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
    matrix: Matrix, parameter_shape: tuple[int, ...], sources: list[Source], headers: Mapping[str, TensorHeader]
) -> Iterator[StoredMatrix]:
    for source in sorted(sources, key=lambda source: source.part):
        name = source.header.name
        if (compressed := _compressed(matrix, name.removesuffix(".weight"), headers)) is not None:
            yield compressed
        elif source.expert is None:
            _check_shape(matrix.name, parameter_shape, source.header)
            yield StoredMatrix(matrix, (name,))
        elif source.expert == matrix.expert:
            yield _stored_apart(matrix, source)


def _compressed(matrix: Matrix, path: str, headers: Mapping[str, TensorHeader]) -> StoredMatrix | None:
    """A matrix that is stored as factors or pivoted under a path; None if it is not."""
    if (found := find_parts(path, headers)) is None:
        return None
    form, parts = found
    check_parts(matrix.name, matrix.shape, form, parts)
    return StoredMatrix(replace(matrix, transposed=False), tuple(part.name for part in parts), form)


def _compressed_experts(matrix: Matrix, factors: list[TensorHeader], sentinels: list[Source]) -> Iterator[StoredMatrix]:
    """An expert whose factors are stacked with the others', under the name that it has where it is dense.

    Args:
        matrix: of the fused weight.
        factors: B and A.
        sentinels: what is on disk under the name of the weight.
    """
    _check_stacks(matrix, factors)
    whole = StoredMatrix(replace(matrix, transposed=False), tuple(one.name for one in factors), STACKED)
    for source in sorted(sentinels, key=lambda source: source.part):
        if source.expert is None:
            yield whole
        else:
            path = re.sub(r"\.\d+(?=\.\w+\.weight$)", f".{matrix.expert}", source.header.name).removesuffix(".weight")
            apart = _apart(whole.matrix, path, source)
            yield replace(whole, matrix=apart, part=source.part, parts=source.parts)


def _stored_apart(matrix: Matrix, source: Source) -> StoredMatrix:
    """One expert's matrix that is a tensor of its own on disk, such as `experts.3.gate_proj.weight`."""
    path = source.header.name.removesuffix(".weight")
    apart = _apart(matrix, path, source)
    # On disk it is an nn.Linear's weight, [out, in], however the fused tensor lies.
    apart = replace(apart, transposed=source.header.shape == apart.shape[::-1] != apart.shape)
    _check_shape(path, apart.shape[::-1] if apart.transposed else apart.shape, source.header)
    return StoredMatrix(apart, (source.header.name,))


def _apart(matrix: Matrix, path: str, source: Source) -> Matrix:
    """A part of an expert under a name of its own."""
    if matrix.role == "gate_up" and source.parts == len(HALVES_OF_GATE_UP):
        role = HALVES_OF_GATE_UP[source.part]
    else:
        role = matrix.role if source.parts == 1 else role_of(path.rpartition(".")[2])
    return replace(matrix, name=path, role=role, shape=(matrix.shape[0] // source.parts, matrix.shape[1]))


def _check_shape(name: str, expected: tuple[int, ...], header: TensorHeader) -> None:
    if header.shape != expected:
        raise LowRankError(
            f"{header.file}: tensor {header.name} has shape {list(header.shape)}, "
            f"config.json asks for {list(expected)} for matrix {name}",
            hint="config.json and the safetensors files seem to belong to different models",
        )


def _check_stacks(matrix: Matrix, factors: list[TensorHeader]) -> None:
    B, A = (header.shape for header in factors)
    rows, columns = matrix.shape
    fit = len(A) == len(B) == 3 and A[0] == B[0] and (B[1], A[2]) == (rows, columns) and B[2] == A[1]
    if not fit or matrix.expert is None or matrix.expert >= A[0]:
        told = " and ".join(f"{part.name} {list(part.shape)}" for part in factors)
        raise LowRankError(
            f"{told} do not make matrix {matrix.name} of shape {list(matrix.shape)}",
            hint="config.json and the safetensors files seem to belong to different models",
        )
