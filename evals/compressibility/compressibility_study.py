"""One model, text and number of steps by AdamW, Muon and NuMuon, with spectral decay and without, then folded."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from experiments import Place, Step, mean_and_spread, terminated_at
from matplotlib.figure import Figure

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.loading import load_model, load_tokenizer
from lowrank_kit.compression.calibration import Calibration, calibrate
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.config import load_settings
from lowrank_kit.data.blocks import TokenBlocks, token_blocks
from lowrank_kit.data.corpus import load_corpus
from lowrank_kit.data.sources import Document, read_source
from lowrank_kit.data.tokenizer import train_tokenizer
from lowrank_kit.device import resolve_device
from lowrank_kit.evaluation.divergence import divergence
from lowrank_kit.evaluation.harness import run_tasks
from lowrank_kit.evaluation.perplexity import perplexity
from lowrank_kit.evaluation.run import sizes
from lowrank_kit.report.plots import pareto_plot
from lowrank_kit.report.tables import markdown_table
from lowrank_kit.spectra.measure import measure
from lowrank_kit.training.run import train
from lowrank_kit.training.settings import TrainSettings

TITLE = "Which optimizer's models fold"
TASKS = Path(__file__).parents[1] / "tasks"
DENSE = "dense"
CORPORA = ("domain", "wikitext", "code")


def steps(settings: Mapping[str, Any]) -> list[Step]:
    """Tokenizer and config; then, seed by seed, each model trained, scored, and folded by each method."""
    made = [Step("prepare", prepare)]
    for seed in settings["seeds"]:
        for optimizer in settings["optimizers"]:
            model = model_name(optimizer, seed)
            made.append(Step(f"train-{model}", partial(train_model, optimizer, seed), ("prepare",)))
            made.append(Step(f"{model}-{DENSE}", partial(score_dense, optimizer, seed), (f"train-{model}",)))
            made += [
                Step(f"{model}-{method}", partial(fold, optimizer, seed, method), (f"train-{model}",))
                for method in settings["methods"]
            ]
    return made


def prepare(place: Place) -> dict[str, Any]:
    """A tokenizer of the training text, and the config."""
    corpus = load_corpus(str(place.data["train"]), max_bytes=place.settings["tokenizer_bytes"])
    length = place.settings["train"]["block_tokens"]
    tokenizer = train_tokenizer((document.text for document in corpus.train), place.settings["vocab_size"], length)
    tokenizer.save_pretrained(place.work / "tokenizer")
    if isinstance(place.settings["model"], Mapping):
        (place.work / "model.json").write_text(json.dumps(place.settings["model"]))
    return {"vocabulary": len(tokenizer), "sha256": corpus.sha256}


def train_model(optimizer: str, seed: int, place: Place) -> dict[str, Any]:
    """Train one, or go on with it."""
    folder, model = place.work / model_name(optimizer, seed), place.settings["model"]
    given: dict[str, Any] = {
        "model_config": model if isinstance(model, str) else str(place.work / "model.json"),
        "text": str(place.data["train"]),
        "tokenizer": str(place.work / "tokenizer"),
        "seed": seed,
    }
    given |= {**place.settings["train"], **place.settings["optimizers"][optimizer]}
    resume = given.get("save_every", 0) > 0 and (folder / "checkpoints").exists()
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    with terminated_at(place.deadline):
        record = train(load_settings(TrainSettings, None, given), folder, resume=resume)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    spectra = measure(Checkpoint.open(folder), progress=False)
    return {
        "validation_loss": record["validation_loss"],
        "losses": [[line["step"], line["loss"]] for line in log if "loss" in line],
        "effective_ranks": [_rank(line) for line in log if "effective_rank" in line],
        "effective_rank_share": spectra.overall().effective_rank_share,
    }


def _rank(line: Mapping[str, Any]) -> dict[str, Any]:
    """Of a line of the log: the mean over roles."""
    share, _ = mean_and_spread(list(line["effective_rank"].values()))
    return {"step": line["step"], "share": round(share, 4), **line["effective_rank"]}


def score_dense(optimizer: str, seed: int, place: Place) -> dict[str, Any]:
    """A trained model, dense."""
    return {"scores": [{"keep": 1.0, **_score(place.work / model_name(optimizer, seed), place, tasks=True)}]}


def fold(optimizer: str, seed: int, method: str, place: Place) -> dict[str, Any]:
    """A trained model, compressed by one method to every keep; what is compressed is not kept."""
    dense = place.work / model_name(optimizer, seed)
    tasks, scores = place.settings["tasks"], []
    for keep in place.settings["keeps"]:
        output = place.work / f"{dense.name}-{method}-{keep:g}"
        shutil.rmtree(output, ignore_errors=True)
        # Each method pays for its own factorizations.
        known = replace(_calibrated(dense, seed, place), nested={}, seconds={})
        report = compress(dense, output, _settings(method, keep, seed, place), calibration=known)
        asked = method in tasks["methods"] and keep == tasks["keep"]
        scores.append({"keep": keep, **_score(output, place, tasks=asked, reference=dense), "report": _said(report)})
        shutil.rmtree(output)
    return {"scores": scores}


def _settings(method: str, keep: float, seed: int, place: Place) -> CompressSettings:
    text = {"text": str(place.data["train"]), "max_bytes": place.settings["train"]["max_bytes"]}
    given = {**place.settings["calibration"], **place.settings["methods"][method]}
    return CompressSettings(keep=keep, seed=seed, **text, **given)


def _said(report: Mapping[str, Any]) -> dict[str, Any]:
    return {"keep": report["totals"]["matrix_keep"], "seconds": report["seconds"]}


_KNOWN: dict[Path, Calibration] = {}


def _calibrated(dense: Path, seed: int, place: Place) -> Calibration:
    """With all that any of the methods reads; of the last model only."""
    if dense not in _KNOWN:
        _KNOWN.clear()
        chosen = [_settings(method, 0.5, seed, place) for method in place.settings["methods"]]
        curvature = any(one.needs_curvature for one in chosen)
        reads_most = max(chosen, key=lambda one: one.needs_refinement)
        _KNOWN[dense] = calibrate(Checkpoint.open(dense), reads_most, curvature=curvature)
    return _KNOWN[dense]


def _score(path: Path, place: Place, *, tasks: bool, reference: Path | None = None) -> dict[str, Any]:
    checkpoint, device = Checkpoint.open(path), resolve_device()
    model, tokenizer = load_model(checkpoint, device=device), load_tokenizer(path)
    found: dict[str, Any] = dict(sizes(checkpoint))
    batch_size = place.settings["eval"]["batch_size"]
    for corpus, blocks in _texts(place).items():
        scores = perplexity(model, blocks, batch_size=batch_size)
        found[corpus] = {"loss": scores.loss_nats, "bits_per_byte": scores.bits_per_byte, "sha256": scores.sha256}
    if reference is not None:
        dense = load_model(Checkpoint.open(reference), device=device)
        found["kl"] = divergence(model, dense, _texts(place)[CORPORA[0]], batch_size=batch_size).kl_nats
    if tasks:
        found["tasks"] = [
            asdict(one)
            for task, limit in place.settings["tasks"]["limits"].items()
            for one in run_tasks(model, tokenizer, [task], include_path=TASKS, limit=limit, batch_size=32)
            if one.task == task  # a group has scores of its parts, too
        ]
    return found


_TEXTS: dict[str, TokenBlocks] = {}


def _texts(place: Place) -> dict[str, TokenBlocks]:
    """What is scored: text that no model was trained on."""
    if not _TEXTS:
        tokenizer, asked = load_tokenizer(place.work / "tokenizer"), place.settings["eval"]
        for corpus in CORPORA:
            documents = _documents(corpus, place)
            _TEXTS[corpus] = token_blocks(documents, tokenizer, asked["block_tokens"], max_blocks=asked["blocks"])
    return _TEXTS


def _documents(corpus: str, place: Place) -> list[Document]:
    if corpus == "code":
        return list(load_corpus(None, max_bytes=8_000_000).heldout)
    return list(read_source(str(place.data[corpus])))


def results(settings: Mapping[str, Any], done: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """A row for each optimizer, method and keep: means over seeds, and what is beside rows."""
    rows = []
    for optimizer in settings["optimizers"]:
        for method in (DENSE, *settings["methods"]):
            of = [done[f"{model_name(optimizer, seed)}-{method}"]["scores"] for seed in settings["seeds"]]
            rows += [_row(optimizer, method, list(same)) for same in zip(*of, strict=True)]
    trained = {
        model_name(optimizer, seed): done[f"train-{model_name(optimizer, seed)}"]
        for optimizer in settings["optimizers"]
        for seed in settings["seeds"]
    }
    several = {"group": "optimizer", "picture": "method", "in_all": DENSE}
    front = {"x": "bytes", "y": "domain loss", **(several if len(settings["optimizers"]) > 1 else {"group": "method"})}
    return {"rows": rows, "front": front, "trained": trained}


def _row(optimizer: str, method: str, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"optimizer": optimizer, "method": method}
    row |= {key: seeds[0][key] for key in ("keep", "bytes", "parameters")}
    for corpus in CORPORA:
        mean, spread = mean_and_spread([one[corpus]["loss"] for one in seeds])
        row |= {f"{corpus} loss": round(mean, 5), f"{corpus} deviation": round(spread, 5)}
    if "kl" in seeds[0]:
        row["kl"] = round(mean_and_spread([one["kl"] for one in seeds])[0], 5)
    for same in zip(*(one.get("tasks", []) for one in seeds), strict=True):
        if same[0]["metric"] == "acc":
            # The documents are the same for all seeds: a mean over seeds has no smaller error from their choice.
            row[same[0]["task"]] = round(mean_and_spread([one["value"] for one in same])[0], 4)
            row[f"{same[0]['task']} stderr"] = round(mean_and_spread([one["stderr"] for one in same])[0], 4)
    return row


def tables(document: Mapping[str, Any]) -> str:
    """All of them, in Markdown."""
    parts = [f"Perplexity on {name}\n\n{markdown_table(_perplexities(document, key))}" for key, name in _NAMES.items()]
    parts.append(f"Divergence from the dense model, nats per token\n\n{markdown_table(_divergences(document))}")
    parts.append(f"Accuracy in tasks\n\n{markdown_table(_accuracies(document))}")
    parts.append(f"Effective rank of the matrices, as a share of the full\n\n{markdown_table(_ranks(document))}")
    return "\n\n".join(parts)


_NAMES = {"domain": "held-out text of the corpus", "wikitext": "WikiText-2", "code": "the standard library's sources"}


def _perplexities(document: Mapping[str, Any], corpus: str) -> list[dict[str, Any]]:
    rows = []
    for method in document["settings"]["methods"]:
        for optimizer in document["settings"]["optimizers"]:
            dense = _find(document, optimizer, DENSE)[0]
            row = {"method": method, "optimizer": optimizer, DENSE: _perplexity(dense, corpus)}
            here = _find(document, optimizer, method)
            rows.append(row | {f"keep {one['keep']:g}": _perplexity(one, corpus) for one in here})
    return rows


def _perplexity(row: Mapping[str, Any], corpus: str) -> str:
    return f"{math.exp(row[f'{corpus} loss']):.1f} ±{100 * row[f'{corpus} deviation']:.1f} %"


def _divergences(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"method": method, "optimizer": optimizer}
        | {f"keep {row['keep']:g}": f"{row['kl']:.3f}" for row in _find(document, optimizer, method)}
        for method in document["settings"]["methods"]
        for optimizer in document["settings"]["optimizers"]
    ]


def _accuracies(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = document["settings"]["tasks"]["limits"]
    rows = []
    for row in document["rows"]:
        if all(name in row for name in names):
            keep = row["method"] if row["method"] == DENSE else f"{row['method']}, keep {row['keep']:g}"
            scores = {name: f"{row[name]:.3f} ±{row[f'{name} stderr']:.3f}" for name in names}
            rows.append({"optimizer": row["optimizer"], "model": keep, **scores})
    return rows


def _ranks(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for optimizer in document["settings"]["optimizers"]:
        runs = [document["trained"][model_name(optimizer, seed)] for seed in document["settings"]["seeds"]]
        row: dict[str, Any] = {"optimizer": optimizer}
        for same in zip(*(run["effective_ranks"] for run in runs), strict=True):
            row[f"step {same[0]['step']}"] = round(mean_and_spread([one["share"] for one in same])[0], 3)
        end, spread = mean_and_spread([run["effective_rank_share"] for run in runs])
        rows.append(row | {"end": f"{end:.3f} ±{spread:.3f}"})
    return rows


def pictures(document: Mapping[str, Any]) -> dict[str, Figure]:
    """Loss against bytes, a picture for each method: one curve for each optimizer, and the front of all."""
    return {f"front-{method}": _front(document, method) for method in document["settings"]["methods"]}


def _front(document: Mapping[str, Any], method: str) -> Figure:
    series = {}
    for optimizer in document["settings"]["optimizers"]:
        dense, rows = _find(document, optimizer, DENSE), _find(document, optimizer, method)
        points = [(row["bytes"] / 1e6, row["domain loss"], f"{row['keep']:g}") for row in [*dense, *rows]]
        series[optimizer] = [(x, y, DENSE if keep == "1" else keep) for x, y, keep in points]
    return pareto_plot(series, x_label="MB", y_label="held-out loss, nats per token", title=f"{TITLE}: {method}")


def _find(document: Mapping[str, Any], optimizer: str, method: str) -> list[dict[str, Any]]:
    return [row for row in document["rows"] if (row["optimizer"], row["method"]) == (optimizer, method)]


def model_name(optimizer: str, seed: int) -> str:
    """As a folder: "AdamW, decay 2" and 0 are adamw-decay-2-0."""
    return "-".join([*re.findall(r"[a-z0-9.]+", optimizer.lower()), str(seed)])
