"""Which tensors of a causal LM are matrices: the one answer, for everybody.

The optimizer's routing, the analyzer, the compressor and the scaling rules all ask `find_matrices`. It asks the model:
its modules, its input and output embeddings, the shapes. The only names it knows are those of the parts of a block
(`q_proj`, `c_attn`, `fc1`), which families share; there is no list of architectures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank_kit.errors import UsageError

# What a leaf name means. Fused ones keep a role of their own: "qkv", "gate_up".
LEAF_ROLES = {
    "q": ("q_proj", "query", "wq", "q_attn"),
    "k": ("k_proj", "key", "wk"),
    "v": ("v_proj", "value", "wv"),
    "o": ("o_proj", "out_proj", "wo"),
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "w3", "fc1", "fc_in", "c_fc", "dense_h_to_4h"),
    "down": ("down_proj", "w2", "fc2", "fc_out", "dense_4h_to_h"),
    "qkv": ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "qkv"),
    "gate_up": ("gate_up_proj", "gate_and_up_proj", "w13"),
}
ROLE_OF_LEAF = {leaf: role for role, leaves in LEAF_ROLES.items() for leaf in leaves}
# The output of attention or of the MLP, by what stands beside it.
AMBIGUOUS_LEAVES = ("c_proj", "dense")
ATTENTION_INPUTS = frozenset({"q", "k", "v", "qkv"})
MLP_INPUTS = frozenset({"gate", "up", "gate_up"})
BRANCH_ENDS = frozenset({"o", "down"})
EXPERT_ROLES = MLP_INPUTS | {"down"}


@dataclass(frozen=True)
class Matrix:
    """A hidden 2-D weight W of a causal LM, y = W x; one expert of a fused 3-D tensor is a matrix too.

    Args:
        name: path of the module, for an expert `path.experts.down_proj[3]`.
        parameter: name of the parameter that holds it.
        role: q, k, v, o, gate, up, down; qkv and gate_up where they are fused; else the model's own name.
        block: index of its block, None outside the blocks.
        shape: (out, in).
        transposed: stored as [in, out].
        expert: index in a fused 3-D tensor, None for a plain matrix.
        shares_input: matrices with the same key read the same input.
        ends_branch: its output is added to the residual stream.
    """

    name: str
    parameter: str
    role: str
    block: int | None
    shape: tuple[int, int]
    transposed: bool
    expert: int | None
    shares_input: str
    ends_branch: bool


def find_matrices(model: nn.Module) -> list[Matrix]:
    """All matrices of a causal LM, in the order of its modules. Works on the meta device.

    Embeddings and the LM head are found by asking the model and are not matrices; neither are routers and rows.

    Args:
        model: a transformers model.

    Raises:
        UsageError: no matrix is found.
    """
    modules = dict(model.named_modules())
    excluded = _embeddings(model)
    found = [
        matrix
        for path, module in modules.items()
        if id(module) not in excluded
        for matrix in _matrices_of(path, module, modules, model)
    ]
    if not found:
        raise UsageError(
            f"no matrix found in {type(model).__name__}: it has no hidden linear layer "
            f"({sum(p.numel() for p in model.parameters()):,} parameters, all embeddings, head or vectors)",
            hint="lowrank-kit works on causal LMs whose blocks are made of nn.Linear, Conv1D or fused experts",
        )
    return found


def role_of(leaf: str, sibling_leaves: Iterator[str] | tuple[str, ...] = ()) -> str:
    """Role of a matrix by the last part of its path and of its siblings', or the leaf itself when unknown."""
    if leaf in AMBIGUOUS_LEAVES:
        return "o" if any(ROLE_OF_LEAF.get(s) in ATTENTION_INPUTS for s in sibling_leaves) else "down"
    return ROLE_OF_LEAF.get(leaf, leaf)


def block_of(path: str) -> int | None:
    """Index of the block a module or tensor name lies in: the first whole number of its path."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(match.group(1)) if match else None


def input_key(owner: str, role: str, name: str) -> str:
    """Key of the input a matrix reads: q, k, v of one attention share theirs, gate and up of one MLP theirs."""
    if role in ATTENTION_INPUTS:
        return f"{owner}:attention"
    if role in MLP_INPUTS:
        return f"{owner}:mlp"
    return name


def _embeddings(model: nn.Module) -> set[int]:
    """Ids of the input and output embeddings, and of every module tied to them by its weight."""
    ends = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            ends.append(getattr(model, getter)())
        except (AttributeError, NotImplementedError):
            continue
    weights = {id(end.weight) for end in ends if getattr(end, "weight", None) is not None}
    return {id(module) for module in model.modules() if id(getattr(module, "weight", None)) in weights}


def _matrices_of(path: str, module: nn.Module, modules: dict[str, nn.Module], model: nn.Module) -> Iterator[Matrix]:
    owner, _, leaf = path.rpartition(".")
    if isinstance(module, nn.Linear | Conv1D):
        transposed = isinstance(module, Conv1D)
        shape = _out_in(module.weight.shape, transposed)
        parent = modules[owner]
        if min(shape) == 1 or _is_router(shape[0], parent):
            return
        role = role_of(leaf, tuple(name for name, _ in parent.named_children()))
        yield Matrix(
            name=path,
            parameter=f"{path}.weight",
            role=role,
            block=block_of(path),
            shape=shape,
            transposed=transposed,
            expert=None,
            shares_input=input_key(owner, role, path),
            ends_branch=role in BRANCH_ENDS,
        )
        return
    for leaf, parameter in module.named_parameters(recurse=False):
        role = role_of(leaf)
        if parameter.ndim == 3 and role in EXPERT_ROLES:
            yield from _experts(path, leaf, role, module, model)


def _experts(path: str, leaf: str, role: str, module: nn.Module, model: nn.Module) -> Iterator[Matrix]:
    """One matrix for every expert of a fused tensor [experts, out, in] or [experts, in, out]."""
    num_experts, rows, columns = getattr(module, leaf).shape
    transposed = getattr(module, "is_transposed", None)
    if transposed is None:
        # The side that faces the residual stream: the output of down, the input of the others.
        hidden = getattr(model.config, "hidden_size", None)
        transposed = (rows if role == "down" else columns) != hidden
    name = f"{path}.{leaf}"
    for expert in range(num_experts):
        yield Matrix(
            name=f"{name}[{expert}]",
            parameter=name,
            role=role,
            block=block_of(path),
            shape=_out_in((rows, columns), transposed),
            transposed=transposed,
            expert=expert,
            shares_input=input_key(f"{path}[{expert}]", role, f"{name}[{expert}]"),
            ends_branch=role in BRANCH_ENDS,
        )


def _is_router(out_features: int, parent: nn.Module) -> bool:
    """A linear layer beside as many experts as it has outputs chooses among them."""
    for sibling in parent.children():
        if isinstance(sibling, nn.ModuleList) and len(sibling) == out_features:
            return True
        # By role: the weight of a depthwise convolution beside a matrix is 3-D too.
        fused = [p for leaf, p in sibling.named_parameters(recurse=False) if role_of(leaf) in EXPERT_ROLES]
        if any(p.ndim == 3 and p.shape[0] == out_features for p in fused):
            return True
    return False


def _out_in(shape: tuple[int, ...], transposed: bool) -> tuple[int, int]:
    rows, columns = shape
    return (columns, rows) if transposed else (rows, columns)
