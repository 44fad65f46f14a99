"""The tensors of a compressed matrix on disk: whether all are there, and make the matrix that they are to make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lowrank_kit.checkpoint.headers import TensorHeader
from lowrank_kit.errors import LowRankError
from lowrank_kit.layers import INT8

# Form of storage -> what is stored of a matrix under its path, besides the sentinel.
COMPRESSED_LEAVES = {
    "factors": ("B.weight", "A.weight"),
    "pivoted": ("A.weight", "C.weight", "index"),
    f"factors{INT8}": ("B.codes", "A.codes", "B.scale", "A.scale"),
    f"pivoted{INT8}": ("A.codes", "C.codes", "index", "A.scale", "C.scale"),
}
# Leaf -> the dtypes it may have.
_DTYPES = {"index": ("I32", "I64"), "codes": ("I8",)} | dict.fromkeys(
    ("weight", "scale"), ("F64", "F32", "F16", "BF16")
)
_MIXED = "config.json and the safetensors files seem to belong to different models, or a file was changed by hand"


def find_parts(path: str, headers: Mapping[str, TensorHeader]) -> tuple[str, list[TensorHeader]] | None:
    """Form and tensors of a matrix, in the order of `COMPRESSED_LEAVES`; None where none are there.

    Args:
        path: of the matrix on disk.
        headers: what is on disk.

    Raises:
        LowRankError: some are there, and others are not.
    """
    found = {
        form: [headers[name] for leaf in leaves if (name := f"{path}.{leaf}") in headers]
        for form, leaves in COMPRESSED_LEAVES.items()
    }
    for form, parts in found.items():
        if len(parts) == len(COMPRESSED_LEAVES[form]):
            return form, parts
    form = max(found, key=lambda form: len(found[form]))  # of a lone A, factors
    if found[form]:
        refuse_missing(path, form, headers)
    return None


def refuse_missing(path: str, form: str, headers: Mapping[str, TensorHeader]) -> None:
    """Refuse a matrix of which a part is not there.

    Raises:
        LowRankError: with its name.
    """
    names = [f"{path}.{leaf}" for leaf in COMPRESSED_LEAVES[form]]
    if missing := [name for name in names if name not in headers]:
        there = [name for name in names if name in headers]
        files = ", ".join(sorted({headers[name].file for name in there})) or "the safetensors files"
        raise LowRankError(
            f"{files}: {len(missing)} of the {len(names)} tensors of {path} (form {form}) are missing, "
            f"first {missing[0]}",
            hint="copy or download the folder again, or compress the dense model again",
        )


def check_parts(name: str, shape: tuple[int, int], form: str, parts: Sequence[TensorHeader]) -> int:
    """See that the tensors of a compressed matrix make it.

    Args:
        name: of the matrix.
        shape: [out, in], as the model has it.
        form: of storage.
        parts: as `find_parts` gives them.

    Returns:
        The rank.

    Raises:
        LowRankError: shapes that do not fit one another or the matrix, or dtypes that are not one.
    """
    rows, columns = shape
    A = next(part for part in parts if part.name.endswith((".A.weight", ".A.codes")))
    rank = A.shape[0] if A.shape else 0
    shapes: dict[str, list[tuple[int, ...]]] = {
        "factors": [(rows, rank), (rank, columns)],
        "pivoted": [(rank, columns), (rows - rank, rank), (rows,)],
    }
    wanted = shapes[form.removesuffix(INT8)]
    if form.endswith(INT8):
        wanted += [(wanted[0][0], 1), (wanted[1][0], 1)]
    if not rank or [part.shape for part in parts] != wanted:
        told = " and ".join(f"{part.name} {list(part.shape)}" for part in parts)
        raise LowRankError(f"{form} {told} do not make matrix {name} of shape {list(shape)}", hint=_MIXED)
    first: dict[str, TensorHeader] = {}
    for part in sorted(parts, key=lambda part: part is not A):
        leaf = part.name.rpartition(".")[2]
        alike = first.setdefault(leaf, part)
        if part.dtype not in _DTYPES[leaf]:
            other = f"one of {', '.join(_DTYPES[leaf])} is wanted"
        elif part.dtype != alike.dtype:
            other = f"{alike.name} {alike.dtype}"
        else:
            continue
        raise LowRankError(f"{part.file}: {part.name} has dtype {part.dtype}; {other}", hint=_MIXED)
    return rank


def check_rank(file: str, name: str, entry: Mapping[str, object] | None, form: str, rank: int) -> None:
    """See that what `quantization_config` says of a matrix is what is stored.

    Raises:
        LowRankError: another form or rank, or nothing.
    """
    said = "nothing" if entry is None else f"rank {entry['rank']}, form {entry['form']}"
    stored = f"rank {rank}, form {form}"
    if said != stored:
        raise LowRankError(f"{name}: {stored} in {file}, {said} in quantization_config of config.json", hint=_MIXED)
