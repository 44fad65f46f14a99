"""Speed and memory of dense models beside their compressed forms, by `lowrank bench`.

    python evals/speed/measure.py run                # small: two CPU cores, ten minutes
    python evals/speed/measure.py run --form full    # one GPU
    python evals/speed/measure.py table              # README's table

The models have random weights, compressed with `plain`. Every batch size of a run of config.yaml is stored when it is
done, in results-DEVICE.json; what is there with the same settings is not repeated, unless --again names its number.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM

from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.device import DTYPES, resolve_device
from lowrank_kit.errors import UsageError
from lowrank_kit.evaluation.bench import BenchSettings, bench
from lowrank_kit.report.environment import environment
from lowrank_kit.report.files import write_json
from lowrank_kit.report.tables import amount, markdown_table
from lowrank_kit.training.presets import model_config

HERE = Path(__file__).parent


def main() -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["run", "table"])
    parser.add_argument("--form", choices=["small", "full"], default="small")
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    parser.add_argument("--models", type=Path, help="folder that keeps the models for the next time")
    parser.add_argument("--again", type=int, action="append", default=[], help="number of what to repeat, from 0")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("lowrank_kit.evaluation").setLevel(logging.INFO)  # which model, batch and mode
    config = yaml.safe_load(arguments.config.read_text())[arguments.form]
    results = arguments.output / f"results-{config['device']}.json"
    found: list[dict[str, Any]] = json.loads(results.read_text())["runs"] if results.exists() else []
    if arguments.stage == "run":
        try:
            resolve_device(config["device"])  # before any work
        except UsageError as error:
            raise SystemExit(f"error: {error}") from None
        run_missing(config, found, results, arguments.again, arguments.models)
    print(markdown_table(list(rows(found))))


def run_missing(
    config: dict[str, Any], found: list[dict[str, Any]], results: Path, again: list[int], models: Path | None
) -> None:
    """Measure what is not there, each batch size stored when it is done."""
    common = {key: value for key, value in config.items() if key not in ("runs", "presets")}
    wanted = [
        {**common, "preset": preset, **run, "batches": [batch]}
        for preset in config["presets"]
        for run in config["runs"]
        for batch in run["batches"]
    ]
    repeated = [wanted[number] for number in again]
    kept = {json.dumps(run["config"]): run for run in found if run["config"] not in repeated}
    with tempfile.TemporaryDirectory() as scratch:
        for run in wanted:
            key = json.dumps(run)
            if key not in kept:
                started = time.perf_counter()
                measured = measure(run, (models or Path(scratch)) / run["preset"])
                kept[key] = {"config": run, "seconds": time.perf_counter() - started, **measured}
            found[:] = [kept[key] for key in map(json.dumps, wanted) if key in kept]
            write_json(results, {"runs": found})


def measure(run: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One run: the dense model and its compressed forms, made if they are not there, in turns."""
    own = ("prompt", "new_tokens", "batches", "rounds", "compile", "threads")
    settings = BenchSettings(**{name: run[name] for name in own if name in run} | {"batches": tuple(run["batches"])})
    models = make_models(run, folder)
    return bench(models, settings, device=run["device"], dtype=run["dtype"]) | {"environment": environment()}


def make_models(run: dict[str, Any], folder: Path) -> list[str]:
    """Folders of the dense model and of its compressed forms."""
    dense = folder / "dense"
    if not all((folder / name).exists() for name in ("dense", *run["forms"])):
        shutil.rmtree(folder, ignore_errors=True)
        torch.manual_seed(0)
        context = run["prompt"] + run["new_tokens"]
        config = model_config(run["preset"], vocab_size=run["vocabulary"], context=context)
        AutoModelForCausalLM.from_config(config, dtype=DTYPES[run["dtype"]]).save_pretrained(dense)
        for form in run["forms"]:
            compress(dense, folder / form, CompressSettings(keep=run["keep"], objective="plain", form=form))
    return [str(dense), *(str(folder / form) for form in run["forms"])]


def rows(found: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The table: model x threads x batch x mode."""
    for run in found:
        models = {model["label"]: model for model in run["models"]}
        for row in run["rows"]:
            model = models[row["model"]]
            shown = {"preset": run["config"]["preset"], "model": row["model"], "threads": run["threads"]}
            shown |= {"batch": row["batch"], "mode": row["mode"]}
            for phase in ("prefill", "decode"):
                shown[f"{phase}, tokens/s"] = row[phase] and round(row[phase]["tokens_per_s"]["median"])
                shown[f"{phase}, over dense"] = row[phase] and ratio(row[phase]["ratio"])
                shown[f"{phase}, FLOPs"] = f"{model['flop_ratio'][phase]:.2f}"
            shown["bytes"] = f"{model['byte_ratio']:.2f}"
            shown["memory"] = row["peak_bytes"] and amount(row["peak_bytes"])
            yield shown


def ratio(spread: dict[str, float] | None) -> str | None:
    """Median (least to largest)."""
    return None if spread is None else f"{spread['median']:.2f} ({spread['min']:.2f} to {spread['max']:.2f})"


if __name__ == "__main__":
    main()
