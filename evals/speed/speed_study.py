"""Speed and memory of dense models beside their compressed forms, by what `lowrank bench` calls, and times of loading.

Dense and compressed models have random weights; ranks are those that `lowrank compress` plans. Steps are timed: run
them one by one (--jobs 1), with nothing beside them.
"""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from experiments import Place, Step
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.quantizer import LowRankConfig
from lowrank_kit.compression.plan import make_plan
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.device import DTYPES
from lowrank_kit.evaluation.bench import BenchSettings, bench, flat_rows
from lowrank_kit.layers import exchange
from lowrank_kit.report.tables import amount, markdown_table
from lowrank_kit.training.presets import model_config

TITLE = "Speed of dense and compressed models"


def steps(settings: Mapping[str, Any]) -> list[Step]:
    """The models of each preset and how fast they load; each run, batch size by batch size; the command's own start."""
    made = [Step("start", start)]
    for preset in settings["presets"]:
        made.append(Step(f"models-{preset}", partial(make_models, preset)))
        made.append(Step(f"load-{preset}", partial(load, preset), (f"models-{preset}",)))
    for number, run in enumerate(settings["runs"]):
        preset = run["preset"]
        made += [
            Step(f"{preset}-{number}-batch-{batch}", partial(measure, run, batch), (f"models-{preset}",))
            for batch in run["batches"]
        ]
    return made


def make_models(preset: str, place: Place) -> dict[str, Any]:
    """The dense model, and its compressed forms."""
    settings, folder = place.settings, place.work / preset
    shutil.rmtree(folder, ignore_errors=True)
    context = max(run["prompt"] + run["new_tokens"] for run in settings["runs"])
    config = model_config(preset, vocab_size=settings["vocabulary"], context=context)
    config.update(settings["presets"][preset])

    def random_model() -> Any:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[settings["dtype"]])

    random_model().save_pretrained(folder / "dense")
    for form in settings["forms"]:
        chosen = CompressSettings(keep=settings["keep"], objective="plain", form=form)
        planned = make_plan(Checkpoint.open(folder / "dense"), chosen).quantization_config()
        model = random_model()
        for name, entry in planned.items():
            exchange(model, name, entry["rank"], entry["form"])
        model.config.quantization_config = LowRankConfig(planned)
        model.save_pretrained(folder / form)
    return {"parameters": sum(parameter.numel() for parameter in random_model().parameters())}


def load(preset: str, place: Place) -> dict[str, Any]:
    """Seconds of `from_pretrained`, and until a first token, which reads what is mapped; the forms in turns.

    With the files in the system's cache of pages, and with none of them there, as after a start of the machine.
    """
    forms = [place.work / preset / form for form in ("dense", *place.settings["forms"])]
    found: dict[str, list[list[float]]] = {f"{form.name}, {cache}": [] for cache in CACHES for form in forms}
    for _ in range(1 + place.settings["loads"]):
        for cache, prepare in CACHES.items():
            for form in forms:
                prepare(form)
                found[f"{form.name}, {cache}"].append(_load(form, place.settings))
    return {"loads": {name: seconds[1:] for name, seconds in found.items()}}


def _load(folder: Path, settings: Mapping[str, Any]) -> list[float]:
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPES[settings["dtype"]], device_map=settings["device"], trust_remote_code=False
    )
    loaded = time.perf_counter() - started
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device)).logits.argmax().item()
    return [loaded, time.perf_counter() - started]


def _forget(folder: Path) -> None:
    """Have the system forget the pages of files that nothing maps."""
    gc.collect()
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _remember(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.read_bytes()


CACHES = {"cached": _remember, "from disk": _forget}


def start(place: Place) -> dict[str, Any]:
    """Seconds of `lowrank --help`, as a process of its own."""
    command = [sys.executable, "-m", "lowrank_kit.cli.main", "--help"]
    seconds = []
    for _ in range(1 + place.settings["loads"]):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    return {"help": seconds[1:]}


def measure(run: Mapping[str, Any], batch: int, place: Place) -> dict[str, Any]:
    """One batch size of a run, all models in turns."""
    own = ("prompt", "new_tokens", "rounds", "compile", "threads")
    chosen = BenchSettings(**{name: run[name] for name in own if name in run}, batches=(batch,))
    models = [str(place.work / run["preset"] / name) for name in ("dense", *place.settings["forms"])]
    found = bench(models, chosen, device=place.settings["device"], dtype=place.settings["dtype"])
    return found | {"models": [model | {"model": model["label"]} for model in found["models"]]}  # wherever they lay


def results(settings: Mapping[str, Any], done: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """A row for each preset, model, number of threads, batch size and mode, and all that was measured."""
    measured = {name: found for name, found in done.items() if "rows" in found}
    rows = [{"preset": name.partition("-")[0]} | row for name, found in measured.items() for row in flat_rows(found)]
    loads = {preset: done[f"load-{preset}"]["loads"] for preset in settings["presets"]}
    return {"rows": rows, "measured": measured, "loads": loads, "help": done["start"]["help"]}


def tables(document: Mapping[str, Any]) -> str:
    """Compressed over dense, median (least to largest); seconds of loading and of `lowrank --help`."""
    loads = [
        {"what": f"{preset}, {form}: {what}", "seconds": _spread([one[index] for one in seconds])}
        for preset, forms in document["loads"].items()
        for index, what in enumerate(("from_pretrained", "to a first token"))
        for form, seconds in forms.items()
    ]
    starts = [{"what": "lowrank --help", "seconds": _spread(document["help"])}]
    return markdown_table([_shown(row) for row in document["rows"]]) + "\n\n" + markdown_table([*loads, *starts])


def _spread(seconds: list[float]) -> str:
    return f"{median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


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
