"""Which tensors of a causal LM are matrices: the one answer, for everybody.

The optimizer's routing, the analyzer, the compressor and the scaling rules all ask `find_matrices`. It asks the model:
its modules, its input and output embeddings, the shapes. The only names it knows are those of the parts of a block
(`q_proj`, `c_attn`, `fc1`), which families share; there is no list of architectures.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
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
# Fused qkv whose rows go head by head, a run of q, k and v for each key head; and whose rows are always [q; k; v].
INTERLEAVED_LEAVES = ("query_key_value",)
CONTIGUOUS_LEAVES = ("Wqkv",)
# Of state spaces: of rank hidden / 16 already, and multiplied with by those around it instead of being called.
UNCALLED_LEAVES = ("dt_proj",)
# The output of attention or of the MLP, by what stands beside it.
AMBIGUOUS_LEAVES = ("c_proj", "dense")
ATTENTION_INPUTS = frozenset({"q", "k", "v", "qkv"})
MLP_INPUTS = frozenset({"gate", "up", "gate_up"})
BRANCH_ENDS = frozenset({"o", "down"})
EXPERT_ROLES = MLP_INPUTS | {"down"}
# Of a layer and of experts of low rank: `q_proj.A`, in the pivoted form with C for B, and `gate_up.A`.
FACTORS = ("A", "B", "C")
EXPERT_FACTORS = ("A", "B")


# PEFT's names: an adapter's two factors, and what it stands beside.
ADAPTER_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
ADAPTED_LEAF = "base_layer"


@dataclass(frozen=True)
class Split:
    """Where the parts of a fused matrix lie in its output rows: `groups` equal runs, each with `sizes` rows of each.

    Args:
        roles: of the parts, in order.
        sizes: rows of each part in a run.
        groups: 1 for [q; k; v], the number of key heads where they are interleaved by head.
    """

    roles: tuple[str, ...]
    sizes: tuple[int, ...]
    groups: int = 1


@dataclass(frozen=True)
class Matrix:
    """A hidden 2-D weight W of a causal LM, y = W x; one expert of a fused 3-D tensor is a matrix too.

    Args:
        name: path of the module, for an expert `path.experts.down_proj[3]`.
        parameter: name of the parameter that holds it.
        role: q, k, v, o, gate, up, down; qkv and gate_up where they are fused; else the model's own name. Of a factor
            with its letter, as `q.A`: in a compressed model each factor is a matrix.
        block: index of its block, None outside the blocks.
        shape: (out, in).
        transposed: stored as [in, out].
        expert: index in a fused 3-D tensor, None for a plain matrix.
        shares_input: matrices with the same key read the same input.
        ends_branch: its output is added to the residual stream.
        split: its parts, for fused qkv and gate_up whose layout is known.
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
    split: Split | None = None


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


def find_head(model: PreTrainedModel) -> Matrix:
    """The LM head as a matrix of role "head", for those who ask for it by name. Works on the meta device.

    Raises:
        UsageError: no linear head, or one that is tied to the embeddings.
    """
    names = {id(module): name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UsageError(
            f"{type(model).__name__} has no linear head that could be factorized", hint="include other matrices"
        )
    name = names[id(head)]
    tied = [path for path, module in model.named_modules() if getattr(module, "weight", None) is head.weight]
    if others := [path for path in tied if path != name]:
        raise UsageError(
            f"{name} is tied to {', '.join(others)}: two factors of it would be the embeddings too, which stay dense",
            hint=f"leave out {name}; a head of its own has tie_word_embeddings false in config.json",
        )
    return Matrix(
        name=name,
        parameter=f"{name}.weight",
        role="head",
        block=None,
        shape=(head.weight.shape[0], head.weight.shape[1]),
        transposed=False,
        expert=None,
        shares_input=name,
        ends_branch=False,
    )


def token_share(model: PreTrainedModel, matrix: Matrix) -> float:
    """Share of the tokens that a matrix of a model sees: all, or those of an expert."""
    if matrix.expert is None:
        return 1.0
    config = model.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return config.num_experts_per_tok / experts if experts else 1.0


def embedding_names(model: nn.Module) -> list[str]:
    """Paths of the input and output embeddings, and of what is tied to one."""
    found = _embeddings(model)
    return [path for path, module in model.named_modules() if id(module) in found]


def names_matching(pattern: str, names: Collection[str], what: str) -> list[str]:
    """The names that a pattern matches, as in a shell: "*.o_proj" is all of a kind. A name also matches itself.

    Args:
        pattern: with *, ? and [...].
        names: to choose from.
        what: the names are of, for the error message.

    Raises:
        UsageError: none, with the nearest.
    """
    found = [name for name in names if fnmatchcase(name, pattern) or name == pattern]
    if not found:
        raise UsageError(
            f'the pattern "{pattern}" matches none of {len(names)} {what}',
            hint=f'names are as "{_nearest(pattern, names)}", and "*.o_proj*" matches all of a kind',
        )
    return found


def _nearest(pattern: str, names: Collection[str]) -> str:
    """The name most like a pattern, by the parts that both have."""
    wanted = [part for part in re.split(r"[.*?]+", pattern) if part]

    def likeness(name: str) -> float:
        parts = name.split(".")
        return sum(max(SequenceMatcher(None, part, other).ratio() for other in parts) for part in wanted)

    kinds = {re.sub(r"\d+", "", name): name for name in reversed(list(names))}  # the first of each
    return max(kinds.values(), key=likeness, default="")


def role_of(leaf: str, sibling_leaves: Iterator[str] | tuple[str, ...] = ()) -> str:
    """Role of a matrix by the last part of its path and of its siblings', or the leaf itself when unknown."""
    if leaf in AMBIGUOUS_LEAVES:
        return "o" if any(ROLE_OF_LEAF.get(s) in ATTENTION_INPUTS for s in sibling_leaves) else "down"
    return ROLE_OF_LEAF.get(leaf, leaf)


def block_of(path: str) -> int | None:
    """Index of the block a module or tensor name lies in: the first whole number of its path."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(match.group(1)) if match else None


def block_path(path: str) -> str:
    """Path of the block that a module lies in: up to the first whole number of its path."""
    match = re.match(r"(?:.*?\.)?\d+(?=\.|$)", path)
    if match is None:
        raise ValueError(f"{path} lies in no block")
    return match.group()


def input_key(owner: str, role: str, name: str, sibling_leaves: Collection[str] = ()) -> str:
    """Key of the input a matrix reads: q, k, v of one attention share theirs, gate and up of one MLP theirs."""
    # Keys and values without queries, as of RWKV, are no attention, and read what they mix themselves.
    if role in ("k", "v") and not any(role_of(leaf) == "q" for leaf in sibling_leaves):
        return name
    if role in ATTENTION_INPUTS:
        return f"{owner}:attention"
    if role in MLP_INPUTS:
        return f"{owner}:mlp"
    return name


def _embeddings(model: nn.Module) -> set[int]:
    """Ids of the input and output embeddings with all in them, and of every module tied to one by its weight."""
    ends = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            ends.append(getattr(model, getter)())
        except (AttributeError, NotImplementedError):
            continue
    # In them: PEFT wraps a head that is to be saved, and keeps the original beside its copy.
    inside = [module for end in ends if isinstance(end, nn.Module) for module in end.modules()]
    weights = {id(module.weight) for module in inside if getattr(module, "weight", None) is not None}
    return {id(module) for module in model.modules() if id(getattr(module, "weight", None)) in weights}


def _matrices_of(path: str, module: nn.Module, modules: dict[str, nn.Module], model: nn.Module) -> Iterator[Matrix]:
    if any(part in ADAPTER_PARTS for part in path.split(".")):
        return
    owner, _, leaf = path.rpartition(".")
    if leaf == ADAPTED_LEAF:
        owner, _, leaf = owner.rpartition(".")
    if isinstance(module, nn.Linear | Conv1D):
        transposed = isinstance(module, Conv1D)
        shape = _out_in(module.weight.shape, transposed)
        layer, letter = path, ""
        if leaf in FACTORS and hasattr(modules[owner], "rank"):
            layer, letter = owner, leaf
            owner, _, leaf = layer.rpartition(".")
        parent = modules[owner]
        siblings = [name for name, _ in parent.named_children()]
        role = role_of(leaf, tuple(siblings))
        # A router stands beside the experts, or in a module that does, under a name that is no part of a block.
        nested = role == leaf and _is_router(shape[0], modules[owner.rpartition(".")[0]], any_stack=True)
        router = not letter and (nested or _is_router(shape[0], parent))
        if min(shape) == 1 or leaf in UNCALLED_LEAVES or router:
            return
        whole = letter in ("", "B")  # its rows are those of the weight
        yield Matrix(
            name=path,
            parameter=f"{path}.weight",
            role=f"{role}.{letter}" if letter else role,
            block=block_of(path),
            shape=shape,
            transposed=transposed,
            expert=None,
            shares_input=input_key(owner, role, layer, siblings) if letter in ("", "A") else path,
            ends_branch=whole and role in BRANCH_ENDS,
            split=_split(role, leaf, module, parent, getattr(model, "config", None)) if whole else None,
        )
        return
    for name, parameter in module.named_parameters(recurse=False):
        if _of_experts(f"{leaf}.{name}", parameter):
            yield from _experts(
                path, name, f"{leaf}.{name}" if name in EXPERT_FACTORS else role_of(name), module, model
            )


def _of_experts(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter, named with its module, holds a matrix or a factor of each expert.

    By role: the weight of a depthwise convolution is 3-D too.
    """
    owner, _, leaf = name.rpartition(".")
    role = owner.rpartition(".")[2] if leaf in EXPERT_FACTORS else role_of(leaf)
    return parameter.ndim == 3 and role in EXPERT_ROLES


def _experts(path: str, leaf: str, role: str, module: nn.Module, model: nn.Module) -> Iterator[Matrix]:
    """One matrix for every expert of a fused tensor [experts, out, in] or [experts, in, out]."""
    num_experts, rows, columns = getattr(module, leaf).shape
    transposed = getattr(module, "is_transposed", None)
    if transposed is None:
        # The side that faces the residual stream: the output of down, the input of the others.
        hidden = getattr(model.config, "hidden_size", None)
        transposed = (rows if role == "down" else columns) != hidden
    name = f"{path}.{leaf}"
    out = _out_in((rows, columns), transposed)[0]
    fused = role in ("gate_up", "gate_up.B")
    split = _split_gate_up(out, interleaved=not getattr(module, "is_concatenated", True)) if fused else None
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
            split=split,
        )


def _split(role: str, leaf: str, module: nn.Linear | Conv1D, parent: nn.Module, config: Any) -> Split | None:
    """Parts of a fused linear layer; None for others, and where its rows or their order are not known for sure."""
    out, _ = _out_in(module.weight.shape, isinstance(module, Conv1D))
    if role == "gate_up":
        return _split_gate_up(out, interleaved=False)
    if role != "qkv" or not isinstance(config, PreTrainedConfig):
        return None
    config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads
    for keys in dict.fromkeys((key_heads, heads, 1)):
        if out != (heads + 2 * keys) * head_dim:
            continue
        if leaf in INTERLEAVED_LEAVES:
            return Split(("q", "k", "v"), (heads // keys * head_dim, head_dim, head_dim), keys)
        # Equal thirds may also go head by head (GPT-BigCode) or in runs of q, v, k (CodeGen). They do not in a Conv1D,
        # as of GPT-2, nor in an attention that counts its key heads, as Llama's descendants do.
        known = leaf in CONTIGUOUS_LEAVES or isinstance(module, Conv1D) or hasattr(parent, "num_key_value_heads")
        return Split(("q", "k", "v"), (heads * head_dim, *[keys * head_dim] * 2)) if known or keys == 1 else None
    return None


def _split_gate_up(out: int, *, interleaved: bool) -> Split | None:
    if out % 2:
        return None
    return Split(("gate", "up"), (1, 1), out // 2) if interleaved else Split(("gate", "up"), (out // 2, out // 2))


def _is_router(out_features: int, parent: nn.Module, *, any_stack: bool = False) -> bool:
    """A linear layer beside as many experts as it has outputs chooses among them.

    Args:
        any_stack: take a 3-D weight of whatever name for experts, unless it is that of a depthwise convolution.
    """
    for sibling in parent.children():
        if isinstance(sibling, nn.ModuleList) and len(sibling) == out_features:
            return True
        stacks = (
            p
            for name, p in _fused_in(sibling)
            if _of_experts(name, p) or (any_stack and p.ndim == 3 and min(p.shape) > 1)
        )
        if any(p.shape[0] == out_features for p in stacks):
            return True
    return False


def _fused_in(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of a module, and of the factors in experts of low rank."""
    yield from module.named_parameters(recurse=False)
    for child, factors in module.named_children():
        if child in EXPERT_ROLES:
            yield from factors.named_parameters(prefix=child, recurse=False)


def _out_in(shape: tuple[int, ...], transposed: bool) -> tuple[int, int]:
    rows, columns = shape
    return (columns, rows) if transposed else (rows, columns)
