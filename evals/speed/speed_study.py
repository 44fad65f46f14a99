"""Speed and memory of dense models beside their compressed forms, by what `lowrank bench` calls.

The models have random weights, compressed with `plain`. Steps are timed: run them one by one (--jobs 1), with nothing
beside them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from experiments import Place, Step
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM

from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.device import DTYPES
from lowrank_kit.evaluation.bench import BenchSettings, bench, flat_rows
from lowrank_kit.report.tables import amount, markdown_table
from lowrank_kit.training.presets import model_config

TITLE = "Speed of dense and compressed models"


def steps(settings: Mapping[str, Any]) -> list[Step]:
    """The models of each preset; then each run, batch size by batch size."""
    made = []
    for preset in settings["presets"]:
        made.append(Step(f"models-{preset}", partial(make_models, preset)))
        for number, run in enumerate(settings["runs"]):
            made += [
                Step(f"{preset}-{number}-batch-{batch}", partial(measure, preset, run, batch), (f"models-{preset}",))
                for batch in run["batches"]
            ]
    return made


def make_models(preset: str, place: Place) -> dict[str, Any]:
    """The dense model, and its compressed forms."""
    settings, folder = place.settings, place.work / preset
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    context = max(run["prompt"] + run["new_tokens"] for run in settings["runs"])
    config = model_config(preset, vocab_size=settings["vocabulary"], context=context)
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[settings["dtype"]])
    model.save_pretrained(folder / "dense")
    for form in settings["forms"]:
        chosen = CompressSettings(keep=settings["keep"], objective="plain", form=form)
        compress(folder / "dense", folder / form, chosen)
    return {"parameters": sum(parameter.numel() for parameter in model.parameters())}


def measure(preset: str, run: Mapping[str, Any], batch: int, place: Place) -> dict[str, Any]:
    """One batch size of a run, all models in turns."""
    own = ("prompt", "new_tokens", "rounds", "compile", "threads")
    chosen = BenchSettings(**{name: run[name] for name in own if name in run}, batches=(batch,))
    models = [str(place.work / preset / name) for name in ("dense", *place.settings["forms"])]
    found = bench(models, chosen, device=place.settings["device"], dtype=place.settings["dtype"])
    return found | {"models": [model | {"model": model["label"]} for model in found["models"]]}  # wherever they lay


def results(settings: Mapping[str, Any], done: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """A row for each preset, model, number of threads, batch size and mode, and all that was measured."""
    measured = {name: found for name, found in done.items() if "rows" in found}
    rows = [{"preset": name.partition("-")[0]} | row for name, found in measured.items() for row in flat_rows(found)]
    return {"rows": rows, "measured": measured}


def tables(document: Mapping[str, Any]) -> str:
    """Compressed over dense, median (least to largest)."""
    return markdown_table([_shown(row) for row in document["rows"]])


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {key: row[key] for key in ("preset", "model", "threads", "batch", "mode")}
    for phase in ("prefill", "decode"):
        speed = row[f"{phase} tokens/s"]
        shown[f"{phase}, tokens/s"] = None if speed is None else f"{speed:.0f}"
        if row["model"] != "dense" and row[f"{phase} over first"] is not None:
            least, most = row[f"{phase} least"], row[f"{phase} largest"]
            shown[f"{phase}, over dense"] = f"{row[f'{phase} over first']:.2f} ({least:.2f} to {most:.2f})"
        else:
            shown[f"{phase}, over dense"] = None
        shown[f"{phase}, 1 / FLOPs"] = f"{1 / row[f'{phase} FLOPs']:.2f}"
    return shown | {"memory": None if row["peak bytes"] is None else amount(row["peak bytes"])}


def pictures(document: Mapping[str, Any]) -> dict[str, Figure]:
    """None."""
    return {}
