"""Grams of what matrices read, gathered while a text flows through one block, or through what is outside of them.

Shape legend: N tokens, I in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from lowrank_kit.checkpoint.loading import in_evaluation
from lowrank_kit.checkpoint.stacks import StoredStack, Unit
from lowrank_kit.compression import team
from lowrank_kit.compression.calibration import Calibration, timed
from lowrank_kit.compression.chain import Chain, read_input
from lowrank_kit.compression.experts import expert_grams
from lowrank_kit.compression.flow import Flow
from lowrank_kit.compression.sections import Section
from lowrank_kit.compression.statistics import MORE_TEXT, gathering_inputs
from lowrank_kit.compression.streams import Stream
from lowrank_kit.errors import LowRankError
from lowrank_kit.linalg.gram import add_gram_, at_least_float32, mirror_, zero_gram
from lowrank_kit.matrices import Matrix
from lowrank_kit.processes import summed

# Sequences at a time where logits are made: those of a large vocabulary take more than anything else.
HEAD_BATCH = 1


@dataclass(frozen=True)
class Grams:
    """`Matrix.shares_input` -> Gram [I, I] in float64 on the CPU.

    Args:
        calibration: on the calibration text, what factors are made for.
        check: on the check text, what errors are measured with.
    """

    calibration: Mapping[str, Tensor] = field(default_factory=dict)
    check: Mapping[str, Tensor] = field(default_factory=dict)


def grams_before(chain: Chain, matrices: Iterable[Matrix], ids_NT: Tensor) -> dict[str, Tensor]:
    """Grams of matrices that are run before the first block."""
    with chain.entering(), torch.no_grad(), gathering_inputs(chain.model, matrices) as grams:
        for _ in chain.enter(ids_NT):
            pass
    return grams


def grams_after(chain: Chain, matrices: Iterable[Matrix], ids_NT: Tensor, stream: Stream) -> dict[str, Tensor]:
    """Grams of matrices that are run after the last block, for the streams that it gave."""
    with chain.leaving(), torch.no_grad(), gathering_inputs(chain.model, matrices) as grams:
        for rows, batch in stream.batches(HEAD_BATCH):
            chain.leave(ids_NT[rows], batch)
    return grams


def loss_after(chain: Chain, ids_NT: Tensor, stream: Stream) -> float:
    """Cross-entropy of the next token in nats, for what the last block gave; inside of `leaving`.

    Raises:
        LowRankError: it is not finite.
    """
    total = torch.zeros((), dtype=torch.float64)
    for rows, batch in stream.batches(HEAD_BATCH):
        with torch.no_grad():
            logits_TV = chain.leave(ids_NT[rows], batch)[:, :-1].flatten(0, 1).float()
        labels_T = ids_NT[rows, 1:].flatten().to(logits_TV.device, torch.int64)
        total += nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum").double().cpu()
    if not summed(total).isfinite():
        raise LowRankError(
            f"the loss of {chain.model.name_or_path or type(chain.model).__name__} on the check text is {total.item()}",
            hint="look for NaN or Inf in the weights, or try --dtype float32",
        )
    return total.item() / team.total(ids_NT.numel() - len(ids_NT))


def in_order(chain: Chain, section: Section, block: nn.Module, stream: Stream) -> list[list[Unit]]:
    """Matrices, those with one input together, as a block comes to them."""
    groups: dict[str, list[Unit]] = {}
    for unit in section.stored.values():
        groups.setdefault(unit.matrix.shares_input, []).append(unit)
    seen: list[str] = []
    with ExitStack() as stack, torch.no_grad(), in_evaluation(block):
        for key, group in groups.items():
            module = block.get_submodule(section.inside(group[0].module))
            stack.callback(module.register_forward_pre_hook(lambda *_, key=key: seen.append(key)).remove)
        chain.run(section.index - 1, block, stream.rows(slice(0, chain.batch_size)))
    if unread := [group[0].matrix.name for key, group in groups.items() if key not in seen]:
        raise LowRankError(f"the calibration text does not reach {unread[0]}", hint=MORE_TEXT)
    return [groups[key] for key in dict.fromkeys(seen)]


def changed_grams(
    chain: Chain, index: int, blocks: tuple[nn.Module, nn.Module], unit: Unit, streams: tuple[Stream, Stream]
) -> tuple[Tensor, Tensor]:
    """Y Y^T and X Y^T of what a matrix reads in the dense block (X) and in the compressed one (Y), [I, I] float64.

    Of the experts of a weight [E, I, I], see `expert_grams`.

    Args:
        chain, index: which block.
        blocks: dense and compressed.
        unit: the matrix.
        streams: what the two blocks read.
    """
    if isinstance(unit, StoredStack):
        return expert_grams(chain, index, blocks, unit, streams)
    reader = unit.matrix.name
    path = reader.removeprefix(f"{chain.paths[index]}.")
    gram = cross = None
    read = (read_input(chain, index, block, path, stream) for block, stream in zip(blocks, streams, strict=True))
    for x, y in zip(*read, strict=True):
        x_NI, y_NI = at_least_float32(x.flatten(0, -2)), at_least_float32(y.flatten(0, -2))
        if gram is None or cross is None:
            gram = zero_gram(y_NI.shape[1], y.device)
            cross = torch.zeros_like(gram)
        add_gram_(gram, y_NI)
        cross += x_NI.mT @ y_NI
    assert gram is not None
    assert cross is not None
    summed(gram)
    summed(cross)
    if not (gram.diagonal().isfinite().all() and cross.isfinite().all()):
        raise LowRankError(
            f"NaN or Inf in the input of {reader} of the compressed model",
            hint="a higher budget, or --objective whiten",
        )
    return mirror_(gram).cpu(), cross.cpu()


class Gathering:
    """Grams of the dense model, section by section.

    Args:
        flow: the streams; None where all is known already, or no text is run.
        calibration: of the whole model, if there is one: nothing is gathered then.
        sequential: the calibration's dense stream stays before a block whose Grams are gathered.
        seconds: the time it takes is added here.
    """

    def __init__(
        self, flow: Flow | None, calibration: Calibration | None, sequential: bool, seconds: dict[str, float]
    ) -> None:
        self.flow, self.calibration, self.sequential, self.seconds = flow, calibration, sequential, seconds

    def known(self, section: Section) -> Grams:
        """From the calibration."""
        if self.calibration is None:
            return Grams()
        grams: dict[str, Tensor] = {}
        for name, unit in section.stored.items():
            if (gram := self.calibration.statistics[name].gram) is not None:
                each = [gram] if unit.count == 1 and gram.ndim == 2 else list(gram)
                grams |= {matrix.shares_input: one for matrix, one in zip(unit.matrices, each, strict=True)}
        return Grams(grams, {key: self.calibration.check_grams[key] for key in grams})

    def before(self, section: Section) -> Grams:
        """Of matrices before the first block."""
        if self.calibration is not None or not section.stored:
            return self.known(section)
        assert self.flow is not None
        chain, texts = self.flow.chain, self.flow.texts
        return Grams(*(grams_before(chain, section.matrices, texts[name]) for name in ("calibration", "check")))

    def after(self, section: Section) -> Grams:
        """Of matrices after the last block."""
        if self.calibration is not None or not section.stored:
            return self.known(section)
        assert self.flow is not None
        chain, texts, dense = self.flow.chain, self.flow.texts, self.flow.dense
        names = ("calibration", "check")
        return Grams(*(grams_after(chain, section.matrices, texts[name], dense[name]) for name in names))

    def inside(self, section: Section, block: nn.Module, text: str) -> Mapping[str, Tensor]:
        """Of a block on one text, while its dense stream goes through.

        Args:
            text: "calibration" or "check", one after the other: the Grams of both are twice as much memory.
        """
        assert self.flow is not None
        index, stays = section.index - 1, text == "calibration" and self.sequential
        move = partial(self.flow.peek if stays else self.flow.run_dense, text, index, block)
        if self.calibration is None:
            filled = text == "calibration"
            with (
                timed(self.seconds, "grams"),
                gathering_inputs(block, section.matrices, section.prefix, filled=filled) as grams,
            ):
                move()
            return grams
        if text in self.flow.dense and not stays:
            move()
        known: Mapping[str, Tensor] = getattr(self.known(section), text)
        return known
