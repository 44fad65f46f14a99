"""Which rule steps which parameter: matrices by the matrix rule, the rest by AdamW, and by pattern what you say."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup

from lowrank_kit.errors import UsageError, did_you_mean
from lowrank_kit.linalg.topk import rank_of_fraction
from lowrank_kit.matrices import ADAPTER_PARTS, Matrix, find_matrices, names_matching
from lowrank_kit.optim.groups import POSITION
from lowrank_kit.optim.numuon import NuMuon
from lowrank_kit.optim.rules import MATRIX_RULES
from lowrank_kit.optim.schedule import fraction_at
from lowrank_kit.report.tables import text_table

Overrides = Mapping[str, str | Mapping[str, Any]]
Groups = list[dict[str, Any]]
_KINDS = ("matrices", "adapters", "embeddings", "vectors")


def parameter_groups(
    model: nn.Module,
    *,
    rule: str,
    lr: float,
    adamw_lr: float | None = None,
    weight_decay: float = 0.0,
    overrides: Overrides | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Groups for `NuMuon`: matrices by `rule`; adapters, embeddings, head and routers by AdamW; vectors without decay.

    Fused qkv and gate-up are stepped part by part, matrices stored [in, out] the right way round: groups differ where
    layouts do. Frozen parameters are left out, tied ones appear once.

    Args:
        model: a transformers model, also one with LoRA adapters of PEFT; these are no matrices.
        rule: numuon, muon, adamw or sgd, for the matrices.
        lr: learning rate of the matrices.
        adamw_lr: learning rate of all that is no matrix; None is `lr`.
        weight_decay: of matrices, adapters, embeddings, head and routers.
        overrides: pattern of parameter names, as in a shell -> a rule or options of its group; a later one wins.
            `{"*.o_proj.*": {"rank_schedule": "fixed:0.5"}, "*.layers.0.*": "adamw"}`.
        options: further options of the matrices, as `rank_schedule` and `total_steps`.

    Returns:
        Groups with `name` and the names of their parameters, `param_names`, the largest kind first.

    Raises:
        UsageError: a pattern that no trainable parameter matches, or that sends what is no matrix to a matrix rule; an
            option that there is not.
    """
    matrices = {matrix.parameter: matrix for matrix in find_matrices(model)}
    other_lr = lr if adamw_lr is None else adamw_lr
    defaults: dict[str, dict[str, Any]] = {
        "matrices": {"rule": rule, "lr": lr, "weight_decay": weight_decay, **options},
        "adapters": {"rule": "adamw", "lr": other_lr, "weight_decay": weight_decay},
        "embeddings": {"rule": "adamw", "lr": other_lr, "weight_decay": weight_decay},
        "vectors": {"rule": "adamw", "lr": other_lr, "weight_decay": 0.0},
    }
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    chosen: dict[str, dict[str, Any]] = {}
    for name, parameter in trainable.items():
        kind = _kind(name, parameter.ndim, matrices)
        chosen[name] = {"name": kind, **defaults[kind], **_layout(matrices.get(name))}
    for pattern, change in (overrides or {}).items():
        _override(chosen, pattern, {"rule": change} if isinstance(change, str) else dict(change), defaults)
    _refuse_unknown(chosen)
    _refuse_non_matrices(chosen, matrices)
    groups: list[dict[str, Any]] = []
    for name, parameter in trainable.items():
        group = next((g for g in groups if _same_options(g, chosen[name])), None)
        if group is None:
            groups.append(group := {**chosen[name], "params": [], "param_names": []})
        group["params"].append(parameter)
        group["param_names"].append(name)
    return sorted(groups, key=lambda group: _KINDS.index(group["name"].split(" ")[0]))


# What may be said of parameters by pattern in one line, and how its text is read.
_OVERRIDES: dict[str, Callable[[str], Any]] = {
    "rule": str,
    "lr": float,
    "weight_decay": float,
    "spectral_decay": float,
    "rank_schedule": str,
    "topk": str,
    "polar": str,
    "scale": str,
}


def parse_overrides(lines: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Overrides from their one-line form.

    Args:
        lines: each PATTERN=RULE or PATTERN=KEY=VALUE, KEY being rule, lr, weight_decay, spectral_decay, rank_schedule,
            topk, polar or scale: `*.o_proj.*=adamw`, `*.down_proj.*=rank_schedule=fixed:0.5`.

    Raises:
        UsageError: a line of another form, or a value that does not parse.
    """
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        pattern, _, change = line.partition("=")
        key, equals, value = change.partition("=")
        key, value = (key, value) if equals else ("rule", key)
        try:
            if not (pattern and value):
                raise ValueError
            found.setdefault(pattern, {})[key] = _OVERRIDES[key](value)
        except (KeyError, ValueError):
            raise UsageError(
                f'an override reads PATTERN=RULE or PATTERN=KEY=VALUE, got "{line}"',
                hint=f'"*.o_proj.*=adamw" or "*.down_proj.*=rank_schedule=fixed:0.5"; keys: {", ".join(_OVERRIDES)}',
            ) from None
    return found


class NuMuonFactory:
    """Builds the optimizer from the model, through the Trainer's hook for optimizers that need it whole.

    `Trainer(..., optimizer_cls_and_kwargs=(NuMuonFactory, {"rule": "numuon", "lr": 4e-3, "total_steps": 1000}))`
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        process_group: ProcessGroup | None = None,
        scaled: Callable[[Groups], Groups] | None = None,
        **options: Any,
    ) -> NuMuon:
        """The optimizer of `parameter_groups(model, **options)`, and of what `scaled` makes of these groups."""
        groups = parameter_groups(model, **options)
        return NuMuon(groups if scaled is None else scaled(groups), process_group=process_group)


def routing_rows(model: nn.Module, optimizer: NuMuon) -> list[dict[str, Any]]:
    """What steps what: role, count, shape, rule, learning rate and rank, a row for each that is different.

    Args:
        model: the model whose parameters the optimizer steps.
        optimizer: made of `parameter_groups`.
    """
    found: dict[str, list[Matrix]] = {}
    for matrix in find_matrices(model):
        found.setdefault(matrix.parameter, []).append(matrix)
    names = {id(p): name for name, p in model.named_parameters()}
    rows: Counter[tuple[Any, ...]] = Counter()
    for group in optimizer.param_groups:
        # A scheduler that warms up has set the rate to 0 by now, and keeps the one it was made with.
        how = (group["rule"], f"{group.get('initial_lr', group['lr']):g}")
        for p in group["params"]:
            members = found.get(names[id(p)], [])
            if not members:
                rows[group["name"], None, *how, None] += 1
            for role, shape in (part for matrix in members for part in _parts(matrix, group)):
                rows[role, " x ".join(map(str, shape)), *how, _rank(group, shape)] += 1
    keys = ("role", "shape", "rule", "lr", "rank")
    return [{**dict(zip(keys, row, strict=True)), "count": count} for row, count in rows.items()]


def routing_table(model: nn.Module, optimizer: NuMuon) -> str:
    """`routing_rows` as text."""
    return text_table(routing_rows(model, optimizer), ("role", "count", "shape", "rule", "lr", "rank"))


def _kind(name: str, ndim: int, matrices: Mapping[str, Matrix]) -> str:
    if name in matrices:
        return "matrices"
    if any(part in ADAPTER_PARTS for part in name.split(".")):
        return "adapters"
    # The biases of fused experts are stacked to 2-D, and vectors all the same.
    return "vectors" if ndim < 2 or name.endswith("bias") else "embeddings"


def _layout(matrix: Matrix | None) -> dict[str, Any]:
    """Keys of the group of a matrix that does not lie in its parameter as [out, in]."""
    if matrix is None:
        return {}
    layout: dict[str, Any] = {"transposed": True} if matrix.transposed else {}
    if matrix.split is not None:
        layout |= {"split": matrix.split.sizes, "split_groups": matrix.split.groups}
    return layout


def _override(
    chosen: dict[str, dict[str, Any]], pattern: str, change: dict[str, Any], defaults: Mapping[str, Mapping[str, Any]]
) -> None:
    matching = names_matching(pattern, chosen, "trainable parameters")
    # What changes its rule also takes the learning rate of the new one, and an adapter the options of the matrices.
    missing: Mapping[str, Any] = {}
    if change.get("rule") in MATRIX_RULES:
        missing, change = defaults["matrices"], {"lr": defaults["matrices"]["lr"], **change}
    elif "rule" in change:
        change = {"lr": defaults["vectors"]["lr"], **change}
    for name in matching:
        kind = chosen[name]["name"].split(" ")[0]
        chosen[name] = {**missing, **chosen[name], **change, "name": f"{kind} ({pattern})"}


def _refuse_unknown(chosen: Mapping[str, Mapping[str, Any]]) -> None:
    """A group may hold any key: one that nobody reads would be passed over in silence."""
    known = {*inspect.signature(NuMuon).parameters, *POSITION, "name"} - {"params", "process_group"}
    for key in {key: None for options in chosen.values() for key in options}:
        if key not in known:
            raise UsageError(f'unknown option "{key}" of an optimizer group', hint=did_you_mean(key, known))


def _refuse_non_matrices(chosen: Mapping[str, Mapping[str, Any]], matrices: Mapping[str, Matrix]) -> None:
    for name, options in chosen.items():
        adapter = _kind(name, 2, matrices) == "adapters"
        if options["rule"] in MATRIX_RULES and name not in matrices and not adapter:
            raise UsageError(
                f'"{name}" is no matrix: rule {options["rule"]} is not for embeddings, head, routers and vectors',
                hint="take a narrower pattern, or the rule adamw",
            )


def _same_options(group: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")} == options


def _parts(matrix: Matrix, group: Mapping[str, Any]) -> list[tuple[str, tuple[int, int]]]:
    """Role and shape of what is stepped as one."""
    split = matrix.split
    if split is None or not group["split"]:
        return [(matrix.role, matrix.shape)]
    return [(role, (size * split.groups, matrix.shape[1])) for role, size in zip(split.roles, split.sizes, strict=True)]


def _rank(group: Mapping[str, Any], shape: tuple[int, int]) -> str | None:
    """First and last rank of the schedule, of the smaller side."""
    if group["rule"] != "numuon":
        return None
    fractions = [fraction_at(group["rank_schedule"], progress) for progress in (0.0, 1.0)]
    ranks = [rank_of_fraction(fraction, shape, multiple=group["rank_multiple"]) for fraction in fractions]
    return f"{' to '.join(map(str, dict.fromkeys(ranks)))} of {min(shape)}"
