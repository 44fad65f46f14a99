"""What comes of spectral muP with a family: what `docs/scaling-architectures.md` tells and the tests ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from lowrank_kit.errors import UsageError
from lowrank_kit.scaling import MuP, find_folds
from tests.families import FAMILIES
from tests.more_families import EXAMPLES, MORE, VOCABULARY, tiny_config

PASSED, REFUSED, ABSENT = "passed", "refused", "not in this transformers"
# Sizes that go with the width, by the names that configs have for them. Heads go with it, head dimensions do not.
WIDE = (
    *("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "intermediate_size", "shared_intermediate_size"),
    *("ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "dff", "moe_intermediate_size", "expert_ffn_hidden_size"),
    *("shared_expert_intermediate_size", "num_attention_heads", "n_head", "n_heads", "attention_heads", "num_heads"),
    *("num_key_value_heads", "mlp_hidden_size", "intermediate_size_mlp"),
    *("mamba_n_heads", "mamba_num_heads", "mamba_d_ssm"),
)
# What a config makes of the depth itself, or has two of whatever the depth.
_FOLLOWS = {"attention_layers", "attn_layer_indices", "moe_layers", "time_step_limit"}
DEEP = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


@dataclass(frozen=True)
class Outcome:
    """What came of one family.

    Args:
        way: PASSED, REFUSED or ABSENT.
        ends: leaf names of what the branches' multiplier is folded into.
        after: whether these are gains of norms after the branches.
        output: leaf name of what the logits' is folded into.
        scale: what is folded into the embeddings.
        why: it was refused.
        has_experts: a router chooses among them.
        output_gain: whether `output` is a gain.
    """

    way: str
    ends: tuple[str, ...] = ()
    after: bool = False
    output: str = ""
    scale: float = 1.0
    why: str = ""
    has_experts: bool = False
    output_gain: bool = False


def all_families() -> dict[str, Callable[..., PreTrainedConfig]]:
    """Family -> a tiny config of it."""
    return {
        **{family: partial(config, vocab_size=VOCABULARY) for family, config in FAMILIES.items()},
        **{family: partial(tiny_config, family, given) for family, (_, given) in sorted(MORE.items())},
    }


def twice(family: str) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """A config, and one of twice its width and depth."""
    make = all_families()[family]
    base = make()
    depth, given = base.get_text_config().num_hidden_layers, _arguments(make)
    wide = {name: _twice(given[name]) for name in WIDE if given.get(name)}
    deep = {name: 2 * given[name] for name in DEEP if given.get(name)}
    lists = {
        name: 2 * value
        for name, value in (given | wide).items()
        if isinstance(value, list) and len(value) == depth and "multiplier" not in name
    }
    if family == "gpt_neo":  # which makes one list of another
        lists = {"attention_types": [[["global", "local"], depth]]}
    return base, type(base)(**given | wide | deep | lists)


def _twice(value: Any) -> Any:
    return [2 * one for one in value] if isinstance(value, list) else 2 * value


def _arguments(make: Any) -> dict[str, Any]:
    """What a family's config is made of."""
    if make.func is not tiny_config:
        return dict(make.keywords)
    family, given = make.args
    known = CONFIG_MAPPING[family]().to_dict().keys() - _FOLLOWS
    return {name: value for name, value in tiny_config(family, given).to_dict().items() if name in known} | given


def outcome_of(family: str) -> Outcome:
    """Scale a family from its tiny config to twice the width and depth, and build it."""
    if family in MORE and family not in CONFIG_MAPPING:
        return Outcome(ABSENT)
    base, target = twice(family)
    try:
        rule = MuP(base, target, optimizer="numuon")
    except UsageError as error:
        return Outcome(REFUSED, why=error.message)
    with torch.random.fork_rng(devices=[]):
        rule.build()
    folded = {key: fold for key, fold in find_folds(base).items() if not key.endswith("bias")}
    roles = {part.key: part.role for part in rule.parts.values()}
    ends = [key for key, fold in folded.items() if fold.to == "branch"]
    output = next(key for key, fold in folded.items() if fold.to == "output")
    return Outcome(
        PASSED,
        tuple(dict.fromkeys(map(_leaf, ends))),
        any(roles[key] == "gain" for key in ends),
        _leaf(output),
        rule.amounts.get("input", 1.0),
        has_experts="router" in roles.values(),
        output_gain=roles[output] == "gain",
    )


def _leaf(key: str) -> str:
    return key.removesuffix(".weight").rpartition(".")[2]


def rows(outcomes: dict[str, Outcome]) -> Iterator[dict[str, str]]:
    """The page's table, a row for each family."""
    for family, outcome in outcomes.items():
        yield {
            "family": f"**{family}**" if family in FAMILIES else family,
            "models": EXAMPLES[family],
            "scaled": outcome.way,
            "branches": _names(outcome.ends, "gain of " if outcome.after else ""),
            "logits": _names([outcome.output] if outcome.output else [], "gain of " if outcome.output_gain else ""),
            "embeddings": "" if outcome.scale == 1 else f"x {outcome.scale:.3g}",
            "why not": outcome.why.replace("|", "\\|"),
        }


def _names(names: Iterable[str], before: str) -> str:
    return ", ".join(f"{before}`{name}`" for name in names)
