"""One matrix cut to its rank, in the form in which it is stored best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lowrank_kit.checkpoint.stacks import StoredStack
from lowrank_kit.compression.ladder import ladder
from lowrank_kit.compression.plan import PlannedMatrix
from lowrank_kit.layers import LowRankLinear, LowRankStack, exchange
from lowrank_kit.linalg.factor import Factors, weighted_error

# Those of a matrix, by safetensors' words.
TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Piece:
    """A matrix at its rank.

    Args:
        planned: what it was planned as; another form and rank where that stores less error in the same bytes.
        tensors: leaf of the name on disk, as "A.weight" -> what is stored, in the dtype on disk.
        kept_energy: share of the objective's energy that the rank keeps, before rounding.
        seconds: what factorizing and cutting it took.
    """

    planned: PlannedMatrix
    tensors: Mapping[str, Tensor]
    kept_energy: float
    seconds: float = 0.0

    def named(self) -> dict[str, Tensor]:
        """Name on disk -> tensor."""
        return {f"{self.planned.disk_path}.{leaf}": tensor for leaf, tensor in self.tensors.items()}

    def dense(self) -> Tensor:
        """W' as it is stored, in float64; [E, out, in] of E experts."""
        form = self.planned.layout
        parts = [t.double() if t.is_floating_point() else t for t in self.tensors.values()]
        return form.join(*parts[: -len(form.sentinels)])

    def install(self, model: nn.Module, prefix: str = "") -> None:
        """Put a low-rank layer in the place of the matrix's.

        Args:
            model: or a part of it.
            prefix: what names begin with before their path in the part.

        The layer may have the piece's own tensors: what trains it makes another piece of them, see `read_back`.
        """
        name, rank = self.planned.stored.matrix.name.removeprefix(prefix), self.planned.rank
        assert rank is not None
        old = model.get_submodule(self.planned.stored.module.removeprefix(prefix))
        layer = exchange(model, name, rank, self.planned.form)
        if isinstance(layer, LowRankStack):
            layer.load_state_dict({leaf[-1]: self.tensors[leaf] for leaf in self._stacked_leaves()})
            return
        state = layer.state_dict()
        # The same memory where number format and device are the same.
        layer.load_state_dict({leaf: self.tensors.get(leaf, old).to(old) for leaf, old in state.items()}, assign=True)
        if (bias := getattr(old, "bias", None)) is not None:
            place: nn.Module = layer.B if isinstance(layer, LowRankLinear) else layer
            place.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)

    def put_back(self, model: nn.Module, prefix: str = "") -> None:
        """Make the layer, which is there, what is stored; arguments as of `install`."""
        layer = model.get_submodule(self.planned.stored.module.removeprefix(prefix))
        trained = self._stacked_leaves() or self.tensors.keys()
        layer.load_state_dict({leaf: self.tensors[leaf] for leaf in trained}, strict=False)

    def read_back(self, model: nn.Module, prefix: str = "") -> Piece:
        """The piece as the layer in the model has it now; arguments as of `install`."""
        state = model.get_submodule(self.planned.stored.module.removeprefix(prefix)).state_dict()
        trained = self._stacked_leaves() or self.tensors.keys()
        tensors = {leaf: state[leaf].to("cpu", self.tensors[leaf].dtype) for leaf in trained}
        return replace(self, tensors={**self.tensors, **tensors})

    def _stacked_leaves(self) -> list[str]:
        """Those of the factors of experts, "gate_up.A"; none of a matrix. Sentinels have other names on disk."""
        stored = self.planned.stored
        return [f"{stored.factors}.{factor}" for factor in "AB"] if isinstance(stored, StoredStack) else []


def cut(
    planned: PlannedMatrix, factors: Factors, gram_II: Tensor | None, *, form: str, align: int | None = None
) -> Piece:
    """Cut nested factors to the rank that was planned.

    Args:
        planned: with a rank.
        factors: of full rank.
        gram_II: what errors are weighed by; None for the weights themselves.
        form: "auto" takes two factors instead of the pivoted form where their error, as both are stored, is less: in
            16 bits rounding costs more in the pivoted form than its larger rank may gain.
        align: what ranks are multiples of, see `ladder`.
    """
    pieces = [_cut(planned, factors)]
    if form == "auto" and planned.form == "pivoted":
        pieces += [_cut(other, factors) for other in _as_factors(planned, align)]
    if len(pieces) == 1:
        return pieces[0]
    whole = factors.B.double() @ factors.A.double()
    return min(pieces, key=lambda piece: weighted_error(whole, piece.dense(), gram_II))


def _as_factors(planned: PlannedMatrix, align: int | None) -> list[PlannedMatrix]:
    """Two factors of the largest rank that takes no more numbers and bytes than was planned; none if none does."""
    ranks = ladder(planned.stored.matrix.shape, "factors", None, align).ranks.tolist()
    tried = [replace(planned, form="factors", rank=rank) for rank in ranks]
    fit = [
        one for one in tried if one.numbers_after <= planned.numbers_after and one.bytes_after <= planned.bytes_after
    ]
    return fit[-1:]


def _cut(planned: PlannedMatrix, factors: Factors) -> Piece:
    assert planned.rank is not None
    short = factors.truncate(planned.rank)
    form = planned.layout
    leaves = [name.removeprefix(f"{planned.disk_path}.") for name, _, _ in planned.tensors()]
    stored = form.stored(
        Factors(short.B.double(), short.A.double(), short.singular_values), TORCH_DTYPES[planned.dtype]
    )
    energy = 1 - factors.relative_error(planned.rank) ** 2
    return Piece(planned, dict(zip(leaves, (t.contiguous() for t in stored), strict=True)), energy)
