"""What a run will take, before any work: memory by part, disk, arithmetic and time, from shapes and settings alone."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from lowrank_kit.device import available_memory, product_flops
from lowrank_kit.errors import DoesNotFitError
from lowrank_kit.matrices import Matrix, find_matrices, token_share
from lowrank_kit.optim.footprint import state_bytes, step_bytes, step_flops
from lowrank_kit.optim.numuon import NuMuon
from lowrank_kit.processes import num_processes
from lowrank_kit.report.tables import amount, duration, time_class
from lowrank_kit.training.settings import TrainSettings

# Share of the speed of large products that a run reaches.
UTILIZATION = 0.5
# The loss holds the logits, their log-softmax and the gradient at once, in float32.
_LOGIT_COPIES = 3
_WIDE = 4


@dataclass(frozen=True)
class Memory:
    """Bytes in one process.

    Args:
        weights: in float32, exact.
        gradients: exact.
        optimizer_state: exact, at its largest.
        optimizer_step: copies that a step makes for a while, estimated.
        activations: what the forward pass keeps for the backward pass, estimated.
        logits: of the loss.
    """

    weights: int
    gradients: int
    optimizer_state: int
    optimizer_step: int
    activations: int
    logits: int

    @property
    def certain(self) -> int:
        """Weights, gradients and optimizer state, which there is no way around."""
        return self.weights + self.gradients + self.optimizer_state

    @property
    def least(self) -> int:
        """What the run cannot do without: the certain, and the larger of what the two halves of a step add."""
        return self.certain + max(self.activations + self.logits, self.optimizer_step)

    @property
    def most(self) -> int:
        """All parts together: an allocator that keeps what is freed, as the CPU's does, comes close to it."""
        return self.certain + self.activations + self.logits + self.optimizer_step

    def parts(self) -> dict[str, int]:
        """Name -> bytes, the largest first."""
        parts = {key.replace("_", " "): value for key, value in asdict(self).items()}
        return dict(sorted(parts.items(), key=lambda part: -part[1]))


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Args:
        parameters: numbers of matrices, of embeddings and head, and of other parameters.
        steps: optimizer steps.
        step_tokens: tokens in each.
        processes: that share the tokens and the work.
        memory: of one process.
        flops: of a step: model (6 for each parameter that a token meets in a product, forward and backward; Kaplan et
            al., arXiv 2001.08361; 4 of those frozen beside adapters, and 2 more where activations are computed
            again), attention (as PaLM, arXiv 2204.02311, appendix B, halved for the causal mask),
            and optimizer.
        model_bytes: of the weights on disk.
        checkpoint_bytes: of a checkpoint to resume from on disk: weights and optimizer state.
    """

    parameters: dict[str, int]
    steps: int
    step_tokens: int
    processes: int
    memory: Memory
    flops: dict[str, float]
    model_bytes: int
    checkpoint_bytes: int

    def seconds(self, flops_per_s: float) -> float:
        """Time where large products go at `flops_per_s` in every process; no validation, nothing sent."""
        return self.steps * sum(self.flops.values()) / (UTILIZATION * flops_per_s * self.processes)


def estimate_run(
    model: PreTrainedModel, optimizer: NuMuon, settings: TrainSettings, *, processes: int = 1, shards: int = 1
) -> Estimate:
    """What training takes in each process.

    Args:
        model: may be on the meta device.
        optimizer: of its parameters.
        settings: of the run; a conversation counts as a whole sequence.
        processes: of the run; without shards each holds its gradients twice, the second time in the buckets of DDP.
        shards: processes among which weights, gradients and optimizer state are divided.
    """
    matrices = find_matrices(model)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    weights = sum(p.nbytes for p in model.parameters())
    state = state_bytes(optimizer)
    tokens = settings.batch_size // processes * settings.block_tokens
    copies = 2 if processes > shards == 1 else 1
    memory = Memory(
        weights=-(-weights // shards),
        gradients=-(-copies * trained // shards),
        optimizer_state=-(-state // shards),
        optimizer_step=step_bytes(optimizer),
        activations=_activations(model, matrices, tokens, settings),
        logits=_LOGIT_COPIES * _WIDE * tokens * _vocabulary(model),
    )
    return Estimate(
        parameters=_parameters(model, matrices),
        steps=settings.num_steps,
        step_tokens=settings.step_tokens,
        processes=processes,
        memory=memory,
        flops={**_model_flops(model, matrices, settings), "optimizer": step_flops(optimizer)},
        model_bytes=weights,
        checkpoint_bytes=weights + state,
    )


def check_memory(memory: Memory, settings: TrainSettings, device: torch.device) -> int:
    """The bytes that there are for this process, after refusing a run that needs more.

    Raises:
        DoesNotFitError: with the largest parts, and what would take less.
    """
    available = available_memory(device)
    if device.type == "cpu":  # which all processes of the machine share
        available //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if memory.least <= available:
        return available
    largest = ", ".join(f"{name} {amount(nbytes)}" for name, nbytes in list(memory.parts().items())[:3])
    raise DoesNotFitError(
        f"the run needs at least {amount(memory.least)} and {device} has {amount(available)} left; the largest "
        f"parts: {largest}",
        hint=_remedy(memory, settings, available),
    )


def report(estimate: Estimate, device: torch.device, *, bf16: bool) -> dict[str, Any]:
    """All numbers of an estimate as plain values, with time on this device, whose products are timed.

    Args:
        estimate: of `estimate_run`.
        device: where the run would be.
        bf16: products are in bfloat16.
    """
    speed = product_flops(device, torch.bfloat16 if bf16 else torch.float32)
    seconds = estimate.seconds(speed)
    return {
        "parameters": {**estimate.parameters, "total": sum(estimate.parameters.values())},
        "steps": estimate.steps,
        "tokens": estimate.steps * estimate.step_tokens,
        "processes": estimate.processes,
        "memory": {**asdict(estimate.memory), "least": estimate.memory.least, "most": estimate.memory.most},
        "disk": {"model": estimate.model_bytes, "checkpoint": estimate.checkpoint_bytes},
        "flops": {name: estimate.steps * flops for name, flops in estimate.flops.items()},
        "product_flops_per_s": speed,
        "utilization": UTILIZATION,
        "seconds": seconds,
        "time_class": time_class(seconds),
        "device": str(device),
    }


def report_rows(report: Mapping[str, Any], settings: TrainSettings) -> list[dict[str, str]]:
    """The same for a person: what, how much, and how it is known."""
    numbers, memory, flops = report["parameters"], report["memory"], report["flops"]
    batch = f"{settings.batch_size // report['processes']} x {settings.block_tokens} tokens"
    known = {
        "weights": "float32",
        "gradients": "float32",
        "optimizer_state": f"exact, {settings.optimizer}",
        "optimizer_step": "copies while it steps, estimated",
        "activations": f"of {batch}, estimated",
        "logits": f"{batch} x vocabulary, {_LOGIT_COPIES} copies in float32",
        "least": "the run is refused where there is less",
        "most": "all parts together",
    }
    rows = [("parameters", f"{numbers['total']:,}", f"{numbers['matrices']:,} of them in matrices")]
    rows += [("tokens", f"{report['tokens']:,}", f"{report['steps']:,} steps of {settings.step_tokens:,}")]
    if report["processes"] > 1:
        rows += [("processes", f"{report['processes']}", "each takes this memory")]
    rows += [(f"memory: {name.replace('_', ' ')}", amount(memory[name]), how) for name, how in known.items()]
    rows += [(f"disk: {name}", amount(nbytes), _DISK[name]) for name, nbytes in report["disk"].items()]
    rows += [(f"work: {name}", amount(flops[name], "FLOP"), how) for name, how in _WORK.items()]
    speed = (
        f"{UTILIZATION:.0%} of {amount(report['product_flops_per_s'], 'FLOP/s')} in products here, give or take half"
    )
    rows += [("time", duration(report["seconds"]), speed)]
    return [dict(zip(("what", "how much", "how"), row, strict=True)) for row in rows]


_DISK = {"model": "weights", "checkpoint": "weights and optimizer state, of which --keep-checkpoints stay"}
_WORK = {
    "model": "parameters in products x tokens, forward and backward",
    "attention": "width of heads x blocks x sequence x tokens",
    "optimizer": "products and factorizations of matrices",
}


def _remedy(memory: Memory, settings: TrainSettings, available: int) -> str:
    processes = num_processes()
    sequences = settings.batch_size // processes
    fixed = memory.certain + (memory.activations + memory.logits) // sequences
    if sequences > 1 and max(fixed, memory.certain + memory.optimizer_step) <= available:
        fewer = f"--batch-size {processes} --accumulate {sequences * settings.accumulate}"
        return f"{fewer} takes the same steps in about {amount(fixed)}"
    smaller = "a smaller model, for example --model-config 15m; fewer --block-tokens; --checkpoint-activations"
    return f"{smaller}; weights, gradients and optimizer state alone take {amount(memory.certain)}"


def _parameters(model: PreTrainedModel, matrices: list[Matrix]) -> dict[str, int]:
    in_matrices = sum(math.prod(matrix.shape) for matrix in matrices)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = sum(p.numel() for p in {id(end.weight): end.weight for end in ends if end is not None}.values())
    total = sum(p.numel() for p in model.parameters())
    return {"matrices": in_matrices, "embeddings": embeddings, "other": total - in_matrices - embeddings}


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _activations(model: PreTrainedModel, matrices: list[Matrix], tokens: int, settings: TrainSettings) -> int:
    """Bytes that blocks like Llama's keep for the backward pass.

    For each token: the input of every matrix, once where matrices share it; every output, which an activation function,
    a product, attention or the norm after it keeps; the normalized stream before each branch; the activation of the
    gate; q and k before and after a norm of their own. Attention that does not keep its weights (SDPA) is taken for
    granted. Under bf16 the residual stream and norms stay float32, the rest is half as wide, every matrix makes a
    bfloat16 copy of its input for itself, and the matrices are there in bfloat16 too. Under checkpoint_activations it
    is the input of each block, and all of one block.

    Source: counted as in Korthikanti et al. (arXiv 2205.05198), section 4.1, for the operations of transformers'
    Llama; within 5 % of what autograd keeps for Llama and Qwen3; GPT-2, with dropout, keeps 1.7 times this.
    """
    bf16, narrow = settings.bf16, 2 if settings.bf16 else _WIDE
    own_norm = any(name.endswith("q_norm") for name, _ in model.named_modules())
    inputs: dict[str, float] = {}
    outputs = 0.0
    for matrix in matrices:
        share, (rows, columns) = token_share(model, matrix), matrix.shape
        inputs[matrix.name if bf16 else matrix.shares_input] = share * narrow * columns
        # Added to the residual stream, which the next norm keeps, and again normalized.
        outputs += share * rows * (2 * _WIDE if matrix.ends_branch else narrow)
        outputs += share * rows * (_WIDE + narrow) if own_norm and matrix.role in ("q", "k") else 0
        outputs += share * columns * narrow if matrix.role == "down" else 0
    head = model.get_input_embeddings().weight
    width = _WIDE * head.shape[1]
    kept = sum(inputs.values()) + outputs
    if settings.checkpoint_activations:
        blocks = len({matrix.block for matrix in matrices})
        kept = kept / blocks + blocks * width
    copies = narrow * (head.numel() + sum(math.prod(m.shape) for m in matrices)) if bf16 else 0
    return round(tokens * (kept + 3 * width)) + copies


def _model_flops(model: PreTrainedModel, matrices: list[Matrix], settings: TrainSettings) -> dict[str, float]:
    met = sum(token_share(model, matrix) * math.prod(matrix.shape) for matrix in matrices)
    head = math.prod(model.get_input_embeddings().weight.shape)
    heads = sum(matrix.shape[1] for matrix in matrices if matrix.role == "o")
    tokens, again = settings.step_tokens, settings.checkpoint_activations
    each = (6.0 if settings.lora is None else 4.0) + 2.0 * again
    attention = 6.0 + 2.0 * again
    return {"model": each * (met + head) * tokens, "attention": attention * heads * settings.block_tokens * tokens}
