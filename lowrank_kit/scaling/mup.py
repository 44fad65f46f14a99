"""Spectral muP for a model: one object that knows base and target, and what each parameter is trained with."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lowrank_kit.errors import UsageError, did_you_mean
from lowrank_kit.scaling.branches import Fold, find_folds
from lowrank_kit.scaling.entry import embedding_scale
from lowrank_kit.scaling.granite import has_multipliers, with_multipliers
from lowrank_kit.scaling.initial import initial_stds
from lowrank_kit.scaling.parts import Part, find_parts, key_of
from lowrank_kit.scaling.rules import DEPTH_RULES, Fans, Ratios, ratios, step_of
from lowrank_kit.scaling.sizes import Config, check_sizes, depth_of, resolve_configs, width_of

FORMS = ("folded", "explicit")
# Where a group says nothing: that of torch's AdamW and of this package's.
ADAM_EPS = 1e-8
# Of a wrapper around the model, in a parameter's name.
_WRAPPERS = ("module", "_orig_mod")
# Key of a group -> its ratio.
_SCALED = {"lr": "lr", "weight_decay": "weight_decay", "eps": "eps", "spectral_decay": "decay"}
Group = dict[str, Any]


class MuP:
    """Settings tuned on a base model, for a wider and deeper target.

    The multiplier 1 / L of every residual branch and 1 / i of the logits are folded into the weights that end a branch
    and into the head, with learning rate, weight decay and eps such that every step is that of the model with
    multipliers. So the model is a plain one of its architecture, at every step.

    Args:
        base: config, or folder or config.json, of the model that was tuned; or the numbers of its config that differ
            from the target's, as {"hidden_size": 256, "num_hidden_layers": 4, ...}.
        target: config, or folder or config.json, of the model to train.
        optimizer: name in `STEPS`, of groups that tell no rule of their own.
        depth: "k2", "k1" or "none", see `DEPTH_RULES`.
        form: "folded", or "explicit": the multipliers stay in the forward pass. Granite's config has them; for others
            whoever builds the model has to put them there.

    Attributes:
        parts: parameter name -> what it is.
        amounts: what a `Fold` is to -> c.
        multipliers: parameter name -> c, of all with a forward multiplier that is not 1.

    Raises:
        UsageError: base and target that differ in more than width and depth, a base deeper than the target, parts that
            there is no rule for, an unknown optimizer.

    Source: spectral muP (arXiv 2603.00541). Folding is the abc-symmetry (arXiv 2011.14522) of multiplier, std and rate,
    for depth as for width.
    """

    def __init__(
        self,
        base: Config | Mapping[str, Any],
        target: Config,
        *,
        optimizer: str = "numuon",
        depth: str = "k2",
        form: str = "folded",
    ) -> None:
        for what, value, known in (("depth rule", depth, DEPTH_RULES), ("form", form, FORMS)):
            if value not in known:
                raise UsageError(f'unknown {what} "{value}"', hint=did_you_mean(value, known))
        step_of(optimizer)
        self.base, self.target = resolve_configs(base, target)
        check_sizes(self.base, self.target)
        self.optimizer, self.depth, self.form = optimizer, depth, form
        self.width_ratio = width_of(self.target) / width_of(self.base)
        self.depth_ratio = depth_of(self.target) / depth_of(self.base)
        small, large = _outline(self.base), _outline(self.target)
        base_parts, self.parts = find_parts(small), find_parts(large)
        of_base = _matched(base_parts, self.parts)
        self._fans = {name: Fans(base_parts[of_base[name]].fans, part.fans) for name, part in self.parts.items()}
        before, now = initial_stds(small), initial_stds(large)
        # What the architecture's own initialization makes of the size, to be undone.
        self._own = {
            name: before[of_base[name]] / now[name] for name in self.parts if now.get(name) and of_base[name] in before
        }
        self.amounts = {"branch": self.depth_ratio ** -DEPTH_RULES[depth].branch, "output": 1 / self.width_ratio}
        self._folds = find_folds(self.base)
        for name, part in self.parts.items():
            if part.kind != "vector" and name not in now:
                raise UsageError(
                    f"{name} of {type(large).__name__} is drawn in a way that is not known, and may go with the size",
                    hint="train this model without --mup-base",
                )
        own = embedding_scale(self.base) / embedding_scale(self.target)
        if not math.isclose(own, 1):
            self._folds[_embeddings(large)] = Fold("input")
            self.amounts["input"] = own
            if self.target.tie_word_embeddings:  # the head is multiplied by it, too
                self.amounts["output"] /= own
        found = {name: self._folds[part.key] for name, part in self.parts.items() if part.key in self._folds}
        self.multipliers = {name: self.amounts[fold.to] for name, fold in found.items() if self.amounts[fold.to] != 1}

    def fold(self, name: str) -> float:
        """c that a parameter holds of a forward multiplier: 1 for most, and in the explicit form for all."""
        return self.multipliers.get(self._part(name).name, 1.0) if self.form == "folded" else 1.0

    def unfolded(self, name: str, value: Tensor) -> Tensor:
        """What a parameter is in the model with multipliers, given what it is in the folded one."""
        if (c := self.fold(name)) == 1:
            return value
        return (1 + value) / c - 1 if self._folds[self._part(name).key].offset else value / c

    def ratios(self, name: str, optimizer: str | None = None, scale: str | None = None) -> Ratios:
        """What changes for a parameter from the base to the target.

        Args:
            name: of the parameter.
            optimizer: that steps it; None is this object's.
            scale: see `step_of`.
        """
        part = self._part(name)
        return ratios(
            part.kind,
            self._fans[part.name],
            step_of(optimizer or self.optimizer, scale),
            depth=self.depth_ratio,
            rule=DEPTH_RULES[self.depth],
            inside=part.inside,
            fold=self.fold(name),
        )

    def _part(self, name: str) -> Part:
        bare = ".".join(piece for piece in name.split(".") if piece not in _WRAPPERS)
        if bare not in self.parts:
            raise UsageError(
                f"{name} is no parameter of the target, a {self.target.model_type} of {len(self.parts)} parameters",
                hint="build the model from the config that this was made with",
            )
        return self.parts[bare]

    # The model

    def build(self, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The target with random weights, on the default device; on meta only its outline.

        Drawn as the architecture draws them, then scaled: with ratios of 1 it is the plain model, bit for bit.
        """
        config = self.target
        if self.form == "explicit" and has_multipliers(config):
            config = with_multipliers(config, branch=self.amounts["branch"], output=self.amounts["output"])
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self.initialize_(model)
        return model

    @torch.no_grad()
    def initialize_(self, model: PreTrainedModel) -> None:
        """Scale the weights of a target that its architecture has just initialized, in place."""
        for name, parameter in model.named_parameters():
            part = self._part(name)
            if part.kind == "vector":
                c = self.fold(name)
                if c != 1:
                    offset = self._folds[part.key].offset
                    parameter.copy_(c * (1 + parameter) - 1 if offset else c * parameter)
                continue
            # Of the std alone, for which the optimizer does not count.
            factor = self.ratios(name, "adamw").std * self._own.get(part.name, 1.0)
            if factor != 1:
                parameter.mul_(factor)

    # Its optimizer

    def param_groups(
        self, model: nn.Module, *, lr: float, weight_decay: float = 0.0, eps: float | None = None
    ) -> list[Group]:
        """Groups of all parameters for one of torch's optimizers; vectors are not decayed.

        Args:
            model: the target.
            lr: learning rate tuned on the base.
            weight_decay: of the base.
            eps: of the base; None is `ADAM_EPS` where the optimizer is Adam's kin.
        """
        kinds: dict[str, list[tuple[str, Tensor]]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                part = self._part(name)
                kinds.setdefault({"hidden": "matrices", "vector": "vectors"}.get(part.kind, "embeddings"), []).append(
                    (name, parameter)
                )
        groups: list[Group] = [
            {
                "name": kind,
                "params": [parameter for _, parameter in named],
                "param_names": [name for name, _ in named],
                "lr": lr,
                "weight_decay": 0.0 if kind == "vectors" else weight_decay,
                **({} if eps is None else {"eps": eps}),
            }
            for kind, named in kinds.items()
        ]
        return self.scaled(groups)

    def scaled(self, groups: Iterable[Group]) -> list[Group]:
        """Groups of the base's settings, divided into groups of the target's; those with the base's rate come first.

        Args:
            groups: with `params` and `param_names`, `lr`, and what else there is of weight_decay, eps (`ADAM_EPS`
                where Adam's has none) and spectral_decay; `rule` and `scale` say whose steps, as
                `optim.parameter_groups` gives them.

        Raises:
            UsageError: no group, a group without parameters or names, decay of a folded gain 1 + w, which would pull
                it to 1, an optimizer or scale that there is no rule for.
        """
        made: dict[tuple[Any, ...], Group] = {}
        for number, group in enumerate(groups):
            names, params = group.get("param_names", ()), list(group["params"])
            if not params or len(names) != len(params):
                raise UsageError(
                    f'group {number} "{group.get("name", "")}" has {len(params)} parameters and {len(names)} names',
                    hint="every group needs parameters, and their names as param_names",
                )
            if step_of(group.get("rule") or self.optimizer, group.get("scale")).eps == "entry":
                group = {**group, "eps": group.get("eps", ADAM_EPS)}
            for name, parameter in zip(names, params, strict=True):
                found = self.ratios(name, group.get("rule"), group.get("scale"))
                self._refuse_decay(name, group)
                values = {key: group[key] * getattr(found, of) for key, of in _SCALED.items() if group.get(key)}
                key = (number, *values.items())
                one = made.setdefault(key, {**group, **values, "params": [], "param_names": []})
                one["params"].append(parameter)
                one["param_names"].append(name)
                one["lr_ratio"] = found.lr
        if not made:
            raise UsageError("no parameters to train")
        return sorted(made.values(), key=lambda group: group["lr_ratio"] != 1)

    def _refuse_decay(self, name: str, group: Group) -> None:
        part = self._part(name)
        fold = self._folds.get(part.key)
        if fold is not None and fold.offset and self.fold(name) != 1 and group.get("weight_decay"):
            raise UsageError(
                f"weight decay of {name}: it holds c (1 + w) - 1, and would be pulled to a gain of 1",
                hint="leave gains out of weight decay",
            )

    @torch.no_grad()
    def clip_grad_norm_(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scale gradients down to a norm, that which they have in the model with multipliers; returns the norm.

            sqrt(sum (c |g|)^2)

        Args:
            model: the target, with gradients.
            max_norm: of the base.
        """
        named = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
        if not named:
            return torch.tensor(0.0)
        norms = [torch.linalg.vector_norm(p.grad) * self.fold(name) for name, p in named]
        norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
        total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
        torch.nn.utils.clip_grads_with_norm_([p for _, p in named], max_norm, total)
        return total

    # What it says

    def rows(self, optimizer: str | None = None, scale: str | None = None) -> list[dict[str, Any]]:
        """What each kind of parameter is trained with, a row for each that is different.

        Args:
            optimizer: of the matrices; None is this object's. What it does not step, AdamW does.
            scale: see `step_of`.
        """
        chosen = optimizer or self.optimizer
        step = step_of(chosen, scale)
        counts: Counter[tuple[Any, ...]] = Counter()
        for name, part in self.parts.items():
            stepped = part.kind == "hidden" and part.role != "router"
            by = chosen if stepped or step.vectors else "adamw"
            found, fans = self.ratios(name, by, scale if by == chosen else None), self._fans[name]
            std = found.std * self._own.get(name, 1.0)
            sizes = (round(fans.i, 4), round(fans.o, 4))
            counts[part.role, by, *sizes, self.fold(name), std, found.lr, found.weight_decay, found.eps] += 1
        keys = ("role", "optimizer", "fan-in", "fan-out", "fold", "std", "lr", "weight decay", "eps")
        return [{**dict(zip(keys, row, strict=True)), "count": count} for row, count in counts.items()]


def _outline(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _embeddings(model: PreTrainedModel) -> str:
    """Key of the input embeddings."""
    weight = model.get_input_embeddings().weight
    return next(key_of(name) for name, parameter in model.named_parameters() if parameter is weight)


def _matched(base: Mapping[str, Part], target: Mapping[str, Part]) -> dict[str, str]:
    """Parameter of the target -> one of the base, of the same key.

    Raises:
        UsageError: a key that one of them lacks, or whose tensors differ.
    """
    small, large = _by_key(base, "base"), _by_key(target, "target")
    if others := sorted(large.keys() ^ small.keys()):
        one = "target" if others[0] in large else "base"
        raise UsageError(f"only the {one} has {others[0]}", hint="base and target of one architecture")
    return {name: small[part.key].name for name, part in target.items()}


def _by_key(parts: Mapping[str, Part], whose: str) -> dict[str, Part]:
    found: dict[str, Part] = {}
    for part in parts.values():
        first = found.setdefault(part.key, part)
        if first.fans != part.fans:
            raise UsageError(
                f"{first.name} and {part.name} of the {whose} differ in size, {first.fans} and {part.fans}",
                hint="spectral muP is for models whose blocks are alike",
            )
    return found
