"""Where a model's residual branches end: found by zeroing and halving parameters of a small twin, and looking.

What ends a branch is multiplied by c, so it must be what its branch is linear in. With the ends zero every block has to
be the identity, else there is a branch that nobody knows. With one end alone, and that halved, the branch has to be
halved, else a norm comes after it, whose gain is the end in its place. The same for the head of tied embeddings: the
gain that halves what the head reads. Exact in float64, and no list of architectures.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lowrank_kit.errors import UsageError
from lowrank_kit.matrices import block_of, block_path
from lowrank_kit.scaling.parts import Part, find_parts, key_of
from lowrank_kit.scaling.sizes import cut_vocabulary, depth_of, set_depth

# Of the twin: what it has at most.
BLOCKS, VOCABULARY = 4, 64
SEQUENCES, TOKENS = 2, 12
# Of a branch, in float64: rounding leaves 1e-15, another function 1e-2 and more.
_TOLERANCE = 1e-9
_HINT = "train this model without --mup-base"


@dataclass(frozen=True)
class Fold:
    """A parameter that a forward multiplier can be folded into.

    Args:
        to: "branch", multiplied by what the depth asks for; "output", by 1 / width ratio; "input", by what undoes the
            factor that the architecture itself has there.
        offset: it is w of a gain 1 + w.
    """

    to: str
    offset: bool = False


def find_folds(config: PreTrainedConfig) -> dict[str, Fold]:
    """Key of a parameter (see `key_of`) -> what is folded into it, of all that something is folded into.

    Args:
        config: of a causal LM of a size that can be run in float64; depth and vocabulary are cut down.

    Raises:
        UsageError: a block that is more than known branches, a branch that ends in nothing that scales it, tied
            embeddings without a norm before the head.
    """
    twin = make_twin(config)
    parts = find_parts(twin)
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(0, min(VOCABULARY, twin.config.vocab_size), (SEQUENCES, TOKENS), generator=drawn)
    probe = _Probe(twin, ids, sorted({block_path(p.name) for p in parts.values() if p.inside}, key=_number))
    ends: dict[str, dict[str, list[str]]] = {}
    for part in parts.values():
        if part.ends_branch:
            module = key_of(part.name).rpartition(".")[0]
            ends.setdefault(block_path(part.name), {}).setdefault(module, []).append(part.name)
    _check_identity(probe, ends)
    _check_depth(probe, config)
    found: dict[str, Fold] = {}
    for block, by_module in ends.items():
        for names in by_module.values():
            found |= _end_of(probe, parts, block, names, [n for m in ends.values() for g in m.values() for n in g])
    return found | _output(probe, parts)


def make_twin(config: PreTrainedConfig, blocks: int = BLOCKS) -> PreTrainedModel:
    """A model of the same blocks with random weights in float64, with few of them and few tokens."""
    small = copy.deepcopy(config)
    set_depth(small, min(depth_of(small), blocks))
    cut_vocabulary(small, VOCABULARY)
    small._attn_implementation = small._experts_implementation = "eager"  # not all others know float64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(small, dtype=torch.float64).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # a bias of 0 hides where it is added; exact in a norm's float32, too
                    parameter.add_(torch.randint_like(parameter, -8, 9) / 64)
        return model


class _Probe:
    """Runs the twin, and tells what its blocks and its head read and give."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, blocks: list[str]) -> None:
        self.model, self.ids, self.blocks = model, ids, blocks
        self.parameters = dict(model.named_parameters())

    @torch.no_grad()
    def run(self) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
        """Block -> what it reads and gives; and what the head reads."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        read: list[Tensor] = []
        handles = [
            self.model.get_submodule(path).register_forward_hook(_keep(seen, path), with_kwargs=True)
            for path in self.blocks
        ]
        handles.append(
            self.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0]))
        )
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)  # of constants that a model makes as it runs
        try:
            self.model(input_ids=self.ids, use_cache=False)
        finally:
            torch.set_default_dtype(default)
            for handle in handles:
                handle.remove()
        return seen, read[0]

    def branch(self, block: str) -> Tensor:
        """What a block adds."""
        before, after = self.run()[0][block]
        return after - before

    @contextmanager
    def changed(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, parameters have other values."""
        before = {name: self.parameters[name].detach().clone() for name in values}
        with torch.no_grad():
            for name, value in values.items():
                self.parameters[name].copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in before.items():
                    self.parameters[name].copy_(value)

    def zero(self, names: list[str]) -> dict[str, Tensor]:
        """Zeros for parameters."""
        return {name: torch.zeros_like(self.parameters[name]) for name in names}


def _number(block: str) -> int:
    return block_of(block) or 0


def _keep(seen: dict[str, tuple[Tensor, Tensor]], path: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        seen[path] = before.clone(), (output[0] if isinstance(output, tuple | list) else output).clone()

    return hook


def _check_identity(probe: _Probe, ends: Mapping[str, Mapping[str, list[str]]]) -> None:
    names = [name for modules in ends.values() for group in modules.values() for name in group]
    with probe.changed(probe.zero(names)):
        for block, (before, after) in probe.run()[0].items():
            if not torch.equal(before, after):
                known = ", ".join(ends.get(block, {})) or "none"
                raise UsageError(
                    f"{block} of {type(probe.model).__name__} changes the residual stream by "
                    f"{float((after - before).abs().max()):.3g} when all known ends of its branches are zero: {known}",
                    hint=_HINT,
                )


def _check_depth(probe: _Probe, config: PreTrainedConfig) -> None:
    """The first block of a model of one block has to be that of a deeper one."""
    if len(probe.blocks) == 1:
        return
    shallow = make_twin(config, blocks=1)
    shallow.load_state_dict(probe.model.state_dict(), strict=False)
    block = probe.blocks[0]
    whole, other = probe.branch(block), _Probe(shallow, probe.ids, [block]).branch(block)
    if float((other - whole).abs().max()) > _TOLERANCE * float(whole.abs().max()):
        raise UsageError(
            f"what {block} of {type(probe.model).__name__} adds depends on how many blocks there are: the architecture "
            "scales with the depth by itself",
            hint=_HINT,
        )


def _end_of(
    probe: _Probe, parts: Mapping[str, Part], block: str, names: list[str], every: list[str]
) -> dict[str, Fold]:
    """What a branch is linear in: its last matrix with the bias, or the gain of a norm after it."""
    with probe.changed(probe.zero([name for name in every if name not in names])):
        whole = probe.branch(block)
        if not whole.any():
            raise UsageError(f"{names[0]} of {type(probe.model).__name__} adds nothing to its block", hint=_HINT)
        with probe.changed({name: probe.parameters[name].detach() / 2 for name in names}):
            if _halved(probe.branch(block), whole):
                return {key_of(name): Fold("branch") for name in names}
        gains = [part.name for part in parts.values() if part.role == "gain" and block_path_of(part) == block]
        if found := _scaling_gain(probe, parts, gains, lambda: probe.branch(block), "branch"):
            return found
    raise UsageError(
        f"{names[0]} of {type(probe.model).__name__}: neither it nor a gain in {block} scales what its branch adds",
        hint=_HINT,
    )


def block_path_of(part: Part) -> str | None:
    """Path of the block that a parameter is in."""
    return block_path(part.name) if part.inside else None


def _output(probe: _Probe, parts: Mapping[str, Part]) -> dict[str, Fold]:
    """The head, or the gain before it where it is tied to the embeddings."""
    head = next((part.name for part in parts.values() if part.kind == "output"), None)
    if head is not None:
        return {key_of(head): Fold("output")}
    gains = [part.name for part in parts.values() if part.role == "gain" and not part.inside]
    if found := _scaling_gain(probe, parts, gains, lambda: probe.run()[1], "output"):
        return found
    raise UsageError(
        f"the head of {type(probe.model).__name__} is tied to the embeddings, and no norm with a gain comes before it: "
        "there is nothing to fold 1 / width ratio into",
        hint='"tie_word_embeddings": false in the config',
    )


def _scaling_gain(
    probe: _Probe, parts: Mapping[str, Part], gains: list[str], look: Callable[[], Tensor], to: str
) -> dict[str, Fold]:
    """The gain, with the bias beside it, that halves what is looked at when it is halved; empty if none does."""
    whole = look()
    for gain in gains:
        for offset in (False, True):
            with probe.changed(_halved_gain(probe, parts, gain, offset)):
                if _halved(look(), whole):
                    return _gain_folds(parts, gain, to, offset)
    return {}


def _halved_gain(probe: _Probe, parts: Mapping[str, Part], gain: str, offset: bool) -> dict[str, Tensor]:
    bias = _bias_beside(parts, gain)
    weight = probe.parameters[gain].detach()
    values = {gain: (weight - 1) / 2 if offset else weight / 2}
    return values if bias is None else {**values, bias: probe.parameters[bias].detach() / 2}


def _gain_folds(parts: Mapping[str, Part], gain: str, to: str, offset: bool) -> dict[str, Fold]:
    bias = _bias_beside(parts, gain)
    found = {key_of(gain): Fold(to, offset)}
    return found if bias is None else {**found, key_of(bias): Fold(to)}


def _bias_beside(parts: Mapping[str, Part], gain: str) -> str | None:
    bias = gain.removesuffix("weight") + "bias"
    return bias if bias in parts else None


def _halved(half: Tensor, whole: Tensor) -> bool:
    return float((half - whole / 2).abs().max()) <= _TOLERANCE * float(whole.abs().max())
