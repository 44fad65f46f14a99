"""Size presets and model configs: what `--model-config` takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from lowrank_kit.errors import LowRankError, UsageError, did_you_mean

# Llama shapes by the number of matrix parameters; heads of 32 or 64, an MLP 8/3 as wide as the model.
PRESETS: dict[str, dict[str, int]] = {
    "1m": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4},
    "2m": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6},
    "5m": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8},
    "15m": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6},
    "60m": {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 12, "num_attention_heads": 10},
    "125m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 12},
}


def model_config(source: str, *, vocab_size: int | None, context: int, **token_ids: int | None) -> PreTrainedConfig:
    """The config of a model to be trained from scratch.

    Args:
        source: name of a preset (a Llama with tied embeddings) or path of a config.json.
        vocab_size: of the tokenizer; None takes what the file says.
        context: longest sequence in tokens, for a preset.
        token_ids: bos_token_id, eos_token_id and pad_token_id of the tokenizer.

    Raises:
        UsageError: no such preset or file, unknown model type, keys the model type does not know.
    """
    if source in PRESETS:
        settings: dict[str, Any] = {
            "model_type": "llama",
            "tie_word_embeddings": True,
            "max_position_embeddings": context,
            **PRESETS[source],
        }
    else:
        settings = _read_config(Path(source))
    if vocab_size is not None:
        settings["vocab_size"] = vocab_size
    model_type = settings.pop("model_type")
    return AutoConfig.for_model(model_type, **settings, **token_ids)


def _read_config(path: Path) -> dict[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        known = did_you_mean(str(path), PRESETS)
        raise UsageError(f'no model config "{path}": neither a preset nor a file', hint=known)
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise LowRankError(f"{path} is no JSON: {error}") from None
    model_type = settings.get("model_type")
    if model_type not in CONFIG_MAPPING:
        hint = did_you_mean(str(model_type), CONFIG_MAPPING.keys()) if model_type else 'add "model_type": "llama"'
        raise UsageError(f'{path}: unknown model_type "{model_type}"', hint=hint)
    config_class = CONFIG_MAPPING[model_type]
    # Any config takes any keyword and keeps it, so a typo would train another model in silence.
    known_keys = {*config_class().to_dict(), *config_class.attribute_map, "torch_dtype", "dtype", "_name_or_path"}
    unknown = sorted(set(settings) - known_keys)
    if unknown:
        hints = "; ".join(f'"{key}": {did_you_mean(key, known_keys)}' for key in unknown)
        raise UsageError(f"{path}: keys that {model_type} does not know: {', '.join(unknown)}", hint=hints)
    return settings
