"""What a model is less its base, as LoRA adapters in PEFT's format: a truncated SVD of each matrix's difference.

Shape legend: O out, I in, R rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lowrank_kit.checkpoint.agreement import agreed
from lowrank_kit.checkpoint.beside import copy_beside
from lowrank_kit.checkpoint.card import adapter_card
from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.reading import TORCH_DTYPES
from lowrank_kit.checkpoint.stored import StoredMatrix
from lowrank_kit.checkpoint.writer import write_tensors
from lowrank_kit.device import DTYPES
from lowrank_kit.errors import LowRankError, UsageError, need_packages
from lowrank_kit.linalg.factor import truncated_svd, weighted_error
from lowrank_kit.report.files import write_text
from lowrank_kit.serving.exports.base import Exported, ExportSettings, Kind, Request

# As PEFT names its file, and what it puts before the names of the model.
WEIGHTS_FILE, PREFIX = "adapter_model.safetensors", "base_model.model."
DEFAULT_RANK = 16
# Share of a difference that is no reason for a higher rank.
NEGLIGIBLE = 1e-3
# Numbers that are compared at a time.
_CHUNK = 2**22


@dataclass
class Differences:
    """What was found.

    Args:
        adapters: tensors of the adapters.
        rows: of the matrices that have adapters.
        left_out: name -> norm of the difference over norm in the base, of what no adapter holds.
        squared, squared_left: norms of all differences, and of what the adapters leave out of them.
        truncated: whether a higher rank would leave out less, and not rounding alone does.
    """

    adapters: dict[str, Tensor] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, float] = field(default_factory=dict)
    squared: float = 0.0
    squared_left: float = 0.0
    truncated: bool = False

    @property
    def error(self) -> float:
        """Share of the differences of matrices with adapters that these leave out, in norm."""
        return (self.squared_left / self.squared) ** 0.5


def write_lora(request: Request, folder: Path) -> Exported:
    """Write adapters, their config and the tokenizer.

    Raises:
        UsageError: a base of another architecture or shape, or of low rank itself, a rank above what any matrix has,
            no difference that an adapter holds.
        LowRankError: NaN or Inf in a difference.
    """
    base_name, rank = request.settings.base, request.settings.rank or DEFAULT_RANK
    assert base_name is not None
    base = agreed(Checkpoint.open(base_name))
    _check_base(request, base)
    if request.checkpoint.head:
        base = base.with_head()
    plain = [one for one in base.matrices() if one.matrix.expert is None]
    if plain and rank > (most := max(min(one.matrix.shape) for one in plain)):
        raise UsageError(f"rank {rank} is more than any matrix has: at most {most}", hint=f"--rank {most}, or less")
    found = Differences()
    _compare_matrices(request, base, rank, found)
    _compare_others(request.checkpoint, base, found)
    if not found.adapters:
        told = f"; {_told(found.left_out)}" if found.left_out else ""
        raise UsageError(
            f"no matrix of {request.model} that can have an adapter differs from {base_name}{told}",
            hint="give the model that was trained, and the one that it was trained from as --base",
        )
    write_tensors(folder / WEIGHTS_FILE, found.adapters)
    transposed = any(one.matrix.transposed for one in plain)
    _write_config(folder, base_name, rank, [row["name"] for row in found.rows], fan_in_fan_out=transposed)
    copy_beside(request.checkpoint.path, folder)
    card = adapter_card(
        base_model=base_name, model=request.name, rank=rank, error=found.error, left_out=len(found.left_out)
    )
    return Exported(
        card=card,
        result={
            "rank": rank,
            "relative_error": found.error,
            "left_out": found.left_out,
            "bytes_after": (folder / WEIGHTS_FILE).stat().st_size,
        },
        matrices=found.rows,
        notes=[_left_out(found)],
        warnings=[f"{_told(found.left_out)}: these stay as in {base_name}"] if found.left_out else [],
    )


def check_lora(settings: ExportSettings) -> None:
    """Refuse adapters without a base, of no rank, or without PEFT.

    Raises:
        UsageError: one of these.
    """
    if settings.base is None:
        raise UsageError(
            "--to lora needs the model that the adapters are for", hint="--base BASE, a folder or hub name"
        )
    if settings.rank is not None and settings.rank < 1:
        raise UsageError(f"rank must be at least 1, got {settings.rank}", hint=f"--rank {DEFAULT_RANK}")
    need_packages(["peft"], extra="lora", wanted_by="--to lora")


def _check_base(request: Request, base: Checkpoint) -> None:
    """Refuse a base that the model cannot have come from."""
    checkpoint, name = request.checkpoint, request.settings.base
    if base.path.resolve() == checkpoint.path.resolve():
        raise UsageError(f"{request.model} is its own base", hint="give the model that it was trained from as --base")
    if any(one.compressed for one in base.matrices()):
        raise UsageError(
            f"{name} is of low rank itself, a base is a dense model",
            hint=f"give the dense model, or make one of it: lowrank export {name} --to dense -o DENSE",
        )
    kinds = [one.config.get("model_type") for one in (checkpoint, base)]
    if kinds[0] != kinds[1]:
        raise UsageError(
            f"{request.model} is a {kinds[0]} and {name} is a {kinds[1]}: adapters are for a base of the same "
            "architecture",
            hint="give the model that it was trained from as --base",
        )
    ours, theirs = ({n: tuple(p.shape) for n, p in one.meta_model().state_dict().items()} for one in (checkpoint, base))
    for parameter in [*ours, *theirs]:
        here, there = ours.get(parameter), theirs.get(parameter)
        if here != there:
            raise UsageError(
                f"{parameter} is {_shape(here)} in {request.model}, and {_shape(there)} in {name}: adapters are for a "
                "base of the same shapes",
                hint="give the model that it was trained from as --base",
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else " x ".join(map(str, shape))


def _compare_matrices(request: Request, base: Checkpoint, rank: int, found: Differences) -> None:
    ours, theirs = _Reader(request.checkpoint), _Reader(base)
    pairs = list(zip(request.checkpoint.matrices(), base.matrices(), strict=True))
    for here, there in tqdm(pairs, desc="export", unit="matrix", disable=request.no_bar):
        matrix = there.matrix
        new, old = ours.weight(here), theirs.weight(there)
        if _same(new, old):
            continue
        difference = new.double() - old.double()
        if not difference.isfinite().all():
            raise LowRankError(
                f"NaN or Inf in what {matrix.name} is in {request.model} less what it is in {request.settings.base}",
                hint="train or download the model again",
            )
        if matrix.expert is not None or matrix.role == "head":
            found.left_out[matrix.name] = _relative(new, old)
        elif difference.any():
            _add_adapter(request, here, difference, rank, found)


def _add_adapter(request: Request, stored: StoredMatrix, difference: Tensor, rank: int, found: Differences) -> None:
    """Both factors have the root of the singular values: adapters that are trained on change alike."""
    matrix = stored.matrix
    word = request.checkpoint.headers[stored.tensors[0]].dtype
    dtype = DTYPES.get(request.settings.dtype, TORCH_DTYPES[word])
    factors = truncated_svd(difference.to(request.device)).truncate(min(rank, *matrix.shape))
    root_R = factors.singular_values[: factors.A.shape[0]].sqrt()
    B_OR, A_RI = torch.zeros(matrix.shape[0], rank), torch.zeros(rank, matrix.shape[1])
    # Beyond the smaller side there is nothing, nor where the difference has no more directions.
    last = int((root_R > root_R[0] * torch.finfo(torch.float32).eps).sum())
    B_OR[:, :last] = (factors.B * root_R)[:, :last]
    A_RI[:last] = factors.A[:last] / root_R[:last, None]
    B_OR, A_RI = B_OR.to(dtype), A_RI.to(dtype)
    found.truncated |= factors.relative_error(rank) > NEGLIGIBLE
    error = weighted_error(difference, B_OR.double() @ A_RI.double())
    path = f"{PREFIX}{matrix.name}"
    found.adapters |= {f"{path}.lora_A.weight": A_RI, f"{path}.lora_B.weight": B_OR}
    found.rows.append(
        {
            "name": matrix.name,
            "role": matrix.role,
            "out": matrix.shape[0],
            "in": matrix.shape[1],
            "rank": last,
            "relative_error": error,
        }
    )
    squared = difference.square().sum().item()
    found.squared += squared
    found.squared_left += error**2 * squared


def _compare_others(checkpoint: Checkpoint, base: Checkpoint, found: Differences) -> None:
    """Norms, biases, embeddings: whatever is no matrix."""
    ours, theirs = _others(checkpoint), _others(base)
    shared = [name for name in theirs if name in ours]
    new, old = (_Reader(one) for one in (checkpoint, base))
    for name in shared:
        pair = new.tensor(ours[name]), old.tensor(theirs[name])
        if not _same(*pair) and (relative := _relative(*pair)):
            found.left_out[name] = relative


def _others(checkpoint: Checkpoint) -> dict[str, str]:
    """Parameter that is no matrix -> its name on disk."""
    on_disk, matrices = checkpoint.disk_names(), checkpoint.matrices()
    for stored in matrices:
        on_disk.pop(stored.matrix.parameter, None)
        bias = f"{stored.disk_path}.B.bias"  # of two factors
        if stored.compressed and bias in checkpoint.headers:
            on_disk[f"{stored.matrix.name}.bias"] = bias
    return on_disk


class _Reader:
    """Reads the tensors of a matrix, those of stacked experts once for all of them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._names: tuple[str, ...] = ()
        self._tensors: Mapping[str, Tensor] = {}

    def weight(self, stored: StoredMatrix) -> Tensor:
        """W, [O, I]."""
        if stored.tensors != self._names:
            self._names, self._tensors = stored.tensors, dict(self.checkpoint.tensors(stored.tensors))
        return stored.weight(*(self._tensors[name] for name in stored.tensors))

    def tensor(self, name: str) -> Tensor:
        """One tensor as it is."""
        return next(self.checkpoint.tensors([name]))[1]


def _same(new: Tensor, old: Tensor) -> bool:
    return new.dtype == old.dtype and torch.equal(new, old)


def _relative(new: Tensor, old: Tensor) -> float:
    """|new - old| / |old| in the Frobenius norm, a chunk at a time."""
    error = total = 0.0
    for one, other in _chunks(new, old):
        error += (one - other).square().sum().item()
        total += other.square().sum().item()
    return (error / total) ** 0.5 if total else float(error > 0)


def _chunks(*tensors: Tensor) -> Iterator[list[Tensor]]:
    for parts in zip(*(tensor.reshape(-1).split(_CHUNK) for tensor in tensors), strict=True):
        yield [part.double() for part in parts]


def _write_config(folder: Path, base: str, rank: int, names: list[str], *, fan_in_fan_out: bool) -> None:
    from peft import LoraConfig

    # Whole names: PEFT takes one that is the end of another module's name for that one too.
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=rank,
        lora_alpha=rank,
        target_modules=names,
        fan_in_fan_out=fan_in_fan_out,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    told = json.loads(path.read_text())
    told["target_modules"] = names  # a set in PEFT, of another order each time
    write_text(path, json.dumps(told, indent=2, sort_keys=True) + "\n")


def _left_out(found: Differences) -> str:
    told = f"adapters leave out {100 * found.error:.2g} % of the differences, in norm"
    return f"{told}; a higher --rank leaves out less" if found.truncated else f"{told}, by rounding"


def _told(left_out: Mapping[str, float]) -> str:
    first = sorted(left_out.items(), key=lambda pair: -pair[1])[:3]
    told = ", ".join(f"{name} by {100 * relative:.2g} %" for name, relative in first)
    more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
    return f"{len(left_out)} tensors differ that no adapter holds ({told}{more})"


KIND = Kind(write=write_lora, options=("base", "rank"), check=check_lora)
