"""What single experts of fused ones read and give, whatever implementation of them the model runs.

Shape legend: N tokens, K experts of a token, E experts, I in.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank_kit.checkpoint.loading import in_evaluation
from lowrank_kit.checkpoint.stacks import StoredStack
from lowrank_kit.compression.chain import Chain
from lowrank_kit.compression.streams import Stream
from lowrank_kit.compression.team import sum_grams
from lowrank_kit.errors import LowRankError
from lowrank_kit.layers.experts import expert_inner, expert_linear, expert_tokens, run_experts
from lowrank_kit.linalg.gram import add_gram_, at_least_float32, mirror_, zero_gram
from lowrank_kit.matrices import Matrix

logger = logging.getLogger(__name__)

Hook = Callable[[Tensor], None]
# Of an expert's matrix, "layers.3.mlp.experts.down_proj[7]".
_NAME = re.compile(r"(?:(?P<path>.+)\.)?(?P<projection>\w+)\[(?P<expert>\d+)\]")


@contextmanager
def watching(
    model: nn.Module, hooks: Mapping[str, Hook], what: Literal["inputs", "gradients"]
) -> Iterator[dict[str, Hook]]:
    """Inside, each hook of an expert's matrix is given what it reads or the gradient by its output; gives the others.

    Args:
        model: or a part of it, whose experts are run one by one inside.
        hooks: names in the model -> hook; those of no expert are given back.
        what: "inputs" or "gradients".
    """
    others: dict[str, Hook] = {}
    with ExitStack() as stack:
        for name, hook in hooks.items():
            if (match := _NAME.fullmatch(name)) is None:
                others[name] = hook
                continue
            watch = _Watch.of(model.get_submodule(match["path"] or ""))
            place = match["projection"], int(match["expert"])
            getattr(watch, what)[place].append(hook)
            stack.callback(watch.forget, getattr(watch, what)[place], hook)
        yield others


class _Watch:
    """In the place of the forward of fused experts: runs them one by one, and shows what goes through each."""

    def __init__(self, experts: nn.Module) -> None:
        self.experts = experts
        self.before: Any = experts.__dict__.get("forward")
        self.inputs: dict[tuple[str, int], list[Hook]] = defaultdict(list)
        self.gradients: dict[tuple[str, int], list[Hook]] = defaultdict(list)
        experts.__dict__["forward"] = self

    @classmethod
    def of(cls, experts: nn.Module) -> _Watch:
        """The one that is there, or a new one."""
        found = experts.__dict__.get("forward")
        return found if isinstance(found, cls) else cls(experts)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return run_experts(self.experts, hidden_states, top_k_index, top_k_weights, self._project)

    def _project(self, projection: str, expert: int, x: Tensor) -> Tensor:
        for hook in self.inputs.get((projection, expert), ()):
            hook(x)
        y = expert_linear(self.experts, projection, expert, x)
        for hook in self.gradients.get((projection, expert), ()):
            y.register_hook(hook)
        return y

    def forget(self, hooks: list[Hook], hook: Hook) -> None:
        """Take a hook away, and with the last one the watch."""
        hooks.remove(hook)
        if any(self.inputs.values()) or any(self.gradients.values()):
            return
        del self.experts.__dict__["forward"]
        if self.before is not None:
            self.experts.__dict__["forward"] = self.before


def stacks_of(matrices: Mapping[str, Matrix]) -> list[list[str]]:
    """Keys of experts, those of one weight together."""
    keys: dict[str, list[str]] = defaultdict(list)
    for key, matrix in matrices.items():
        if matrix.expert is not None:
            keys[matrix.parameter].append(key)
    return list(keys.values())


def fill_up(
    grams: dict[str, Tensor],
    counts: Mapping[str, int],
    keys: Sequence[str],
    matrix: Matrix,
    *,
    outputs_of: int | None = None,
    filled: bool = True,
) -> None:
    """Give each expert with fewer tokens than its Gram has rows as many average tokens as it lacks.

        H_e + (missing / tokens of all) sum of all H

    Args:
        grams: key -> [I, I], those of experts without a token absent; changed in place.
        counts: key -> tokens.
        keys: of all experts of a weight.
        matrix: of one of them.
        outputs_of: tokens of the text, T, if the Grams are of outputs: they are scaled from n to T n / (n_G n_H)
            tokens, n those of the expert and n_G, n_H those of its Grams filled up, so that 1/2 tr(G dW H dW^T) / T^2
            is the expert's share of a loss that is a mean over all tokens.
        filled: whether to; else Grams of experts without a token are zero.
    """
    found = [key for key in keys if key in grams]
    if not found:
        return  # refused by the caller, with all others
    inputs, side = matrix.shape[1], len(grams[found[0]])
    tokens = {key: counts.get(key, 0) for key in keys}
    pooled = torch.stack([grams[key] for key in found]).sum(0)
    for key, n in tokens.items():
        missing = max(0, side - n) if filled else 0
        grams[key] = grams.get(key, torch.zeros_like(pooled)) + missing / sum(tokens.values()) * pooled
        if outputs_of is not None:
            grams[key] *= outputs_of * max(n, 1) / (max(n, side) * max(n, inputs))
    few = sum(n < side for n in tokens.values())
    if few and filled and outputs_of is None:
        logger.warning(
            "%s: %d of %d experts have fewer tokens than their %d inputs, the fewest %d; each is given as many average "
            "tokens as it lacks (more text: --calibration-blocks)",
            matrix.parameter, few, len(keys), side, min(tokens.values()),
        )  # fmt: skip


def expert_grams(
    chain: Chain,
    index: int,
    blocks: tuple[nn.Module, nn.Module],
    stack: StoredStack,
    streams: tuple[Stream, Stream],
) -> tuple[Tensor, Tensor]:
    """Y Y^T and X Y^T of what each expert reads, filled up, [E, I, I] float64.

    Y is of the compressed block and the tokens that come to the expert there; X is what the expert of the dense block
    would read of the same tokens, whether they come to it there or not.

    Args:
        chain, index: what the block is called with.
        blocks: dense, and compressed up to the weight.
        stack: of the weight.
        streams: what the two blocks read.

    Raises:
        LowRankError: NaN or Inf, or experts that no token reaches.
    """
    path = stack.module.removeprefix(f"{chain.paths[index]}.")
    grams: dict[str, Tensor] = {}
    crosses: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    names = [matrix.name for matrix in stack.matrices]
    before, after = (block.get_submodule(path) for block in blocks)
    calls = (_calls(chain, index, block, path, stream) for block, stream in zip(blocks, streams, strict=True))
    for (x_ND, *_), (y_ND, top_k_index, *_) in zip(*calls, strict=True):
        for expert, token, _ in expert_tokens(after, top_k_index):
            x_NI, y_NI = _read(before, stack, expert, x_ND[token]), _read(after, stack, expert, y_ND[token])
            name = names[expert]
            if name not in grams:
                grams[name], crosses[name] = (zero_gram(y_NI.shape[1], y_NI.device) for _ in range(2))
            add_gram_(grams[name], y_NI)
            crosses[name] += x_NI.mT @ y_NI
            counts[name] = counts.get(name, 0) + len(y_NI)
    sides = dict.fromkeys(names, stack.matrix.shape[1])
    sum_grams(crosses, dict(counts), sides, chain.device)
    sum_grams(grams, counts, sides, chain.device)
    for sums in (grams, crosses):
        fill_up(sums, counts, names, stack.matrices[0])
    if not grams:
        raise LowRankError(f"the calibration text does not reach {stack.matrix.name}", hint="more text")
    gram, cross = (torch.stack([sums[name] for name in names]).cpu() for sums in (grams, crosses))
    if not (gram.diagonal(dim1=1, dim2=2).isfinite().all() and cross.isfinite().all()):
        raise LowRankError(
            f"NaN or Inf in the input of {stack.matrix.name} of the compressed model",
            hint="a higher budget, or --objective whiten",
        )
    return torch.stack([mirror_(one) for one in gram]), cross


def _read(experts: nn.Module, stack: StoredStack, expert: int, x: Tensor) -> Tensor:
    """What the projection of an expert reads of the tokens, in float32 or better."""
    if stack.matrix.ends_branch:
        with torch.no_grad():
            x = expert_inner(experts, expert, x, lambda name, e, inputs: expert_linear(experts, name, e, inputs))
    return at_least_float32(x)


def _calls(chain: Chain, index: int, block: nn.Module, path: str, stream: Stream) -> Iterator[tuple[Tensor, ...]]:
    """Hidden states [N, D], experts and weights [N, K] that experts are called with, batch by batch."""
    for _, batch in stream.batches(chain.batch_size):
        seen: list[tuple[Tensor, ...]] = []

        def see(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seen: list[tuple[Tensor, ...]] = seen
        ) -> None:
            seen.append((*args, *kwargs.values()))

        chain.know(len(batch))
        handle = block.get_submodule(path).register_forward_pre_hook(see, with_kwargs=True)
        try:
            with torch.no_grad(), in_evaluation(block):
                chain.run(index, block, batch)
        finally:
            handle.remove()
        yield seen[0]
