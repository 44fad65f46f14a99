"""Recover quality after factorizing: train factors, norms and biases against the dense model, by block or end to end.

Shape legend: N sequences, B of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from lowrank_kit.checkpoint.loading import in_evaluation
from lowrank_kit.compression.chain import Chain
from lowrank_kit.compression.streams import Stream
from lowrank_kit.compression.team import own_of, share_of, total
from lowrank_kit.errors import LowRankError
from lowrank_kit.layers import LOW_RANK_LAYERS
from lowrank_kit.processes import are_connected, num_processes, process_index, summed

# Share of the steps in which the learning rate rises, and what is left of it at the end: as AA-SVD (arXiv 2604.02119).
WARM_UP, LAST_RATE = 0.1, 0.1
WEIGHT_DECAY, LARGEST_GRADIENT = 0.01, 1.0
# A tensor of numbers smaller than this has the learning rate of one of this size (Adafactor, arXiv 1804.04235).
SMALLEST_SCALE = 1e-3
# Looks at the check text in a training. One that finds no gain goes back to the best state with a rate this much
# lower; so many in a row end the training.
LOOKS, BACK_OFF, PATIENCE = 12, 0.3, 4


@dataclass(frozen=True)
class Refined:
    """How a refinement went: the error on the check text before and after, and what it took."""

    before: float
    after: float
    steps: int
    tokens: int
    seconds: float

    def record(self) -> dict[str, Any]:
        """For compression.json."""
        return asdict(self)


def refine_block(
    chain: Chain,
    index: int,
    block: nn.Module,
    text: tuple[Stream, Stream],
    check: tuple[Stream, Stream],
    *,
    batch_size: int,
    epochs: int,
    rate: float,
    seed: int,
    stored: torch.dtype = torch.float32,
) -> Refined:
    """Train a block to give the dense block's outputs on the compressed model's own inputs.

        loss = |L'(Y) - L(X)|^2 / |L(X)|^2

    Args:
        chain: what the block is called with.
        index: of the block.
        block: with low-rank layers; changed in place.
        text: Y and L(X): inputs from the compressed blocks before, outputs of the dense block.
        check: the same of the check text, by which the best state is chosen: never worse than before.
        batch_size: sequences of a step, of all processes.
        epochs: passes over the text.
        rate: learning rate as a share of the root mean square of the tensor that is trained.
        seed: of the order of the sequences.
        stored: dtype in which the result will be stored; states are judged as they are there.

    Raises:
        LowRankError: the loss is not finite.

    Source: AA-SVD (arXiv 2604.02119), whose learning rate is one for all tensors; without its weight on directions.
    """
    (inputs, targets), (check_inputs, check_targets) = text, check
    scale = targets.mean_square(chain.batch_size) or 1.0
    check_scale = check_targets.mean_square(chain.batch_size)

    tokens, hidden = inputs.shape[1:]

    def loss(chosen: Tensor) -> Tensor | None:
        if not len(mine := own_of(chosen)):
            return None
        target = targets.rows(mine).to(chain.device)
        squares = (chain.run(index, block, inputs.rows(mine)) - target).float().square().sum()
        return squares / (len(chosen) * tokens * hidden) / scale

    def error() -> float:
        squares = 0.0
        with torch.no_grad():
            for rows, batch in check_inputs.batches(chain.batch_size):
                off = chain.run(index, block, batch).cpu() - check_targets.rows(rows)
                squares += off.double().square().sum().item()
        return total(squares) / total(math.prod(check_targets.shape)) / check_scale

    return _train(
        block,
        loss,
        error,
        _orders(round(total(len(inputs))), batch_size, epochs, seed),
        block_tokens=tokens,
        rate=rate,
        stored=stored,
        desc=f"refine block {index}",
    )


def refine_end_to_end(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    ids: Tensor,
    check_ids: Tensor,
    *,
    epochs: int,
    rate: float,
    batch_size: int,
    seed: int,
    stored: torch.dtype = torch.float32,
) -> Refined:
    """Train all factors, norms and biases to give the dense model's predictions.

        loss = mean over tokens of KL(p_dense || p), in nats

    Args:
        model: with low-rank layers; changed in place.
        dense: the model it was made from.
        ids: int [N, T].
        check_ids: int [N', T], by which the best state is chosen: never worse than before.
        epochs, rate, seed, stored: as in `refine_block`.
        batch_size: B.

    Raises:
        LowRankError: the loss is not finite.
    """
    device = model.device

    def divergence(batch: Tensor) -> Tensor:
        """Summed over the tokens."""
        batch = batch.to(device, torch.int64)
        with torch.no_grad():
            log_p = dense(input_ids=batch, use_cache=False).logits.float().log_softmax(-1)
        log_q = model(input_ids=batch, use_cache=False).logits.float().log_softmax(-1)
        return nn.functional.kl_div(log_q.flatten(0, 1), log_p.flatten(0, 1), log_target=True, reduction="sum")

    def error() -> float:
        with torch.no_grad():
            nats = sum(divergence(part).item() for part in share_of(check_ids).split(batch_size))
        return total(nats) / check_ids.numel()

    def loss(chosen: Tensor) -> Tensor | None:
        mine = chosen[process_index() :: num_processes()]
        return divergence(ids[mine]) / ids[chosen].numel() if len(mine) else None

    with in_evaluation(dense):
        return _train(
            model,
            loss,
            error,
            _orders(len(ids), batch_size, epochs, seed),
            block_tokens=ids.shape[1],
            rate=rate,
            stored=stored,
            desc="refine end to end",
        )


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """What is refined: factors, and whatever has one dimension (norms, biases)."""
    factors = {id(p) for m in module.modules() if isinstance(m, LOW_RANK_LAYERS) for p in m.parameters()}
    return {name: p for name, p in module.named_parameters() if id(p) in factors or p.ndim == 1}


def _train(
    module: nn.Module,
    loss: Callable[[Tensor], Tensor | None],
    error: Callable[[], float],
    orders: list[Tensor],
    *,
    block_tokens: int,
    rate: float,
    stored: torch.dtype,
    desc: str,
) -> Refined:
    """AdamW over the batches of `orders`; the state with the least error on the check text is what stays.

    How high a rate is too high depends on how near to the optimum factors start, which nobody knows beforehand:
    whenever the error has not fallen, training goes back to the best state with a lower rate.
    """
    started = time.perf_counter()
    parameters = trainable(module)
    optimizer, share = _optimizer(parameters, rate), _cosine(len(orders))
    every = math.ceil(len(orders) / LOOKS)
    scale, done = 1.0, 0
    with in_evaluation(module), _training_only(module, parameters):
        best = _Best(parameters, before := error())
        _refuse_non_finite(before, desc, "check text, before any step")
        for done, chosen in enumerate(tqdm(orders, desc=desc, disable=None, leave=False), start=1):
            _set_rate(optimizer, scale * share(done - 1))
            optimizer.zero_grad()
            value = _step(loss(chosen), parameters)
            _refuse_non_finite(value, desc, f"text, at step {done}")
            nn.utils.clip_grad_norm_(parameters.values(), LARGEST_GRADIENT)
            optimizer.step()
            if done % every and done != len(orders):
                continue
            if best.look(error, stored):
                best.restore()
                optimizer, scale = _optimizer(parameters, rate), scale * BACK_OFF
            if best.since >= PATIENCE:
                break
    best.restore()
    tokens = block_tokens * sum(len(chosen) for chosen in orders[:done])
    return Refined(before, best.error, done, tokens, round(time.perf_counter() - started, 3))


def _step(loss: Tensor | None, parameters: dict[str, nn.Parameter]) -> float:
    """Gradients of the parts of a loss that the processes have, and the loss; None is no part of it."""
    if loss is not None:
        loss.backward()
    if are_connected():
        for parameter in parameters.values():
            parameter.grad = summed(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return total(0.0 if loss is None else loss.item())


class _Best:
    """The state with the least error seen, the first one included."""

    def __init__(self, parameters: dict[str, nn.Parameter], error: float) -> None:
        self.parameters, self.error, self.since = parameters, error, 0
        self.state = self._copy()

    def look(self, error: Callable[[], float], stored: torch.dtype) -> int:
        """Measure the state as it would be stored; how many looks in a row have brought no gain."""
        exact = self._copy()
        self._put({name: tensor.to(stored) for name, tensor in exact.items()})
        found = error()
        self.since = 0 if found < self.error else self.since + 1
        if found < self.error:
            self.error, self.state = found, self._copy()
        self._put(exact)
        return self.since

    def restore(self) -> None:
        self._put(self.state)

    def _copy(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def _put(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[name])


def _optimizer(parameters: dict[str, nn.Parameter], rate: float) -> torch.optim.AdamW:
    groups = [
        {
            "params": [parameter],
            "highest": max(parameter.detach().float().square().mean().sqrt().item(), SMALLEST_SCALE) * rate,
            "weight_decay": WEIGHT_DECAY if parameter.ndim > 1 else 0.0,
        }
        for parameter in parameters.values()
        if parameter.numel()
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def _set_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["highest"] * share


def _cosine(steps: int) -> Callable[[int], float]:
    """Linear warm-up, then half a cosine down to LAST_RATE."""
    warm = max(1, round(WARM_UP * steps))

    def share(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return share


def _orders(count: int, batch_size: int, epochs: int, seed: int) -> list[Tensor]:
    """Indices of the sequences of each batch, anew in every epoch; batches are whole where there is one."""
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, count)
    orders = [torch.randperm(count, generator=generator)[: count // size * size] for _ in range(epochs)]
    return [part for order in orders for part in order.split(size)]


def _refuse_non_finite(value: float, desc: str, where: str) -> None:
    if not math.isfinite(value):
        raise LowRankError(
            f"{desc}: the loss is {value} on the {where}", hint="a lower --block-rate or --e2e-rate, or --refine none"
        )


@contextmanager
def _training_only(module: nn.Module, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Inside, only the given parameters take gradients."""
    before = [(p, p.requires_grad) for p in module.parameters()]
    wanted = {id(p) for p in parameters.values()}
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
            parameter.grad = None
