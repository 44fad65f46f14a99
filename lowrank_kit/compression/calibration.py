"""What is known of a dense model before anything is cut: statistics on real text, and full factorizations.

Costly and cheap are apart: a calibration serves any budget, allocation and form.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.loading import check_blocks, load_model, load_tokenizer
from lowrank_kit.compression.allocation import Evidence
from lowrank_kit.compression.evidence import finite_weights, foldable
from lowrank_kit.compression.objectives import OBJECTIVES, Options, Statistics
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.compression.statistics import input_grams, input_grams_and_loss, output_grams, statistics_of
from lowrank_kit.compression.targets import targeted
from lowrank_kit.compression.texts import Texts, draw_texts
from lowrank_kit.data.blocks import TokenBlocks
from lowrank_kit.device import resolve_device, resolve_dtype
from lowrank_kit.errors import UsageError
from lowrank_kit.linalg.factor import Factors, tail_scores
from lowrank_kit.matrices import Matrix

BLOCK_TOKENS = 256


@dataclass(frozen=True)
class Calibration:
    """Statistics of a dense model on text; serves any budget.

    Args:
        model: folder of the model.
        texts: what was read.
        statistics: name of a matrix -> its statistics on the calibration text.
        check_grams: `Matrix.shares_input` -> Gram on the check text.
        check_loss: of the dense model on the check text, nats per token.
        seconds: what each part took.
        matrix_seconds: name of a matrix -> what its factorizations took.
        nested: (objective, options) -> name of a matrix -> its factors of full rank, once they have been asked for.
    """

    model: Path
    texts: Texts
    statistics: dict[str, Statistics]
    check_grams: dict[str, Tensor]
    check_loss: float
    seconds: dict[str, float]
    matrix_seconds: dict[str, float] = field(default_factory=dict)
    nested: dict[tuple[str, Options], dict[str, Factors]] = field(default_factory=dict)

    def factors(self, checkpoint: Checkpoint, objective: str, options: Options) -> dict[str, Factors]:
        """Nested factors of every matrix for an objective that needs the dense model alone; in float32, made once.

        Raises:
            UsageError: the calibration has not what the objective needs.
            LowRankError: NaN or Inf in a matrix.
        """
        key = (objective, options)
        if key not in self.nested:
            with timed(self.seconds, "factorize"):
                found = factorize(checkpoint, objective, options, self.statistics)
                made = {}
                for name, factors, seconds in found:
                    made[name] = factors.float32()
                    self.matrix_seconds[name] = self.matrix_seconds.get(name, 0.0) + seconds
                self.nested[key] = made
        return self.nested[key]


def calibrate(
    checkpoint: Checkpoint,
    settings: CompressSettings,
    *,
    texts: Texts | None = None,
    curvature: bool | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> Calibration:
    """Run the calibration text through the dense model, which is in memory as a whole.

    Args:
        checkpoint: of the dense model.
        settings: the text, how much of it, and the seed; the budget does not matter.
        texts: what `draw` gave for them, if that is done.
        curvature: whether the gradients of the outputs are wanted too; None: as the settings need.
        device: where to run.
        dtype: number format of the run.

    Raises:
        UsageError: too little text, or a tokenizer that is not the model's.
        LowRankError: NaN or Inf in an activation or a gradient.
    """
    started = time.perf_counter()
    checkpoint = targeted(checkpoint, settings)
    texts = texts or draw(checkpoint, settings)
    model = load_model(checkpoint, device=resolve_device(device), dtype=resolve_dtype(dtype))
    units = foldable(checkpoint)
    matrices = [matrix for unit in units for matrix in unit.matrices]
    seconds = {"text": round(time.perf_counter() - started, 3)}
    started = time.perf_counter()
    grams = input_grams(model, matrices, texts.calibration, batch_size=settings.batch_size)
    seconds["calibration"] = round(time.perf_counter() - started, 3)
    started = time.perf_counter()
    outputs: dict[str, Tensor] = {}
    if settings.needs_curvature if curvature is None else curvature:
        outputs = output_grams(model, matrices, texts.calibration, batch_size=settings.batch_size, seed=settings.seed)
        seconds["curvature"] = round(time.perf_counter() - started, 3)
    started = time.perf_counter()
    check_grams, check_loss = input_grams_and_loss(model, matrices, texts.check, batch_size=settings.batch_size)
    seconds["check"] = round(time.perf_counter() - started, 3)
    tokens = texts.calibration.num_tokens
    statistics = {unit.matrix.name: statistics_of(unit, tokens, grams, outputs) for unit in units}
    return Calibration(checkpoint.path, texts, statistics, check_grams, check_loss, seconds)


@contextmanager
def timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    """Add the time of what is inside."""
    started = time.perf_counter()
    yield
    seconds[what] = round(seconds.get(what, 0.0) + time.perf_counter() - started, 3)


def default_block_tokens(checkpoint: Checkpoint) -> int:
    """256, or the model's context if that is shorter."""
    context = getattr(checkpoint.meta_model().config.get_text_config(), "max_position_embeddings", None)
    return min(BLOCK_TOKENS, context or BLOCK_TOKENS)


def factorize(
    checkpoint: Checkpoint, objective: str, options: Options, statistics: dict[str, Statistics]
) -> Iterator[tuple[str, Factors, float]]:
    """Name, factors of full rank and seconds of every matrix, one shard at a time and one weight in memory.

    Raises:
        UsageError: the statistics have not what the objective needs.
        LowRankError: NaN or Inf in a matrix.
    """
    units = foldable(checkpoint)
    method = OBJECTIVES[objective]
    for unit in units:
        _refuse_missing(f'objective "{objective}"', method.needs, statistics.get(unit.matrix.name, Statistics()))
    weights = finite_weights(checkpoint, units)
    for unit, W in tqdm(weights, total=len(units), desc="factorize", unit="matrix", disable=None):
        started = time.perf_counter()
        factors = method.factorize(W, statistics.get(unit.matrix.name, Statistics()), options)
        yield unit.matrix.name, factors, time.perf_counter() - started


def inputs_evidence(calibration: Calibration, checkpoint: Checkpoint) -> dict[str, Evidence]:
    """Singular values of W H^{1/2} of every matrix."""
    whitened = calibration.factors(checkpoint, "whiten", Options())
    return {name: Evidence(weighted_values=factors.singular_values) for name, factors in whitened.items()}


def loss_evidence(
    calibration: Calibration, checkpoint: Checkpoint, objective: str, options: Options
) -> dict[str, Evidence]:
    """What each direction is worth to the loss, to second order: 1/2 tr(G dW H dW^T) / tokens^2, in nats per token.

    Errors of different matrices and tokens are taken to be independent; they are not, so that the sum over a model is
    too low (`forecast.py`).

    Raises:
        UsageError: a calibration without gradients.
    """
    for found in calibration.statistics.values():
        _refuse_missing('allocation "loss"', {"gram", "output_gram"}, found)
    evidence = {}
    for name, factors in calibration.factors(checkpoint, dense_objective(objective), options).items():
        found = calibration.statistics[name]
        assert found.gram is not None
        assert found.output_gram is not None
        scores = tail_scores(factors, found.gram, found.output_gram) / (2 * found.tokens**2)
        evidence[name] = Evidence(loss_scores=scores.clamp(min=0))
    return evidence


def dense_objective(objective: str) -> str:
    """The objective itself, or for a sequential one what it is without knowledge of the compressed model."""
    if not OBJECTIVES[objective].sequential:
        return objective
    return "two-sided" if "output_gram" in OBJECTIVES[objective].needs else "whiten"


def draw(checkpoint: Checkpoint, settings: CompressSettings) -> Texts:
    """The text of a compression.

    Args:
        checkpoint: of the dense model, with its tokenizer.
        settings: which text, how much of it, and the seed.

    Raises:
        UsageError: too little text, or a tokenizer that is not the model's.
    """
    texts = draw_texts(
        settings.text,
        load_tokenizer(checkpoint.path),
        block_tokens=settings.block_tokens or default_block_tokens(checkpoint),
        calibration=settings.calibration_blocks,
        check=settings.check_blocks,
        refinement=settings.refine_blocks if settings.needs_refinement else 0,
        max_bytes=settings.max_bytes,
        seed=settings.seed,
    )
    for blocks in texts.sets.values():
        check_blocks(checkpoint.meta_model(), blocks)
    _refuse_few_tokens([stored.matrix for stored in foldable(checkpoint, settings)], texts.calibration, settings)
    return texts


def _refuse_missing(who: str, needs: Collection[str], found: Statistics) -> None:
    missing = [need for need in sorted(needs) if getattr(found, need) is None]
    if not missing:
        return
    hint = "calibrate with this model"
    if missing == ["output_gram"]:
        hint = "calibrate(..., curvature=True)"
    elif "gram" not in missing:
        hint = "it is factorized block after block, by `compress`"
    raise UsageError(f"{who} needs {', '.join(missing)}, which this calibration has not", hint=hint)


def _refuse_few_tokens(matrices: Collection[Matrix], blocks: TokenBlocks, settings: CompressSettings) -> None:
    """Fewer tokens than a matrix has inputs leave directions that no token decides."""
    widest = max(matrices, key=lambda matrix: matrix.shape[1])
    if blocks.num_tokens < (inputs := widest.shape[1]):
        needed = -(-inputs // blocks.block_tokens)
        raise UsageError(
            f"{blocks.num_tokens:,} tokens of calibration text for the {inputs:,} inputs of {widest.name}: "
            f"its Gram cannot have full rank",
            hint=f"--calibration-blocks {needed} or more (the text had {len(blocks)} of {settings.calibration_blocks} "
            "blocks), a longer text, or --objective plain",
        )
