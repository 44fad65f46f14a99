"""What the matrices meet on real text: one Gram for each input that is read, one for the gradient of each output.

Shape legend: B sequences, T tokens of one, V vocabulary, I in, O out, N tokens of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from lowrank_kit.checkpoint.loading import in_evaluation
from lowrank_kit.checkpoint.stacks import Unit
from lowrank_kit.checkpoint.stored import StoredMatrix
from lowrank_kit.compression.experts import fill_up, stacks_of, watching
from lowrank_kit.compression.objectives import Statistics
from lowrank_kit.compression.team import sum_grams
from lowrank_kit.data.blocks import IGNORED, TokenBlocks
from lowrank_kit.errors import LowRankError
from lowrank_kit.linalg.gram import add_gram_, at_least_float32, mirror_, zero_gram
from lowrank_kit.matrices import Matrix

# Between the seeds of two sequences.
_SEEDS = 1_000_003
MORE_TEXT = "more text: --calibration-blocks; or --objective plain, which needs none"


def input_grams(
    model: PreTrainedModel, matrices: Iterable[Matrix], blocks: TokenBlocks, *, batch_size: int = 8
) -> dict[str, Tensor]:
    """Gram H = sum over tokens of x x^T of every input that a matrix reads.

    Products are made in float32 or better and summed in float64. Matrices that share their input share its Gram. An
    expert with fewer tokens than inputs is given as many average ones as it lacks, see `fill_up`.

    Args:
        model: a causal LM; runs on the device it is on.
        matrices: those wanted; experts of a weight all together.
        blocks: calibration text, without padding.
        batch_size: sequences in a forward pass.

    Returns:
        `Matrix.shares_input` -> [I, I] float64 on the CPU.

    Raises:
        LowRankError: NaN or Inf in an input, or no input at all, with the matrix named.
    """
    matrices = list(matrices)
    inside = set(model.base_model.modules())
    headless = all(model.get_submodule(matrix.parameter.rpartition(".")[0]) in inside for matrix in matrices)
    with gathering_inputs(model, matrices, shared_out=False) as grams, torch.no_grad():
        for ids in _batches(model, blocks, batch_size, "calibration"):
            (model.base_model if headless else model)(input_ids=ids, use_cache=False)
    return grams


def input_grams_and_loss(
    model: PreTrainedModel, matrices: Iterable[Matrix], blocks: TokenBlocks, *, batch_size: int = 8
) -> tuple[dict[str, Tensor], float]:
    """`input_grams`, of experts what they really read, and `mean_loss` in one pass."""
    with gathering_inputs(model, matrices, filled=False, shared_out=False) as grams:
        loss = mean_loss(model, blocks, batch_size=batch_size)
    return grams, loss


@contextmanager
def gathering_inputs(
    owner: nn.Module, matrices: Iterable[Matrix], prefix: str = "", *, filled: bool = True, shared_out: bool = True
) -> Iterator[dict[str, Tensor]]:
    """Inside, no inference mode, the inputs that matrices read are gathered; afterwards their Grams are there.

    Args:
        owner: module that holds the matrices.
        matrices: whose inputs are wanted; experts of a weight all together.
        prefix: of the matrices' names, before their path in the owner.
        filled: whether experts with few tokens are given average ones, see `fill_up`.
        shared_out: whether each process runs its share of the text, so that Grams are summed over them.

    Returns:
        As `input_grams`.

    Raises:
        LowRankError: NaN or Inf in an input, or an input that is never read.
    """
    wanted = {matrix.shares_input: matrix for matrix in matrices}
    grams, counts, hooks = _adders(wanted, "the input of", prefix)
    with reading(owner, hooks):
        yield grams
    if shared_out:
        sum_grams(grams, counts, {key: matrix.shape[1] for key, matrix in wanted.items()}, device_of(owner))
    for keys in stacks_of(wanted):
        fill_up(grams, counts, keys, wanted[keys[0]], filled=filled)
    _make_whole(grams, wanted, "inputs")


@contextmanager
def gathering_gradients(
    owner: nn.Module, matrices: Iterable[Matrix], tokens: int, prefix: str = "", *, shared_out: bool = True
) -> Iterator[dict[str, Tensor]]:
    """As `gathering_inputs`, of the gradients that backward passes inside give by the outputs of matrices.

    Args:
        owner, matrices, prefix, shared_out: as there.
        tokens: of the text, on all processes.

    Returns:
        As `output_grams`.

    Raises:
        LowRankError: NaN or Inf in a gradient, or an output without one.
    """
    wanted = {matrix.name: matrix for matrix in matrices}
    grams, counts, hooks = _adders(wanted, "the gradient of", prefix)
    with ExitStack() as stack:
        for name, hook in stack.enter_context(watching(owner, hooks, "gradients")).items():
            stack.callback(owner.get_submodule(name).register_forward_hook(_by_output(hook)).remove)
        yield grams
    if shared_out:
        sum_grams(grams, counts, {name: matrix.shape[0] for name, matrix in wanted.items()}, device_of(owner))
    for keys in stacks_of(wanted):
        fill_up(grams, counts, keys, wanted[keys[0]], outputs_of=tokens)
    _make_whole(grams, wanted, "outputs")


def _adders(
    wanted: Mapping[str, Matrix], what: str, prefix: str
) -> tuple[dict[str, Tensor], dict[str, int], dict[str, Callable[[Tensor], None]]]:
    """Grams and counts of tokens by the key of a matrix, still empty, and by path in the owner what adds to them."""
    grams: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    hooks = {
        matrix.name.removeprefix(prefix): adder(grams, key, f"{what} {matrix.name}", counts)
        for key, matrix in wanted.items()
    }
    return grams, counts, hooks


def _make_whole(grams: dict[str, Tensor], wanted: Mapping[str, Matrix], what: str) -> None:
    if unread := [matrix.name for key, matrix in wanted.items() if key not in grams]:
        raise LowRankError(
            f"the calibration text reached {len(wanted) - len(unread)} of {len(wanted)} {what}, not {unread[0]}",
            hint=MORE_TEXT,
        )
    for key, gram in grams.items():
        grams[key] = mirror_(gram).cpu()


def device_of(module: nn.Module) -> torch.device:
    """Where the weights of a module are that are there."""
    return next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))


def output_grams(
    model: PreTrainedModel, matrices: Iterable[Matrix], blocks: TokenBlocks, *, batch_size: int = 8, seed: int = 0
) -> dict[str, Tensor]:
    """Gram G = sum over tokens of g g^T, g the gradient of the loss by the output of a matrix at a token.

    Of an expert it is scaled such that this holds for the tokens that come to it, and filled up as in `input_grams`.
    The loss is that of tokens drawn from the model's own predictions, so that G / tokens is the Fisher information's
    block and 1/2 tr(G dW H dW^T) / tokens^2 what a change dW adds to the loss per token, in nats (K-FAC). One forward
    and one backward pass, the latter for activations alone.

    Args:
        model, matrices, blocks, batch_size: as in `input_grams`.
        seed: of the drawn tokens.

    Returns:
        `Matrix.name` -> [O, O] float64 on the CPU.

    Raises:
        LowRankError: NaN or Inf in the logits or a gradient, or no gradient at all, with the matrix named.
    """
    with _activations_alone(model), gathering_gradients(model, matrices, blocks.num_tokens, shared_out=False) as grams:
        for first, ids in enumerate(_batches(model, blocks, batch_size, "curvature")):
            sampled_loss(model, model(input_ids=ids, use_cache=False).logits, seed, first * batch_size).backward()
    return grams


def sampled_loss(model: PreTrainedModel, logits_BTV: Tensor, seed: int, first: int) -> Tensor:
    """Cross-entropy, summed, of tokens drawn from a model's own predictions.

    What is drawn for a sequence goes by its number, not by the batch or the process that it is in.

    Args:
        model: for the error.
        logits_BTV: of B sequences.
        seed: of the drawn tokens.
        first: number of the first sequence.

    Raises:
        LowRankError: NaN or Inf in the logits.
    """
    log_p_BTV = logits_BTV.float().log_softmax(-1)
    if log_p_BTV.isnan().any():
        raise LowRankError(
            f"NaN or Inf in the logits of {model.name_or_path or type(model).__name__}",
            hint="look for NaN or Inf in the weights of its head, or try --dtype float32",
        )
    generator = torch.Generator()
    drawn = []
    for index, log_p_TV in enumerate(log_p_BTV.detach(), start=first):
        generator.manual_seed(seed + _SEEDS * index)
        drawn.append(torch.multinomial(log_p_TV.exp().cpu(), 1, generator=generator))
    return log_p_BTV.gather(2, torch.stack(drawn).to(log_p_BTV.device)).sum().neg()


def mean_loss(model: PreTrainedModel, blocks: TokenBlocks, *, batch_size: int = 8) -> float:
    """Cross-entropy of the next token, in nats, over all tokens that have one before them.

    Raises:
        LowRankError: it is not finite.
    """
    total = 0.0
    with in_evaluation(model), torch.no_grad():
        for ids in _batches(model, blocks, batch_size, "check"):
            logits_BTV = model(input_ids=ids, use_cache=False).logits
            # The last token of a sequence predicts none; its label is left out, so that the logits are not copied.
            labels_BT = nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
            loss = nn.functional.cross_entropy(
                logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum"
            )
            total += loss.item()
    if not math.isfinite(total):
        raise LowRankError(
            f"the loss of {model.name_or_path or type(model).__name__} on the check text is {total}",
            hint="look for NaN or Inf in the weights, or try --dtype float32",
        )
    return total / (blocks.num_tokens - len(blocks))


@contextmanager
def reading(model: nn.Module, hooks: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Inside, each hook is given what the module of its name reads; the model is in evaluation mode.

    Model and training mode are as before afterwards.

    Args:
        model: or a part of it.
        hooks: path in the model of a module, or name of an expert's matrix as `experts.down_proj[3]`, which is given
            the tokens that come to it -> hook.
    """
    with ExitStack() as stack:
        for name, hook in stack.enter_context(watching(model, hooks, "inputs")).items():
            handle = model.get_submodule(name).register_forward_pre_hook(_first_argument(hook))
            stack.callback(handle.remove)
        stack.enter_context(in_evaluation(model))
        yield


def adder(
    grams: dict[str, Tensor], key: str, what: str, counts: dict[str, int] | None = None
) -> Callable[[Tensor], None]:
    """Adds the Gram of what it is given, [..., I], to `grams[key]`, of which the upper triangle is kept.

    Args:
        grams, key: where to.
        what: is read, for the error.
        counts: if given, tokens are counted at the same key.

    Raises:
        LowRankError: NaN or Inf; `what` says of what.
    """

    def add(x: Tensor) -> None:
        x_NI = at_least_float32(x.reshape(-1, x.shape[-1]))
        if key not in grams:
            grams[key] = zero_gram(x_NI.shape[1], x.device)
        total = add_gram_(grams[key], x_NI)
        if counts is not None:
            counts[key] = counts.get(key, 0) + len(x_NI)
        # Not finite where a number is not, nor where the square of one is too large.
        if not total.diagonal().isfinite().all():
            raise LowRankError(
                f"NaN or Inf in {what}: {int((~x_NI.isfinite()).sum())} of {x_NI.numel()} activations, "
                f"the others up to {x_NI.nan_to_num(0, 0, 0).abs().max():.3g}",
                hint="try --dtype float32; if the dense model itself gives NaN on this text, it is broken",
            )

    return add


def statistics_of(unit: Unit, tokens: int, grams: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Statistics:
    """What was found of a matrix, or of all experts of a weight.

    Args:
        unit: what it is of.
        tokens: of the text.
        grams: of `input_grams`.
        outputs: of `output_grams`; empty without.
    """
    found = [outputs[matrix.name] for matrix in unit.matrices] if outputs else []
    output_gram = (found[0] if isinstance(unit, StoredMatrix) else torch.stack(found)) if found else None
    return Statistics(tokens=tokens, gram=gram_of(unit, grams), output_gram=output_gram)


def gram_if_known(unit: Unit, grams: Mapping[str, Tensor]) -> Tensor | None:
    """`gram_of`, None where there is none."""
    return gram_of(unit, grams) if unit.matrices[0].shares_input in grams else None


def gram_of(unit: Unit, grams: Mapping[str, Tensor]) -> Tensor:
    """Gram of the inputs of a matrix, [I, I], or of all experts of a weight, [E, I, I], from those by input."""
    if isinstance(unit, StoredMatrix):
        return grams[unit.matrix.shares_input]
    return torch.stack([grams[matrix.shares_input] for matrix in unit.matrices])


def _first_argument(hook: Callable[[Tensor], None]) -> Any:
    return lambda module, args: hook(args[0])


@contextmanager
def _activations_alone(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a backward pass makes gradients from the embeddings' output on, and none of parameters."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as stack:
        stack.callback(model.get_input_embeddings().register_forward_hook(_start_of_graph).remove)
        stack.enter_context(in_evaluation(model))
        try:
            model.requires_grad_(False)
            yield
        finally:
            for parameter in wanted:
                parameter.requires_grad_(True)


def _by_output(hook: Callable[[Tensor], None]) -> Any:
    def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(hook)

    return watch


def _start_of_graph(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    # Not a parameter: its gradient would be another product and as much memory as the embeddings.
    return output.detach().requires_grad_(True)


def _batches(model: PreTrainedModel, blocks: TokenBlocks, batch_size: int, desc: str) -> Iterator[Tensor]:
    """int64 [B, T] on the model's device."""
    for start in tqdm(range(0, len(blocks), batch_size), desc=desc, unit="batch", disable=None):
        yield blocks.ids[start : start + batch_size].to(device=model.device, dtype=torch.int64)
