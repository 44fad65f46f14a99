"""Score models, dense or compressed, on the same text and tasks: one row per model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.loading import load_model, load_tokenizer
from lowrank_kit.data.blocks import TokenBlocks, token_blocks
from lowrank_kit.data.corpus import load_corpus
from lowrank_kit.data.sources import STDLIB, Document, read_source
from lowrank_kit.device import resolve_device, resolve_dtype
from lowrank_kit.errors import UsageError, did_you_mean
from lowrank_kit.evaluation.divergence import divergence
from lowrank_kit.evaluation.harness import run_tasks
from lowrank_kit.evaluation.overlap import refuse_used_text
from lowrank_kit.evaluation.perplexity import perplexity

PARTS = ("auto", "heldout", "all")


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """What models are scored on.

    Args:
        text: text source of perplexity and divergence; None is the standard library.
        part: `heldout` is the part `lowrank train` never trains on, `all` the whole source; `auto` is the held-out
            part of the standard library and all of anything else.
        perplexity: whether to score perplexity.
        blocks: most sequences to score.
        block_tokens: tokens in a sequence.
        batch_size: sequences in a forward pass.
        tasks: names of lm-eval tasks.
        include_path: folder with further lm-eval tasks.
        limit: most documents of a task.
        seed: of the choice of sequences and of lm-eval.

    Raises:
        UsageError: an unknown part.
    """

    text: str | None = None
    part: str = "auto"
    perplexity: bool = True
    blocks: int = 256
    block_tokens: int = 256
    batch_size: int = 8
    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise UsageError(f'unknown part "{self.part}"', hint=did_you_mean(self.part, PARTS))

    @property
    def chosen_part(self) -> str:
        """`heldout` or `all`."""
        if self.part != "auto":
            return self.part
        return "heldout" if (self.text or STDLIB) == STDLIB else "all"


def documents_of(settings: EvalSettings) -> list[Document]:
    """The text to score, read once for all models."""
    if settings.chosen_part == "heldout":
        return list(load_corpus(settings.text).heldout)
    return list(read_source(settings.text))


def evaluate(
    models: Sequence[str],
    settings: EvalSettings,
    *,
    reference: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> list[dict[str, Any]]:
    """Score models one after the other; one of them, and the reference, is in memory at a time.

    Args:
        models: folders or hub names, dense or compressed.
        settings: what to score on.
        reference: the model whose predictions the divergence is measured from.
        device: where to compute.
        dtype: number format of the weights; `auto` is the checkpoint's own.

    Returns:
        One row per model: name, numbers and bytes on disk, then the scores.

    Raises:
        UsageError: nothing to score, a model that is not there, text shorter than a block, text that a model was
            compressed with, a reference with another vocabulary.
    """
    if not settings.perplexity and not settings.tasks and reference is None:
        raise UsageError("nothing to score", hint="leave out --no-perplexity, or name --tasks or a --reference")
    checkpoints = [Checkpoint.open(model) for model in models]
    base = None if reference is None else Checkpoint.open(reference)
    documents = documents_of(settings) if settings.perplexity or base is not None else []
    for checkpoint in filter(None, (*checkpoints, base)):
        refuse_used_text(checkpoint, documents)
    torch_device, torch_dtype = resolve_device(device), resolve_dtype(dtype)
    reference_model = None
    if base is not None:
        reference_model = load_model(base, device=torch_device, dtype=torch_dtype)
    rows = []
    for name, checkpoint in zip(models, checkpoints, strict=True):
        model = load_model(checkpoint, device=torch_device, dtype=torch_dtype)
        scores = score(model, load_tokenizer(checkpoint.path), documents, settings, reference=reference_model)
        rows.append({"model": name, **sizes(checkpoint), **scores})
    return rows


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    settings: EvalSettings,
    *,
    reference: PreTrainedModel | None = None,
) -> dict[str, Any]:
    """Scores of one model: text, then divergence, then tasks."""
    scores: dict[str, Any] = {}
    if documents:
        blocks = _blocks(documents, tokenizer, settings)
        if settings.perplexity:
            found = perplexity(model, blocks, batch_size=settings.batch_size)
            scores |= {
                "loss": found.loss_nats,
                "perplexity": found.perplexity,
                "bits_per_byte": found.bits_per_byte,
                "tokens": found.num_tokens,
                "sha256": found.sha256,
            }
        if reference is not None:
            apart = divergence(model, reference, blocks, batch_size=settings.batch_size)
            scores |= {f"reference_{key}": value for key, value in asdict(apart).items() if key != "num_tokens"}
    if settings.tasks:
        results = run_tasks(
            model,
            tokenizer,
            list(settings.tasks),
            include_path=settings.include_path,
            limit=settings.limit,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        scores["tasks"] = [asdict(result) for result in results]
    return scores


def sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Numbers and bytes of a checkpoint on disk."""
    return {
        "parameters": sum(torch.Size(header.shape).numel() for header in checkpoint.headers.values()),
        "bytes": checkpoint.nbytes,
    }


def _blocks(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, settings: EvalSettings) -> TokenBlocks:
    return token_blocks(documents, tokenizer, settings.block_tokens, max_blocks=settings.blocks, seed=settings.seed)
