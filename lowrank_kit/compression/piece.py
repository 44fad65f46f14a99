"""One matrix cut to its rank, in the form in which it is stored best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lowrank_kit.compression.forms import FORMS
from lowrank_kit.compression.plan import PlannedMatrix
from lowrank_kit.layers import LowRankLinear, exchange_linear
from lowrank_kit.linalg.factor import Factors

# Those of a matrix, by safetensors' words.
TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Piece:
    """A matrix at its rank.

    Args:
        planned: what it was planned as; another form and rank where that stores less error in the same bytes.
        tensors: leaf of the name on disk, as "A.weight" -> what is stored, in the dtype on disk.
        kept_energy: share of the objective's energy that the rank keeps, before rounding.
    """

    planned: PlannedMatrix
    tensors: Mapping[str, Tensor]
    kept_energy: float

    def named(self) -> dict[str, Tensor]:
        """Name on disk -> tensor."""
        return {f"{self.planned.disk_path}.{leaf}": tensor for leaf, tensor in self.tensors.items()}

    def dense(self) -> Tensor:
        """W' as it is stored, in float64."""
        form = FORMS[self.planned.form]
        parts = [t.double() if t.is_floating_point() else t for t in list(self.tensors.values())[:-1]]
        return form.join(*parts)

    def install(self, model: nn.Module) -> None:
        """Put a low-rank layer in the place of the matrix's."""
        name, rank = self.planned.stored.matrix.name, self.planned.rank
        assert rank is not None
        old = model.get_submodule(name)
        layer = exchange_linear(model, name, rank, self.planned.form)
        layer.load_state_dict({**layer.state_dict(), **self.tensors})
        if (bias := getattr(old, "bias", None)) is not None:
            place: nn.Module = layer.B if isinstance(layer, LowRankLinear) else layer
            place.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)

    def read_back(self, model: nn.Module) -> Piece:
        """The piece as the layer in the model has it now."""
        state = model.get_submodule(self.planned.stored.matrix.name).state_dict()
        tensors = {leaf: state[leaf].to("cpu", old.dtype) for leaf, old in self.tensors.items()}
        return replace(self, tensors=tensors)


def cut(planned: PlannedMatrix, factors: Factors, gram_II: Tensor | None, *, form: str) -> Piece:
    """Cut nested factors to the rank that was planned.

    Args:
        planned: with a rank.
        factors: of full rank.
        gram_II: what errors are weighed by; None for the weights themselves.
        form: "auto" takes two factors instead of the pivoted form where their error, as both are stored, is less: in
            16 bits rounding costs more in the pivoted form than its larger rank may gain.
    """
    candidates = [planned]
    if form == "auto" and planned.form == "pivoted":
        candidates += _as_factors(planned)
    if len(candidates) == 1:
        return _cut(planned, factors)
    pieces = [_cut(candidate, factors) for candidate in candidates]
    return min(pieces, key=lambda piece: _error(piece, factors, gram_II))


def _as_factors(planned: PlannedMatrix) -> list[PlannedMatrix]:
    """Two factors of the largest rank that takes no more numbers and bytes than was planned."""
    shape, form = planned.stored.matrix.shape, FORMS["factors"]
    rank = planned.numbers_after // sum(shape) + 1
    while rank and (
        form.numbers(shape, rank) > planned.numbers_after
        or form.nbytes(shape, rank, planned.dtype) > planned.bytes_after
    ):
        rank -= 1
    return [replace(planned, form="factors", rank=rank)] if rank else []


def _cut(planned: PlannedMatrix, factors: Factors) -> Piece:
    assert planned.rank is not None
    short = factors.truncate(planned.rank)
    form = FORMS[planned.form]
    names = [
        name.removeprefix(".") for name, _, _ in form.tensors("", "F32", planned.stored.matrix.shape, planned.rank)
    ]
    stored = form.stored(
        Factors(short.B.double(), short.A.double(), short.singular_values), TORCH_DTYPES[planned.dtype]
    )
    energy = 1 - factors.relative_error(planned.rank) ** 2
    return Piece(planned, dict(zip(names, (t.contiguous() for t in stored), strict=True)), energy)


def _error(piece: Piece, factors: Factors, gram_II: Tensor | None) -> float:
    """Squared weighted error of what is stored against all of B A."""
    difference = factors.B.double() @ factors.A.double() - piece.dense()
    weighted = difference if gram_II is None else difference @ gram_II
    return (weighted * difference).sum().item()
