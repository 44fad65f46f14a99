"""Trains models of several sizes for a few steps, and tells how large their weights, updates and outputs are."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lowrank_kit.data.blocks import token_blocks
from lowrank_kit.data.corpus import load_corpus
from lowrank_kit.data.tokenizer import SMALLEST_VOCABULARY, train_tokenizer
from lowrank_kit.errors import NonFiniteError, UsageError, did_you_mean
from lowrank_kit.matrices import Matrix, block_path, find_matrices
from lowrank_kit.optim import NuMuon, parameter_groups
from lowrank_kit.optim.rules import MATRIX_RULES
from lowrank_kit.scaling.family import Size, resized
from lowrank_kit.scaling.mup import MuP
from lowrank_kit.scaling.rules import DEPTH_RULES, MUON_SCALES

logger = logging.getLogger(__name__)

Row = dict[str, Any]
BYTES = SMALLEST_VOCABULARY
# The control: models as their architecture makes them, all trained with the base's settings.
PLAIN = "SP"
SCALINGS = (*DEPTH_RULES, PLAIN)
# Two matrices of a branch, one after the other, by role; a fused one counts as a whole.
PAIRS = {"mlp": (("up", "gate_up"), "down"), "attention": (("v", "qkv"), "o")}
STREAM = "stream"
# L R(second) R(first) with weights W at the start and their change dW, names of condition 3.1; 1 is first, 2 second.
CONDITIONS = {
    "C1.2 W2 W1": ("W", "W"),
    "C2.2 dW2 W1": ("dW", "W"),
    "C2.2 W2 dW1": ("W", "dW"),
    "C2.3 dW2 dW1": ("dW", "dW"),
}
# Name of an optimizer -> options of its matrices. NuMuon's k is exactly half of any side that is a multiple of 32.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "muon": {"rule": "muon"},
    **{name: {"rule": "muon", "scale": scale} for scale, name in MUON_SCALES.items()},
    "numuon": {"rule": "numuon", "rank_schedule": "fixed:0.5"},
    "adamw": {"rule": "adamw"},
    "sgd": {"rule": "sgd"},
}
_EPS = 1e-8  # NuMuon's own; in the group, so that it is scaled


@dataclass(frozen=True)
class Training:
    """How every size is trained: the settings of the base.

    Args:
        optimizer: name in `OPTIMIZERS`.
        lr: learning rate of the matrices, constant.
        adamw_lr: of all that is no matrix; None is `lr`, and a quarter of it beside muon and numuon, lest embeddings
            that grow hide what the blocks give.
        weight_decay: decoupled.
        steps: how many, one batch each.
        seed: of the weights.
        options: further options of the matrices' groups.
    """

    optimizer: str = "muon"
    lr: float = 2**-7
    adamw_lr: float | None = None
    weight_decay: float = 0.0
    steps: int = 10
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(
                f'no optimizer "{self.optimizer}" to train with', hint=did_you_mean(self.optimizer, OPTIMIZERS)
            )
        if self.steps < 1 or not 0 < self.lr < math.inf:
            raise UsageError(f"at least one step at a rate above 0 is needed, got {self.steps} at {self.lr:g}")

    def groups(self, model: PreTrainedModel) -> list[dict[str, Any]]:
        """Groups for `NuMuon`, of the base's settings."""
        options = {**OPTIMIZERS[self.optimizer], **self.options}
        share = 0.25 if options["rule"] in MATRIX_RULES else 1.0
        adamw_lr = share * self.lr if self.adamw_lr is None else self.adamw_lr
        groups = parameter_groups(model, lr=self.lr, adamw_lr=adamw_lr, weight_decay=self.weight_decay, **options)
        return [{"eps": _EPS, **group} for group in groups]


def text_batches(
    source: str | None, *, steps: int, sequences: int = 8, tokens: int = 32, vocab_size: int = BYTES, seed: int = 0
) -> list[Tensor]:
    """Batches of a text source for every step, int64 [sequences, tokens]; every byte a token, if nothing else is said.

    AdamW's rule takes updates to be of low rank, which they are the less the more tokens there are to tell apart.

    Raises:
        UsageError: a source that is too small.
    """
    corpus = load_corpus(source, max_bytes=1_000_000)
    tokenizer = train_tokenizer((d.text for d in corpus.train), vocab_size=vocab_size, model_max_length=tokens)
    blocks = token_blocks(corpus.train, tokenizer, tokens, max_blocks=steps * sequences, seed=seed)
    if len(blocks) < steps * sequences:
        raise UsageError(
            f"{corpus.source} has {len(blocks)} sequences of {tokens} tokens, {steps} steps take {steps * sequences}",
            hint="give more text with --text, or fewer --steps",
        )
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    return list(blocks.ids[order].long().split(sequences))


def observe(
    config: PreTrainedConfig,
    sizes: Sequence[Size],
    batches: Sequence[Tensor],
    training: Training,
    *,
    scaling: str = "k2",
    device: torch.device | None = None,
) -> Iterator[Row]:
    """Train each size on the same batches, and measure the two pairs of each block and the last block's output.

    Args:
        config: of the architecture, resized to each size.
        sizes: the base first.
        batches: int64 [sequences, tokens], one for each step or more; the outputs are those of the first.
        training: settings of the base.
        scaling: a depth rule of `MuP`, or "SP": as the architecture makes the model, with the base's settings.
        device: to train on; None is the CPU.

    Yields:
        Rows of scaling, seed, width, depth, part (mlp, attention, stream), block, condition, step and value, which is
        NaN where weights became that are not finite.

    Raises:
        UsageError: an unknown scaling, fewer batches than steps, a size that there is no model or rule for.
    """
    if scaling not in SCALINGS:
        raise UsageError(f'unknown scaling "{scaling}"', hint=did_you_mean(scaling, SCALINGS))
    if len(batches) < training.steps:
        raise UsageError(f"{training.steps} steps take as many batches, got {len(batches)}")
    base = resized(config, sizes[0])
    for size in sizes:
        logger.info("%s, seed %d, width %d, depth %d", scaling, training.seed, size.width, size.depth)
        with torch.random.fork_rng():
            model, optimizer = _start(base, resized(config, size), training, scaling, device)
            for row in _trained(model, optimizer, batches, training.steps):
                yield {"scaling": scaling, "seed": training.seed, "width": size.width, "depth": size.depth, **row}


def _start(
    base: PreTrainedConfig, target: PreTrainedConfig, training: Training, scaling: str, device: torch.device | None
) -> tuple[PreTrainedModel, NuMuon]:
    if scaling == PLAIN:
        torch.manual_seed(training.seed)
        model = AutoModelForCausalLM.from_config(target, dtype=torch.float32).to(device)
        return model.eval(), NuMuon(training.groups(model))
    rule = MuP(base, target, optimizer=training.optimizer, depth=scaling)
    torch.manual_seed(training.seed)  # making the rule may draw
    model = rule.build().to(device)
    return model.eval(), NuMuon(rule.scaled(training.groups(model)))  # eval: no dropout


def _trained(model: PreTrainedModel, optimizer: NuMuon, batches: Sequence[Tensor], steps: int) -> Iterator[Row]:
    pairs = _pairs(model)
    before = _weights(model, pairs)
    yield _output(model, pairs, batches[0], 0)
    finite = True
    try:
        for ids in batches[:steps]:
            ids = ids.to(model.device)
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
    except NonFiniteError as error:
        logger.info("stopped: %s", error.message)
        finite = False
    norms = {("W", name): spectral_rms(W) for name, W in before.items()}
    for name, W in _weights(model, pairs).items():
        norms["dW", name] = spectral_rms(W - before[name]) if finite else math.nan
    depth = len({block for _, block in pairs})
    for (part, block), members in pairs.items():
        for condition, (of_second, of_first) in CONDITIONS.items():
            products = [norms[of_second, second.name] * norms[of_first, first.name] for first, second in members]
            yield {
                "part": part,
                "block": block,
                "condition": condition,
                "step": 0 if (of_second, of_first) == ("W", "W") else steps,
                "value": depth * sum(products) / len(products),  # the mean over experts
            }
    last = _output(model, pairs, batches[0], steps)
    yield last if finite else {**last, "value": math.nan}


def _pairs(model: PreTrainedModel) -> dict[tuple[str, int], list[tuple[Matrix, Matrix]]]:
    """(Part, block) -> its matrices, first and second; several where there are experts."""
    by_role: dict[tuple[int, int | None], dict[str, Matrix]] = defaultdict(dict)
    for matrix in find_matrices(model):
        if matrix.block is not None:
            by_role[matrix.block, matrix.expert][matrix.role] = matrix
    found: dict[tuple[str, int], list[tuple[Matrix, Matrix]]] = defaultdict(list)
    for (block, _), roles in by_role.items():
        for part, (firsts, second) in PAIRS.items():
            first = next((roles[role] for role in firsts if role in roles), None)
            if first is not None and second in roles:
                found[part, block].append((first, roles[second]))
    if not found:
        known = ", ".join(f"{second} after {' or '.join(firsts)}" for firsts, second in PAIRS.values())
        raise UsageError(f"no block of {type(model).__name__} has a pair of matrices to look at: {known}")
    return dict(found)


def _weights(
    model: PreTrainedModel, pairs: Mapping[tuple[str, int], Iterable[tuple[Matrix, Matrix]]]
) -> dict[str, Tensor]:
    """Matrix name -> a copy [out, in]."""
    parameters = dict(model.named_parameters())
    found: dict[str, Tensor] = {}
    for matrix in (matrix for members in pairs.values() for pair in members for matrix in pair):
        W = parameters[matrix.parameter].detach()
        W = W if matrix.expert is None else W[matrix.expert]
        found[matrix.name] = (W.mT if matrix.transposed else W).clone()
    return found


def spectral_rms(A: Tensor) -> float:
    """R(A) = sqrt(n_in / n_out) |A|_2 of a matrix [n_out, n_in]; NaN where it is not finite."""
    if not bool(A.isfinite().all()):
        return math.nan
    return math.sqrt(A.shape[1] / A.shape[0]) * float(torch.linalg.matrix_norm(A.double().cpu(), 2))


@torch.no_grad()
def _output(model: PreTrainedModel, pairs: Iterable[tuple[str, int]], ids: Tensor, step: int) -> Row:
    """RMS of what the last block gives."""
    last = max(block for _, block in pairs)
    name = next(matrix.name for matrix in find_matrices(model) if matrix.block == last)
    with _outputs(model, block_path(name)) as seen:
        model(input_ids=ids.to(model.device), use_cache=False)
    rms = float(seen[0].double().pow(2).mean().sqrt())
    return {"part": STREAM, "block": last, "condition": "RMS", "step": step, "value": rms}


@contextmanager
def _outputs(model: PreTrainedModel, path: str) -> Iterator[list[Tensor]]:
    """Inside, what a block gives is kept."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        yield seen
    finally:
        handle.remove()
