"""Size presets and model configs: what `--model-config` takes."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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
        UsageError: no such preset or file, no causal LM, keys the model type does not know or values it refuses.
        LowRankError: the file is no JSON object.
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
    try:
        return AutoConfig.for_model(model_type, **{**settings, **token_ids})
    # What the config classes raise for values of a wrong type, or that do not fit together.
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{source}: no {model_type} can be made of this: {' '.join(str(error).split())}") from error


def _read_config(path: Path) -> dict[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        known = did_you_mean(str(path), PRESETS)
        raise UsageError(f'no model config "{path}": neither a preset nor a file', hint=known)
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise LowRankError(f"{path} is no JSON: {error}") from None
    if not isinstance(settings, dict):
        raise LowRankError(f"{path}: a JSON object is expected, found {type(settings).__name__}")
    model_type = settings.get("model_type")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UsageError(
            f'{path}: model_type "{model_type}" is no causal language model of transformers',
            hint=_close(str(model_type), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) or 'for example "model_type": "llama"',
        )
    # The config of a compressed model describes the dense one, which is what is built here.
    settings.pop("quantization_config", None)
    # Any config class takes any keyword and keeps it, so a typo would train another model in silence. A file that
    # transformers wrote has been through that already, and may hold keys of other versions.
    if "transformers_version" not in settings:
        _refuse_unknown_keys(path, settings)
    return settings


def _refuse_unknown_keys(path: Path, settings: dict[str, Any]) -> None:
    config_class = CONFIG_MAPPING[settings["model_type"]]
    known = {*config_class().to_dict(), *config_class.attribute_map, "dtype", "torch_dtype", "_name_or_path"}
    # Older spellings such as "rope_theta" are taken in under another name; what stays as it is, nobody reads.
    unread = [key for key in settings if key not in known and key in config_class(**{key: settings[key]}).to_dict()]
    if unread:
        hints = [f'"{key}": {_close(key, known)}' for key in unread if _close(key, known)]
        raise UsageError(
            f"{path}: keys that {settings['model_type']} does not know: {', '.join(unread)}",
            hint="; ".join(hints) or "leave them out",
        )


def _close(word: str, choices: Iterable[str]) -> str | None:
    """`did_you_mean`, but None where that would list hundreds of choices."""
    close = difflib.get_close_matches(word, choices, n=1)
    return did_you_mean(word, close) if close else None
