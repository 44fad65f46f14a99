"""What every parameter of a causal LM is to the scaling rules, found by asking the model; works on the meta device."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowrank_kit.errors import UsageError
from lowrank_kit.matrices import Matrix, block_of, embedding_names, find_matrices
from lowrank_kit.scaling.rules import Kind


@dataclass(frozen=True)
class Part:
    """One parameter.

    Args:
        name: of the parameter.
        kind: see `ratios`.
        role: for tables: the matrix's role, or embedding, head, router, bias, gain.
        fans: (n_in, n_out); 1 for a side that does not go with the width.
        inside: whether it is inside a block.
        ends_branch: a matrix whose output is added to the residual stream, or its bias.
    """

    name: str
    kind: Kind
    role: str
    fans: tuple[int, int]
    inside: bool
    ends_branch: bool = False

    @property
    def key(self) -> str:
        """The name for all blocks."""
        return key_of(self.name)


def key_of(name: str) -> str:
    """A parameter's name with a star for each number, so that those of all blocks are alike."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def find_parts(model: PreTrainedModel) -> dict[str, Part]:
    """Parameter name -> what it is, of all parameters, in the order of the model.

    Raises:
        UsageError: a parameter for which there is no rule, as those of state spaces; it is named.
    """
    matrices = {matrix.parameter: matrix for matrix in find_matrices(model)}
    ends = {_bias_of(name) for name, matrix in matrices.items() if matrix.ends_branch}
    embeddings = set(embedding_names(model))
    modules = dict(model.named_modules())
    found: dict[str, Part] = {}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        inside, shape = block_of(name) is not None, tuple(parameter.shape)
        module = modules[owner]
        if (matrix := matrices.get(name)) is not None:
            if not inside:
                raise _no_rule(name, shape, module, "a matrix outside of the blocks")
            found[name] = Part(name, "hidden", matrix.role, _fans(matrix), inside, matrix.ends_branch)
        elif leaf == "weight" and (isinstance(module, nn.Embedding) or owner in embeddings):
            if module is model.get_output_embeddings():
                found[name] = Part(name, "output", "head", (shape[1], 1), inside)
            else:
                found[name] = Part(name, "input", "embedding", (1, shape[1]), inside)
        elif leaf.endswith("bias") and len(shape) <= 2 and owner not in embeddings:
            found[name] = Part(name, "vector", "bias", (1, shape[-1]), inside, name in ends)
        elif leaf == "bias" and owner in embeddings:
            found[name] = Part(name, "vector", "bias", (1, 1), inside)
        elif leaf == "weight" and len(shape) == 1 and "norm" in type(module).__name__.lower():
            found[name] = Part(name, "vector", "gain", (1, shape[0]), inside)
        elif len(shape) == 2 and inside and _is_router(module, shape, model):
            found[name] = Part(name, "hidden", "router", (shape[1], shape[0]), inside)
        else:
            raise _no_rule(name, shape, module, "neither matrix, embedding, head, router, bias nor gain")
    return found


def _fans(matrix: Matrix) -> tuple[int, int]:
    """Of a fused matrix those of its first part: it is several matrices in one, and stepped as such."""
    out, inputs = matrix.shape
    if matrix.split is not None:
        out = matrix.split.sizes[0] * matrix.split.groups
    return inputs, out


def _bias_of(parameter: str) -> str:
    """Name of the bias of a matrix: beside `weight`, and beside fused experts."""
    owner, _, leaf = parameter.rpartition(".")
    return f"{owner}.bias" if leaf == "weight" else f"{parameter}_bias"


def _is_router(module: nn.Module, shape: tuple[int, ...], model: PreTrainedModel) -> bool:
    """Reads the residual stream, and is no matrix: it chooses among experts, or weighs one of them."""
    if isinstance(module, Conv1D):
        return False
    return shape[1] == model.config.get_text_config().hidden_size


def _no_rule(name: str, shape: tuple[int, ...], module: nn.Module, why: str) -> UsageError:
    return UsageError(
        f"no scaling rule for {name}, {' x '.join(map(str, shape))}, of {type(module).__name__}: it is {why}",
        hint="spectral muP is for attention and MLP blocks; train this model without --mup-base",
    )
