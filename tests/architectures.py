"""What has to hold of a compressed model of any family: what `docs/architectures.md` tells and the tests ask for."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.compression.preview import preview
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.device import resolve_device
from lowrank_kit.errors import DoesNotFitError, LowRankError
from lowrank_kit.matrices import embedding_names

# Some families have so much that stays dense that nothing smaller is possible.
KEEPS = (0.6, 0.8, 0.95)
RANK = 4
TOKENS = 32
STREAMED, WHOLE, REFUSED = "streamed", "whole", "refused"


@dataclass
class Outcome:
    """What became of a model.

    Args:
        way: streamed block by block, whole in memory, or refused.
        why: of a model that was not streamed, the first line of what was said.
        keep: that was compressed to.
        factorized: role -> number of matrices or stacks of experts with a rank.
        ranks: name -> rank of each of them.
        dense: why -> number of those that stay dense.
        tied: whether the head is the embeddings.
        stacked: whether experts are stored as stacked factors.
        failed: what does not hold.
    """

    way: str = STREAMED
    why: str = ""
    keep: float | None = None
    factorized: Counter[str] = field(default_factory=Counter)
    ranks: dict[str, int] = field(default_factory=dict)
    dense: Counter[str] = field(default_factory=Counter)
    tied: bool = False
    stacked: bool = False
    failed: list[str] = field(default_factory=list)

    def expect(self, holds: bool, what: str) -> None:
        """Note what does not hold."""
        if not holds:
            self.failed.append(what)


def check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: str, folder: Path) -> Outcome:
    """Compress a model by its own folder and the public function, and look at what comes out.

    Args:
        model: a small one, in float32; its matrices are of low rank afterwards.
        tokenizer: of no more tokens than the model has.
        text: source of the calibration text.
        folder: an empty one, for what is made.
    """
    outcome = Outcome()
    dense, low = folder / "dense", folder / "low"
    _save(model, tokenizer, dense)
    outcome.tied = len(set(map(id, _ends(model)))) == 1
    try:
        _check_all_kept(outcome, dense, text, folder / "all")
        outcome.keep = _smallest(dense, text)
        _check_less(outcome, dense, text, folder / "less")
        make_low_rank(model, dense, outcome.ranks)
        _save(model, tokenizer, low)
        _check_low_rank(outcome, low, text, folder / "lossless")
    except LowRankError as error:
        outcome.way, outcome.why = REFUSED, error.message.partition("\n")[0].replace(f"{dense}: ", "")
    return outcome


def make_low_rank(model: PreTrainedModel, folder: Path, ranks: Mapping[str, int]) -> None:
    """Cut matrices to `RANK`, or to what they will be given if that is less, in place.

    Args:
        folder: that the model was saved to.
        ranks: name -> what they will be given.
    """
    for unit in Checkpoint.open(folder).units():
        if unit.matrix.name in ranks:
            W, rank = model.get_parameter(unit.matrix.parameter), min(RANK, ranks[unit.matrix.name])
            U, s, V = torch.linalg.svd(W.detach(), full_matrices=False)
            W.data = (U[..., :rank] * s[..., None, :rank]) @ V[..., :rank, :]


def settings_for(keep: float, text: str) -> CompressSettings:
    """Little text, in short blocks."""
    return CompressSettings(
        keep=keep, objective="whiten", text=text, calibration_blocks=12, check_blocks=4, block_tokens=TOKENS
    )


def _check_all_kept(outcome: Outcome, dense: Path, text: str, folder: Path) -> None:
    compress(dense, folder, settings_for(1.0, text), device="cpu")
    outcome.expect(torch.equal(logits(load(folder)), logits(load(dense))), "other logits than dense at keep 1.0")


def _check_less(outcome: Outcome, dense: Path, text: str, folder: Path) -> None:
    assert outcome.keep is not None
    settings = settings_for(outcome.keep, text)
    planned = preview(Checkpoint.open_headers(dense), settings, resolve_device("cpu"))["totals"]["bytes_after"]
    with _told("lowrank_kit.compression.job") as lines:
        report = compress(dense, folder, settings, device="cpu")
    if lines:
        outcome.way, outcome.why = WHOLE, lines[0]
    _note(outcome, report)
    on_disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    outcome.expect(planned == report["totals"]["bytes_after"] == on_disk, "other bytes than planned")
    outcome.expect(torch.isfinite(torch.tensor(report["check"]["loss_compressed"])).item() is True, "no finite loss")
    made = load(folder)
    again = folder.with_name("again")
    made.save_pretrained(again)
    reloaded = load(again)
    outcome.expect(_same(made, reloaded), "other weights once saved again")
    outcome.expect(torch.equal(logits(made), logits(reloaded)), "other logits once saved again")
    outcome.expect(torch.equal(generated(made), generated(reloaded)), "other text once saved again")
    if outcome.tied:
        outcome.expect(len(set(map(id, _ends(made)))) == 1, "no longer tied")
        copies = [len(_embeddings_on_disk(one, made)) for one in (dense, folder, again)]
        outcome.expect(copies == [1, 1, 1], "a second copy of the tied embeddings on disk")


def _check_low_rank(outcome: Outcome, low: Path, text: str, folder: Path) -> None:
    assert outcome.keep is not None
    compress(low, folder, settings_for(outcome.keep, text), device="cpu")
    off = (logits(load(folder)) - logits(load(low))).abs().max().item()
    outcome.expect(off < 1e-3, f"logits {off:.1g} off where the matrices are of low rank")


def _smallest(dense: Path, text: str) -> float:
    """The smallest keep of `KEEPS` that is possible."""
    for keep in KEEPS:
        try:
            preview(Checkpoint.open_headers(dense), settings_for(keep, text), resolve_device("cpu"))
        except DoesNotFitError as error:
            refused = error
        else:
            return keep
    raise refused


def _note(outcome: Outcome, report: dict[str, Any]) -> None:
    for row in report["matrices"]:
        if row["rank"] is None:
            outcome.dense[row["note"]] += 1
        else:
            outcome.factorized[row["role"]] += 1
            outcome.ranks[row["matrix"]] = row["rank"]
            outcome.stacked |= row["form"] == "stacked"


def load(folder: Path) -> PreTrainedModel:
    """As anybody would."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model: PreTrainedModel) -> Tensor:
    """For some ordinary tokens."""
    with torch.inference_mode():
        found: Tensor = model(input_ids=_ids(model), use_cache=False).logits
    return found


def generated(model: PreTrainedModel) -> Tensor:
    """Greedy, a few tokens further."""
    found: Tensor = model.generate(_ids(model)[:, :6], max_new_tokens=8, min_new_tokens=8, do_sample=False)
    return found


def _ids(model: PreTrainedModel) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(3, model.config.get_text_config().vocab_size, (2, 16), generator=draw)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _ends(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


def _embeddings_on_disk(folder: Path, model: PreTrainedModel) -> set[str]:
    """Tensors in the files that are the embeddings or the head."""
    names = {name.rpartition(".")[2] for name in embedding_names(model)}
    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= set(file.keys())
    return {key for key in found if key.removesuffix(".weight").rpartition(".")[2] in names}


def _same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@contextmanager
def _told(name: str) -> Iterator[list[str]]:
    """Inside, the warnings of a logger are collected."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
