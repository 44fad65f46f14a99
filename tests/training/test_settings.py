"""Settings and model configs that make no sense are refused before anything is made."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.matrices import find_matrices
from lowrank_kit.training.presets import PRESETS, model_config
from lowrank_kit.training.settings import OPTIMIZERS, RECIPES, TrainSettings
from tests.families import FAMILIES

IDS = {"bos_token_id": 5, "eos_token_id": 6, "pad_token_id": 7}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "x"}, "exactly one of MODEL .* and --model-config"),
        ({"model_config": None}, "exactly one of MODEL .* and --model-config"),
        ({"tokens": 100}, "exactly one of --steps and --tokens"),
        ({"steps": None}, "exactly one of --steps and --tokens"),
        ({"optimizer": "numoun"}, 'unknown optimizer "numoun"\nhint: did you mean "numuon"?'),
        ({"lr_schedule": "cosin"}, 'unknown lr schedule "cosin"\nhint: did you mean "cosine"?'),
        ({"rank": "cosin:1:0.5"}, 'unknown rank schedule "cosin"'),
        ({"rank": "fixed:2"}, r"rank fraction must be in \(0, 1\], got 2"),
        ({"steps": 0}, "steps must be at least 1, got 0\nhint: --steps 1000"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"log_every": 0}, "log_every must be at least 1, got 0"),
        ({"block_tokens": 1}, "block_tokens must be at least 2, got 1"),
        ({"lr_schedule": "wsd", "warmup": 0.5, "decay_share": 0.6}, "above 0 and at most 0.5, what warmup leaves"),
        ({"lr_schedule": "wsd", "decay_share": 0.0}, "decay_share must be above 0 .* got 0\nhint: --decay-share 0.2"),
        ({"min_lr": 1.0}, "min_lr is a share of the peak, 0 <= min_lr < 1, got 1"),
        ({"min_lr": 0.1, "lr_schedule": "linear"}, 'for the lr schedules cosine and wsd, not for "linear"'),
        ({"spectra_every": -1}, "spectra_every must be at least 0, got -1"),
        ({"warmup": 1.0}, "0 <= warmup < 1, got 1"),
        ({"warmup": math.nan}, "0 <= warmup < 1, got nan"),
        ({"lr": 0.0}, "lr must be above 0, got 0\nhint: --lr "),
        ({"lr": math.nan}, "lr must be above 0, got nan"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"spectral_decay": -0.1}, "spectral_decay must be at least 0, got -0.1\nhint: --spectral-decay 0.4"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1\nhint: --momentum 0.95"),
        ({"packing": "document"}, 'unknown packing "document"\nhint: did you mean "documents"?'),
        ({"topk": "wram"}, 'unknown topk "wram"\nhint: did you mean "warm"?'),
        ({"overrides": ("*=adamw", "*.o_proj.*=lr=fast")}, r'PATTERN=KEY=VALUE, got "\*.o_proj.\*=lr=fast"\nhint: '),
        ({"clip": math.nan}, "clip must be at least 0, got nan"),
        ({"save_every": -1}, "save_every must be at least 0, got -1"),
        ({"eval_every": -1}, "eval_every must be at least 0, got -1"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainSettings(**{"model_config": "1m", "steps": 1, **changes})


def test_tokens_are_rounded_up_to_steps() -> None:
    given: dict[str, Any] = {"model_config": "1m", "batch_size": 3, "accumulate": 2, "block_tokens": 5}
    for tokens, steps in ((1, 1), (30, 1), (31, 2), (90, 3)):
        assert TrainSettings(tokens=tokens, **given).num_steps == steps
    assert TrainSettings(tokens=1, **given).step_tokens == 30


def test_every_optimizer_has_a_learning_rate() -> None:
    assert tuple(RECIPES) == OPTIMIZERS
    for optimizer, recipe in RECIPES.items():
        assert TrainSettings(model_config="1m", steps=1, optimizer=optimizer).peak_lr == recipe["lr"]
    assert TrainSettings(model_config="1m", steps=1, lr=0.5).peak_lr == 0.5


def test_what_is_left_out_is_the_optimizers_own() -> None:
    numuon = TrainSettings(model_config="1m", steps=1, momentum=0.5, rank="fixed:0.1")
    assert [numuon.chosen(name) for name in ("momentum", "rank")] == [0.5, "fixed:0.1"]
    assert numuon.chosen("spectral_decay") == RECIPES["numuon"]["spectral_decay"] > 0
    assert TrainSettings(model_config="1m", steps=1, spectral_decay=0.0).chosen("spectral_decay") == 0
    assert TrainSettings(model_config="1m", steps=1, optimizer="muon").chosen("spectral_decay") == 0


@pytest.mark.parametrize(
    ("given", "expected"), [({}, RECIPES["adamw"]["lr"]), ({"lr": 0.5}, 0.5), ({"lr": 0.5, "adamw_lr": 0.1}, 0.1)]
)
def test_what_is_no_matrix_has_a_learning_rate_too(given: dict[str, Any], expected: float) -> None:
    assert TrainSettings(model_config="1m", steps=1, **given).peak_adamw_lr == expected


def test_a_learning_rate_that_cannot_be_is_named() -> None:
    with pytest.raises(UsageError, match="adamw_lr must be above 0, got -1"):
        TrainSettings(model_config="1m", steps=1, adamw_lr=-1.0)


# Model configs


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_size_of_their_name(name: str) -> None:
    config = model_config(name, vocab_size=512, context=64, **IDS)
    with torch.device("meta"):
        matrices = find_matrices(AutoModelForCausalLM.from_config(config))
    numbers = sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices)
    size = name.removeprefix("qwen3-")
    assert numbers == pytest.approx(float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]], rel=0.1)
    assert numbers == PRESETS[name].matrix_parameters
    assert config.model_type == ("qwen3" if name.startswith("qwen3-") else "llama")
    assert (config.vocab_size, config.max_position_embeddings, config.eos_token_id) == (512, 64, 6)
    assert config.tie_word_embeddings


def test_the_ladders_have_the_same_rungs() -> None:
    rungs = ["1m", "2m", "5m", "15m", "60m", "125m", "350m", "1b"]
    assert list(PRESETS) == [*rungs, *(f"qwen3-{rung}" for rung in rungs)]


def write(folder: Path, **settings: Any) -> str:
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder / "config.json")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_transformers_wrote(family: str, tmp_path: Path) -> None:
    original = FAMILIES[family]()
    original.save_pretrained(tmp_path)
    config = model_config(str(tmp_path), vocab_size=60, context=1, **IDS)
    assert type(config) is type(original)
    changed = {"vocab_size": 60, **IDS}
    kept = {key: value for key, value in original.to_dict().items() if key not in changed}
    assert {key: config.to_dict()[key] for key in kept} == kept
    assert {key: config.to_dict()[key] for key in changed} == changed


def test_older_spellings_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, model_type="llama", rope_theta=77.0, torch_dtype="float32")
    assert model_config(path, vocab_size=None, context=8).rope_parameters["rope_theta"] == 77.0


def test_the_config_of_a_compressed_model_gives_a_dense_one(tmp_path: Path) -> None:
    path = write(tmp_path, model_type="llama", quantization_config={"quant_method": "lowrank"})
    assert not hasattr(model_config(path, vocab_size=None, context=8), "quantization_config")


def refusal(make: Callable[[], Any], error: type[LowRankError] = UsageError) -> str:
    with pytest.raises(error) as raised:
        make()
    return str(raised.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model_type": "llama", "hiden_size": 8, "xyzzy": 1},
            'keys that llama does not know: hiden_size, xyzzy\nhint: "hiden_size": did you mean "hidden_size"?$',
        ),
        ({"model_type": "llama", "xyzzy": 1}, "keys that llama does not know: xyzzy\nhint: leave them out"),
        (
            {"model_type": "lama"},
            'model_type "lama" is no causal language model of transformers\nhint: did you mean "llama"?',
        ),
        ({"model_type": "t5"}, 'model_type "t5" is no causal language model'),
        ({"model_type": "xyzzy9"}, 'hint: for example "model_type": "llama"'),
        ({"hidden_size": 8}, 'model_type "None" is no causal language model'),
        ({"model_type": "llama", "hidden_size": "wide"}, "no llama can be made of this: .*hidden_size.* expected int"),
        ({"model_type": "llama", "hidden_size": 33, "num_attention_heads": 4}, r"hidden size \(33\) is not a multiple"),
    ],
)
def test_configs_that_make_no_model(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path, **settings)
    said = refusal(lambda: model_config(path, vocab_size=None, context=8))
    assert said.startswith(path)
    assert re.search(message.replace("?", r"\?"), said)
    assert len(said) < 600  # no list of all that transformers knows


@pytest.mark.parametrize(("text", "message"), [("{", "is no JSON"), ("[]", "a JSON object is expected, found list")])
def test_a_file_that_is_no_config(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    said = refusal(lambda: model_config(str(tmp_path / "x.json"), vocab_size=None, context=8), LowRankError)
    assert message in said


def test_no_such_preset() -> None:
    said = refusal(lambda: model_config("16m", vocab_size=None, context=8))
    assert said == 'no model config "16m": neither a preset nor a file\nhint: did you mean "1m"?'
