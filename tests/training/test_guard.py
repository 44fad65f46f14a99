"""A run stops at the first number that is not finite, and names the checkpoint that it can go on from."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lowrank_kit.errors import NonFiniteError
from lowrank_kit.training.run import train
from lowrank_kit.training.settings import TrainSettings

Make = Callable[..., TrainSettings]


def failure(settings: TrainSettings, output: Path, **given: Any) -> NonFiniteError:
    with pytest.raises(NonFiniteError) as raised:
        train(settings, output, device="cpu", **given)
    assert json.loads((output / "run.json").read_text())["finished"] is False
    assert not list(output.glob("*.safetensors"))
    return raised.value


def logged(output: Path) -> list[int]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(number) for line in lines for number in line.values() if number is not None)
    return [line["step"] for line in lines if "loss" in line]


def poisoned(model: Path, tiny_llama_folder: Path, text: str) -> str:
    """A model whose embedding of the first token of `text` is NaN."""
    shutil.copytree(tiny_llama_folder, model)
    token = AutoTokenizer.from_pretrained(model)(text)["input_ids"][0]
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = math.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return str(model)


def rare_word(tmp_path: Path) -> str:
    """Text with one page that holds the only "§" of it."""
    pages = [{"text": f"The boy sang on road {number} and the miller heard him. " * 3} for number in range(60)]
    pages[7]["text"] = "§" + pages[7]["text"]
    (tmp_path / "rare.jsonl").write_text("".join(json.dumps(page) + "\n" for page in pages))
    return str(tmp_path / "rare.jsonl")


@pytest.mark.parametrize(
    "changes",
    [{}, {"bf16": True}, {"batch_size": 1, "accumulate": 4}, {"optimizer": "adamw", "clip": 0.0}],
    ids=["plain", "bf16", "accumulate", "adamw"],
)
def test_a_poisoned_row_stops_the_step_it_is_met_in(
    changes: dict[str, Any], settings_for: Make, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    model = poisoned(tmp_path / "model", tiny_llama_folder, "§")
    given = {"model": model, "text": rare_word(tmp_path), "batch_size": 4, "accumulate": 1, "steps": 100, "lr": 1e-4}
    settings = settings_for(**given | {"log_every": 50, "save_every": 1, **changes})
    error = failure(settings, tmp_path / "run")
    step = int(re.search(r"^the loss is not finite at step (\d+) \(nan\); no step was made of it; ", str(error))[1])  # type: ignore[index]
    # Found at once, not when the loss is logged.
    assert 2 < step < 50
    checkpoints = tmp_path / "run" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {f"checkpoint-{step - 1}", f"checkpoint-{step}"}
    assert error.message.endswith(f"; the last good checkpoint is {checkpoints / f'checkpoint-{step - 1}'}")
    assert error.exit_code == 1
    # What it says next is true: without the checkpoint that gave it, the run resumes, and here stops there again.
    remove, _, resume = str(error.hint).partition(" && ")
    assert resume.startswith(f"lowrank train --resume -o {tmp_path / 'run'}; should it stop there again")
    shutil.rmtree(shlex.split(remove)[-1])
    assert f"is not finite at step {step} (nan)" in str(failure(settings, tmp_path / "run", resume=True))


def test_what_is_logged_up_to_it(settings_for: Make, tmp_path: Path) -> None:
    error = failure(settings_for(lr=1e30, warmup=0.0, save_every=100), tmp_path / "run")
    step = int(re.search(r"at step (\d+)", str(error))[1])  # type: ignore[index]
    assert logged(tmp_path / "run") == list(range(1, step + 1))
    assert error.message.endswith("; there is no good checkpoint")
    assert str(error.hint).startswith("lower the learning rate")


def test_a_checkpoint_some_steps_before(settings_for: Make, tiny_llama_folder: Path, tmp_path: Path) -> None:
    model = poisoned(tmp_path / "model", tiny_llama_folder, "§")
    settings = settings_for(model=model, text=rare_word(tmp_path), steps=100, lr=1e-4, save_every=2, batch_size=1)
    error = failure(settings, tmp_path / "run")
    step = int(re.search(r"at step (\d+)", str(error))[1])  # type: ignore[index]
    good = (step - 1) // 2 * 2
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoints' / f'checkpoint-{good}'}" in error.message
    assert str(error.hint).startswith("lowrank train --resume") == (step % 2 == 1)
    assert logged(tmp_path / "run") == list(range(1, step + 1))


def test_a_validation_that_is_not_finite(settings_for: Make, tiny_llama_folder: Path, tmp_path: Path) -> None:
    model = poisoned(tmp_path / "model", tiny_llama_folder, "e")
    error = failure(settings_for(model=model), tmp_path / "run")
    assert error.message.startswith("the validation loss is not finite at step 0 (nan)")
    assert (tmp_path / "run" / "log.jsonl").read_text() == ""
