"""Results of every verb that `lowrank report` shows, real and small."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

from cli.main import run
from tests.process import same_process

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
# A name that is no HTML.
DENSE = "model <b>&"
EXPERIMENT = {
    "schema": "lowrank-experiment/1",
    "name": "study",
    "form": "small",
    "title": "Loss <against> bytes",
    "environment": {"commit": "c0ffee"},
    "settings": {"steps": 3},
    "seeds": [0, 1],
    "data": {"text.txt": "5eed"},
    "wall_seconds": 120.0,
    "rows": [
        {"curve": "adamw", "seed": 0, "bytes": 9_000, "loss": 4.25, "note": "tenth"},
        {"curve": "adamw", "seed": 1, "bytes": 100_000, "loss": 4.125, "note": None},
        {"curve": "numuon <i>", "seed": 0, "bytes": 1_000, "loss": None, "note": "ninth"},
        {"curve": "numuon <i>", "seed": 1, "bytes": 20_000, "loss": -4.5, "note": "first"},
    ],
    "front": {"x": "bytes", "y": "loss", "group": "curve"},
}


def make_results(top: Path) -> Path:
    """Fill a new folder `results` below `top`, in it what each verb wrote."""
    folder = top / "results"
    folder.mkdir()
    (top / "config.json").write_text(json.dumps(CONFIG))
    text = "".join(f"line {i} of a text with {i * i} words and {i % 7} verbs\n" for i in range(1200))
    (top / "text.txt").write_text(text)
    model, source = str(folder / DENSE), ["--text", str(top / "text.txt")]
    blocks = ["--block-tokens", "16", "--batch-size", "4"]
    shape = ["--model-config", str(top / "config.json"), "--vocab-size", "260"]
    every = ["--log-every", "1", "--spectra-every", "1", "--eval-every", "6", "--eval-blocks", "4"]
    long = ["--block-tokens", "128", "--batch-size", "32"]  # enough work for the ranks to be a hundredth of it
    _call("train", *shape, *source, *long, *every, "--steps", "18", "-o", model)
    for keep, objective in (("0.8", "plain"), ("0.5", "whiten")):
        wanted = ["--keep", keep, "--objective", objective, "--calibration-blocks", "4", "--check-blocks", "2"]
        _call("compress", model, *wanted, *source, *blocks, "-o", str(folder / f"keep-{keep}"))
    _call("analyze", model, "--against", str(folder / "keep-0.5"), "-o", str(folder / "against"))
    models = [model, str(folder / "keep-0.8"), str(folder / "keep-0.5")]
    scored = _call("eval", *models, "--blocks", "8", *blocks, "--reference", model, "--json")
    (folder / "eval.json").write_text(scored)
    few = ["--prompt", "4", "--new-tokens", "2", "--batch", "1,2", "--rounds", "2"]
    (folder / "bench.json").write_text(_call("bench", *models, *few, "--json"))
    sizes = ["--widths", "32,64", "--depths", "1", "--steps", "2"]
    _call("scale", "check", *sizes, *source, "-o", str(folder / "check"))
    sweep = ["--widths", "64", "--lrs", "-8:-5", "--seeds", "1", "--steps", "3", "--control-seeds", "0"]
    _call("scale", "sweep", *shape, *sweep, "--optimizer", "adamw", *source, *blocks, "-o", str(folder / "sweep"))
    (folder / "study").mkdir()
    (folder / "study" / "results.json").write_text(json.dumps(EXPERIMENT))
    return folder


def _call(*words: str) -> str:
    """What a verb prints; checks of so few steps may fail."""
    printed = io.StringIO()
    told = io.StringIO()
    with same_process(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(told):
        code = run([*words, "-q"])
    assert code in ((0, 4) if words[0] == "scale" else (0,)), told.getvalue()
    return printed.getvalue()
