"""The whole way in minutes: one small model trained with three optimizers, measured, compressed and scored."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.loading import load_model, load_tokenizer
from lowrank_kit.compression.calibration import calibrate
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.data.corpus import Corpus, load_corpus
from lowrank_kit.data.tokenizer import train_tokenizer
from lowrank_kit.device import resolve_device
from lowrank_kit.errors import UsageError, did_you_mean
from lowrank_kit.evaluation.cloze import make_cloze, write_cloze_task
from lowrank_kit.evaluation.run import EvalSettings, score, sizes
from lowrank_kit.report.environment import environment
from lowrank_kit.report.files import new_folder, write_csv, write_json, write_png, write_text
from lowrank_kit.report.plots import decay_bands_plot, pareto_plot
from lowrank_kit.report.tables import markdown_table
from lowrank_kit.spectra.measure import Spectra, measure
from lowrank_kit.training.run import train
from lowrank_kit.training.settings import RECIPES, TrainSettings

logger = logging.getLogger(__name__)

TASK = "stdlib_cloze"
KEEPS = (0.8, 0.6, 0.4, 0.2)
# Each with its defaults, as `lowrank train --optimizer` has them.
OPTIMIZERS = ("adamw", "muon", "numuon")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a quickstart is.

    Args:
        shape: of the Llama, as config.json has it.
        vocab_size: of its tokenizer.
        steps: of each training.
        batch_size: sequences in a step.
        block_tokens: tokens in a sequence.
        max_bytes: text taken from the standard library.
        calibration_blocks: sequences of calibration text.
        eval_blocks: held-out sequences scored.
        questions: of the cloze task.
    """

    shape: dict[str, int]
    vocab_size: int
    steps: int
    batch_size: int
    block_tokens: int
    max_bytes: int
    calibration_blocks: int
    eval_blocks: int
    questions: int


SIZES = {
    "small": Size(
        shape={"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 4},
        vocab_size=1024,
        steps=400,
        batch_size=8,
        block_tokens=128,
        max_bytes=4_000_000,
        calibration_blocks=256,
        eval_blocks=256,
        questions=200,
    ),
    "tiny": Size(
        shape={"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 2},
        vocab_size=512,
        steps=60,
        batch_size=8,
        block_tokens=128,
        max_bytes=1_000_000,
        calibration_blocks=64,
        eval_blocks=64,
        questions=40,
    ),
}


def quickstart(output: Path, *, size: str = "small", seed: int = 0) -> dict[str, Any]:
    """Train a Llama with AdamW, Muon and NuMuon on the same text, compress each to four sizes, score all of them.

    Args:
        output: folder to make, with the models, results.json, results.csv, README.md and pictures.
        size: small (under five minutes on two cores) or tiny (under one).
        seed: of weights, order of the text, calibration and questions.

    Returns:
        The contents of results.json: one row per model.

    Raises:
        UsageError: an unknown size, or an output that is not empty.
    """
    if size not in SIZES:
        raise UsageError(f'unknown size "{size}"', hint=did_you_mean(size, SIZES))
    chosen = SIZES[size]
    started = time.perf_counter()
    with new_folder(output) as folder:
        corpus = load_corpus(max_bytes=chosen.max_bytes)
        _prepare(folder, chosen, corpus, seed)
        rows: list[dict[str, Any]] = []
        spectra: dict[str, Spectra] = {}
        for optimizer in OPTIMIZERS:
            logger.info("%s: train %d steps", optimizer, chosen.steps)
            train(_train_settings(folder, chosen, optimizer, seed), folder / optimizer)
            spectra[optimizer] = measure(Checkpoint.open(folder / optimizer), progress=False)
            logger.info("%s: compress and score", optimizer)
            for keep, model in _compressed(folder, chosen, optimizer, seed):
                found = _score(model, folder, chosen, corpus, seed)
                effective = spectra[optimizer].overall().effective_rank_share if keep is None else None
                rows.append({"optimizer": optimizer, "keep": keep, **found, "effective_rank_share": effective})
        document = {
            "size": size,
            "seed": seed,
            "models": rows,
            "settings": {"recipes": {name: RECIPES[name] for name in OPTIMIZERS}, **_plain(chosen)},
            "corpus_sha256": corpus.sha256,
            "seconds": round(time.perf_counter() - started, 1),
            "environment": environment(),
        }
        _write(folder, document, spectra)
    return document


def _prepare(folder: Path, size: Size, corpus: Corpus, seed: int) -> None:
    """Tokenizer, model config and task: what the three models share."""
    tokenizer = train_tokenizer(
        (d.text for d in corpus.train), vocab_size=size.vocab_size, model_max_length=size.block_tokens
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    config = {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "max_position_embeddings": size.block_tokens,
        **size.shape,
    }
    write_text(folder / "model-config.json", json.dumps(config, indent=1) + "\n")
    # Two characters to a token at the least: question and choice then mostly fit into the model's context.
    rows = make_cloze(corpus.heldout, num_items=size.questions, seed=seed, context_chars=size.block_tokens * 5 // 4)
    write_cloze_task(folder / "task", rows, TASK)


def _train_settings(folder: Path, size: Size, optimizer: str, seed: int) -> TrainSettings:
    return TrainSettings(
        model_config=str(folder / "model-config.json"),
        tokenizer=str(folder / "tokenizer"),
        optimizer=optimizer,
        steps=size.steps,
        batch_size=size.batch_size,
        block_tokens=size.block_tokens,
        max_bytes=size.max_bytes,
        eval_blocks=size.eval_blocks,
        seed=seed,
    )


def _compressed(folder: Path, size: Size, optimizer: str, seed: int) -> Iterator[tuple[float | None, Path]]:
    """The dense model, then the same at each keep; calibrated once."""
    dense = folder / optimizer
    yield None, dense
    calibration = None
    for keep in KEEPS:
        settings = CompressSettings(
            keep=keep,
            objective="whiten",
            calibration_blocks=size.calibration_blocks,
            block_tokens=size.block_tokens,
            batch_size=2 * size.batch_size,
            max_bytes=size.max_bytes,
            seed=seed,
        )
        if calibration is None:
            calibration = calibrate(Checkpoint.open(dense), settings)
        output = folder / f"{optimizer}-keep-{keep:g}"
        compress(dense, output, settings, calibration=calibration)
        yield keep, output


def _score(path: Path, folder: Path, size: Size, corpus: Corpus, seed: int) -> dict[str, Any]:
    settings = EvalSettings(
        part="heldout",
        blocks=size.eval_blocks,
        block_tokens=size.block_tokens,
        batch_size=2 * size.batch_size,
        tasks=(TASK,),
        include_path=str(folder / "task"),
        seed=seed,
    )
    checkpoint = Checkpoint.open(path)
    model = load_model(checkpoint, device=resolve_device())
    found = score(model, load_tokenizer(path), corpus.heldout, settings)
    accuracy = next(result for result in found.pop("tasks") if result["metric"] == "acc")
    return {
        **sizes(checkpoint),
        **found,
        "accuracy": accuracy["value"],
        "accuracy_stderr": accuracy["stderr"],
    }


def _plain(size: Size) -> dict[str, Any]:
    return {name: getattr(size, name) for name in Size.__dataclass_fields__}


def table_rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per optimizer and size, as the README shows it."""
    return [
        {
            "optimizer": row["optimizer"],
            "keep": "dense" if row["keep"] is None else f"{row['keep']:g}",
            "parameters": row["parameters"],
            "perplexity": row["perplexity"],
            "bits/byte": row["bits_per_byte"],
            "cloze accuracy": f"{row['accuracy']:.3f} ±{row['accuracy_stderr']:.3f}",
            "effective rank": row["effective_rank_share"],
        }
        for row in document["models"]
    ]


def perplexity_rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per optimizer: perplexity dense and at each keep, and the effective rank."""
    rows = []
    for optimizer in dict.fromkeys(row["optimizer"] for row in document["models"]):
        here = [row for row in document["models"] if row["optimizer"] == optimizer]
        by_keep = {"dense" if r["keep"] is None else f"keep {r['keep']:g}": r["perplexity"] for r in here}
        rows.append({"optimizer": optimizer, **by_keep, "effective rank": here[0]["effective_rank_share"]})
    return rows


def _write(folder: Path, document: dict[str, Any], spectra: dict[str, Spectra]) -> None:
    write_json(folder / "results.json", document)
    write_csv(folder / "results.csv", document["models"])
    write_text(folder / "README.md", _readme(document))
    series = {
        optimizer: [
            (row["parameters"] / 1e6, row["perplexity"], "dense" if row["keep"] is None else f"{row['keep']:g}")
            for row in document["models"]
            if row["optimizer"] == optimizer
        ]
        for optimizer in spectra
    }
    figure = pareto_plot(
        series,
        x_label="parameters kept (millions)",
        y_label="held-out perplexity (log)",
        title="Perplexity against parameters kept",
        log_y=True,
    )
    write_png(folder / "perplexity.png", figure)
    models = {name: _by_role(found) for name, found in spectra.items()}
    write_png(folder / "spectra.png", decay_bands_plot(models, "Singular values of the dense models"))


def _by_role(spectra: Spectra) -> dict[str, list[Any]]:
    roles: dict[str, list[Any]] = {}
    for row in spectra.rows:
        roles.setdefault(row.role, []).append(row.singular_values)
    return roles


def _readme(document: dict[str, Any]) -> str:
    versions = document["environment"]
    machine = f"{versions['cpus']} cores ({versions['processor']}), Python {versions['python']}"
    software = ", ".join(f"{name} {versions[name]}" for name in ("lowrank-kit", "torch", "transformers"))
    scored, size = document["models"], document["settings"]
    return f"""# lowrank-kit quickstart

The same Llama, text and number of steps with three optimizers; each compressed with `whiten` to four sizes.
Held-out perplexity over {scored[0]["tokens"]:,} tokens of the standard library's own sources:

{markdown_table(perplexity_rows(document))}

![Perplexity against parameters kept](perplexity.png)

All models, with bits per byte and accuracy in a four-choice cloze task made of the held-out text (chance is 0.25):

{markdown_table(table_rows(document))}

Effective rank is the mean over matrices of exp(entropy of the normalized singular values) / min(m, n).

![Singular values](spectra.png)

Made in {document["seconds"]:.0f} s on {machine}, with {software}, seed {document["seed"]}.
The models are beside this file: `lowrank eval numuon numuon-keep-0.4 --block-tokens {size["block_tokens"]}`.
"""
