"""What allocations and objectives want to know of a model before any rank is decided, section by section on disk.

Shape legend: B sequences, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.writer import write_tensors
from lowrank_kit.compression.allocation import Evidence
from lowrank_kit.compression.calibration import dense_objective
from lowrank_kit.compression.chain import Chain
from lowrank_kit.compression.evidence import finite_weights
from lowrank_kit.compression.gather import HEAD_BATCH
from lowrank_kit.compression.objectives import OBJECTIVES, Statistics
from lowrank_kit.compression.progress import Progress
from lowrank_kit.compression.sections import AFTER, BEFORE, Section
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.compression.statistics import gathering_gradients, gathering_inputs, sampled_loss, statistics_of
from lowrank_kit.compression.streams import Held, Stream, new_stream
from lowrank_kit.compression.team import place_of, share_of, spread
from lowrank_kit.linalg.factor import Factors, tail_scores
from lowrank_kit.processes import on_first

# Leaves of the names in a section's file.
EVIDENCE, GRADIENTS, FACTORS = "evidence", "output_gram", ("B", "A", "singular_values")


class SurveyFiles:
    """What a survey has found, read section by section.

    Args:
        folder: of its files.
        sections: of the model.
        needed: of `evidence_needed`.
    """

    def __init__(self, folder: Path, sections: Sequence[Section], needed: str) -> None:
        self.folder, self.needed = folder, needed
        self.paths = {section.path: folder / f"{section.index:05d}.safetensors" for section in sections}

    def has(self, section: Section) -> bool:
        """Whether a section is done, or has nothing to be done."""
        return not section.stored or self.paths[section.path].exists()

    def factors(self, section: str) -> dict[str, Factors]:
        """Name of a matrix -> its nested factors; empty where they were not kept."""
        found = self._read(section, FACTORS)
        names = dict.fromkeys(name for name, _ in found)
        return {name: Factors(*(found[name, leaf] for leaf in FACTORS)) for name in names}

    def output_grams(self, section: str) -> dict[str, Tensor]:
        """Name of a matrix -> Gram of the gradients of its outputs; empty where they were not kept."""
        return {name: gram.double() for (name, _), gram in self._read(section, (GRADIENTS,)).items()}

    @cached_property
    def evidence(self) -> dict[str, Evidence]:
        """Of every matrix."""
        field = {"inputs": "weighted_values", "loss": "loss_scores"}[self.needed]
        return {
            name: Evidence(**{field: values})
            for section in self.paths
            for (name, _), values in self._read(section, (EVIDENCE,)).items()
        }

    def _read(self, section: str, leaves: Sequence[str]) -> dict[tuple[str, str], Tensor]:
        found: dict[tuple[str, str], Tensor] = {}
        if not self.paths[section].exists():
            return found
        with safe_open(self.paths[section], framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                name, _, leaf = key.rpartition("|")
                if leaf in leaves:
                    found[name, leaf] = file.get_tensor(key).clone()
        return found


class Survey:
    """A pass over the dense model; with curvature one forward and one backward.

    Args:
        checkpoint: of the dense model.
        settings: with nothing left open.
        needed: of `evidence_needed`: "inputs", "loss", or another where only the objective asks for curvature.
        chain: its blocks.
        sections: of the model.
        ids: int [N, T], calibration text, of which this process takes its share.
        folder: where what is found is kept.
        spill: folder for activations; None keeps them in memory.
        progress: is told of each matrix and section.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: CompressSettings,
        needed: str,
        *,
        chain: Chain,
        sections: Sequence[Section],
        ids: Tensor,
        folder: Path,
        spill: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.checkpoint, self.settings, self.needed, self.chain = checkpoint, settings, needed, chain
        self.sections, self.spill, self.progress = sections, spill, progress or Progress()
        self.ids, self.tokens = share_of(ids), ids.numel()
        self.files = SurveyFiles(folder, sections, needed)
        self.objective = dense_objective(settings.objective)
        self.sequential = OBJECTIVES[settings.objective].sequential

    def run(self) -> SurveyFiles:
        """Find what is not found yet.

        Raises:
            LowRankError: NaN or Inf in a matrix, an activation, a logit or a gradient.
        """
        wanted = [section for section in self.sections if section.stored]
        done = sum(self.files.has(section) for section in wanted)
        if done < len(wanted):
            with self.progress.stage("survey", len(wanted), done):
                if self.settings.needs_curvature:
                    self._backward()
                else:
                    self._forward()
        return self.files

    # With the inputs alone

    def _forward(self) -> None:
        before, *blocks, after = self.sections
        self._outside(before, self._enter)
        stream = self._entered("survey")
        for section in blocks:
            with self.chain.inside(section.index - 1):
                stream = self._through(section, stream)
            stream.settle()
        self._outside(after, lambda: self._leave(stream))
        stream.drop()

    def _outside(self, section: Section, run: Callable[[], None]) -> None:
        grams: dict[str, Tensor] = {}
        if section.stored and not self.files.has(section):
            around = self.chain.entering() if section.path == BEFORE else self.chain.leaving()
            with (
                around,
                torch.no_grad(),
                gathering_inputs(self.chain.model, section.matrices, section.prefix) as gathered,
            ):
                run()
            grams = gathered
        self._keep(section, grams, {})

    def _through(self, section: Section, stream: Stream) -> Stream:
        """The stream behind a block."""
        index, block = section.index - 1, self.chain.block(section.index - 1)
        if self.files.has(section):
            return self.chain.run_all(index, block, stream)
        with gathering_inputs(block, section.matrices, section.prefix) as grams:
            after = self.chain.run_all(index, block, stream)
        self._keep(section, grams, {})
        return after

    def _enter(self) -> None:
        for _ in self.chain.enter(self.ids):
            pass

    def _leave(self, stream: Stream) -> None:
        for rows, batch in stream.batches(HEAD_BATCH):
            self.chain.leave(self.ids[rows], batch)

    # With the gradients

    def _backward(self) -> None:
        """Inputs of all blocks forward, then gradients backward; each block is run once more for its own."""
        before, *blocks, after = self.sections
        places = [self._entered("survey")]
        for section in blocks:
            index = section.index - 1
            with self.chain.inside(index):
                stream = places[-1].copy() if isinstance(places[-1], Held) else places[-1]
                places.append(self.chain.run_all(index, self.chain.block(index), stream))
        gradients = self._gradients_of_head(after, places[-1])
        places.pop().drop()
        for section in reversed(blocks):
            index = section.index - 1
            with self.chain.inside(index):
                gradients = self._gradients_of_block(section, places[-1], gradients)
            places.pop().drop()
            gradients.settle()
        self._gradients_of_entry(before, gradients)
        gradients.drop()

    def _gradients_of_head(self, section: Section, stream: Stream) -> Stream:
        def back() -> Iterator[Tensor]:
            for rows, batch in stream.batches(HEAD_BATCH):
                hidden = batch.to(self.chain.device).requires_grad_(True)
                logits = self.chain.leave(self.ids[rows], hidden)
                sampled_loss(self.chain.model, logits, self.settings.seed, place_of(rows.start)).backward()
                assert hidden.grad is not None
                yield hidden.grad.cpu()

        with self.chain.leaving():
            place = len(self.chain.paths)
            return self._watched(
                section, self.chain.model, lambda: new_stream(self.spill, "gradient", back(), len(self.ids), place)
            )

    def _gradients_of_block(self, section: Section, stream: Stream, gradients: Stream) -> Stream:
        index, inputs = section.index - 1, stream.batches(self.chain.batch_size)
        block = self.chain.block(index)

        def back(gradient_BTD: Tensor) -> Tensor:
            _, batch = next(inputs)
            hidden = batch.to(self.chain.device).requires_grad_(True)
            self.chain.run(index, block, hidden).backward(gradient_BTD.to(self.chain.device))
            assert hidden.grad is not None
            return hidden.grad.cpu()

        return self._watched(section, block, lambda: gradients.advance(back, self.chain.batch_size, index))

    def _gradients_of_entry(self, section: Section, gradients: Stream) -> None:
        if not section.stored:
            self._keep(section, {}, {})
            return

        def run() -> Stream:
            batches = gradients.batches(self.chain.batch_size)
            for entered, (_, gradient) in zip(self.chain.enter(self.ids), batches, strict=True):
                entered.backward(gradient)
            return gradients

        embeddings = self.chain.model.get_input_embeddings()
        with self.chain.entering(), ExitStack() as stack:
            stack.callback(embeddings.register_forward_hook(lambda *args: args[2].detach().requires_grad_(True)).remove)
            self._watched(section, self.chain.model, run)

    def _watched(self, section: Section, owner: nn.Module, run: Callable[[], Stream]) -> Stream:
        """What `run` gives; Grams of inputs and of gradients are gathered meanwhile, unless that is done."""
        if self.files.has(section):
            return run()
        matrices, prefix = section.matrices, section.prefix
        with (
            gathering_gradients(owner, matrices, self.tokens, prefix) as outputs,
            gathering_inputs(owner, matrices, prefix) as grams,
        ):
            after = run()
        self._keep(section, grams, outputs)
        return after

    # What is kept

    def _keep(self, section: Section, grams: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        if self.files.has(section):
            return

        def of(name: str) -> dict[str, Tensor]:
            self.progress.matrix(name)
            ((_, W),) = finite_weights(self.checkpoint, [section.stored[name]])
            known = statistics_of(section.stored[name], self.tokens, grams, outputs)
            return {f"{name}|{leaf}": value for leaf, value in self._of_matrix(W, known, section).items()}

        found = {key: value for _, of_one in spread(section.costs, of) for key, value in of_one.items()}
        on_first(lambda: write_tensors(self.files.paths[section.path], found))
        self.progress.section(section.path)

    def _of_matrix(self, W: Tensor, known: Statistics, section: Section) -> dict[str, Tensor]:
        """Evidence, and what the folding would have to find once more."""
        found: dict[str, Tensor] = {}
        cut_in_turn = self.sequential and section.path not in (BEFORE, AFTER)
        wanted = {self.objective} if self.needed == "loss" or not cut_in_turn else set()
        wanted |= {"whiten"} if self.needed == "inputs" else set()
        factors = {name: OBJECTIVES[name].factorize(W, known, self.settings.options) for name in wanted}
        if self.needed == "inputs":
            found[EVIDENCE] = factors["whiten"].singular_values
        elif self.needed == "loss":
            assert known.gram is not None
            assert known.output_gram is not None
            scores = tail_scores(factors[self.objective], known.gram, known.output_gram) / (2 * known.tokens**2)
            found[EVIDENCE] = scores.clamp(min=0)
        if not cut_in_turn:
            single = factors[self.objective].float32()
            found |= {leaf: getattr(single, leaf) for leaf in FACTORS}
        if cut_in_turn and "output_gram" in OBJECTIVES[self.settings.objective].needs:
            assert known.output_gram is not None
            found[GRADIENTS] = known.output_gram.float()
        return found

    # Streams

    def _entered(self, name: str) -> Stream:
        with self.chain.entering(), torch.no_grad():
            return new_stream(self.spill, name, self.chain.enter(self.ids), len(self.ids))
