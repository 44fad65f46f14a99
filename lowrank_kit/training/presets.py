"""Size presets and model configs: what `--model-config` takes."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lowrank_kit.errors import LowRankError, UsageError, did_you_mean


class Preset(NamedTuple):
    """One rung of the ladder: the shape of a model, all but its vocabulary."""

    model_type: str
    width: int
    mlp: int
    blocks: int
    heads: int
    key_heads: int
    head_dim: int

    @property
    def settings(self) -> dict[str, Any]:
        """The keys of config.json that say it."""
        return {
            "model_type": self.model_type,
            "hidden_size": self.width,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "head_dim": self.head_dim,
            "tie_word_embeddings": True,
        }

    @property
    def matrix_parameters(self) -> int:
        """Numbers of the matrices: q, k, v and o, gate, up and down of every block."""
        attention = 2 * self.width * (self.heads + self.key_heads) * self.head_dim
        return self.blocks * (attention + 3 * self.width * self.mlp)


# A name counts the parameters of the matrices, within 10 %; those of the embeddings, tied as in published models up to
# 1B, go with the vocabulary. MLPs are 8/3 to 3 times as wide as the model, and 4 times in Llama 1b, which is Llama 3.2
# 1B. Llama 350m is SmolLM2 360M with four more blocks; Qwen3 350m and 1b are Qwen3 0.6B and 1.7B with 22 and 20 of
# their 28 blocks, and from 15m on Qwen3 has a key head for two heads as there.
PRESETS = {
    "1m": Preset("llama", width=128, mlp=352, blocks=5, heads=4, key_heads=4, head_dim=32),
    "2m": Preset("llama", width=192, mlp=576, blocks=4, heads=6, key_heads=6, head_dim=32),
    "5m": Preset("llama", width=256, mlp=704, blocks=6, heads=8, key_heads=8, head_dim=32),
    "15m": Preset("llama", width=384, mlp=1024, blocks=8, heads=6, key_heads=6, head_dim=64),
    "60m": Preset("llama", width=640, mlp=1728, blocks=12, heads=10, key_heads=10, head_dim=64),
    "125m": Preset("llama", width=768, mlp=2048, blocks=18, heads=12, key_heads=12, head_dim=64),
    "350m": Preset("llama", width=960, mlp=2560, blocks=36, heads=15, key_heads=5, head_dim=64),
    "1b": Preset("llama", width=2048, mlp=8192, blocks=16, heads=32, key_heads=8, head_dim=64),
    "qwen3-1m": Preset("qwen3", width=128, mlp=352, blocks=5, heads=4, key_heads=4, head_dim=32),
    "qwen3-2m": Preset("qwen3", width=192, mlp=576, blocks=4, heads=6, key_heads=6, head_dim=32),
    "qwen3-5m": Preset("qwen3", width=256, mlp=704, blocks=6, heads=8, key_heads=8, head_dim=32),
    "qwen3-15m": Preset("qwen3", width=384, mlp=1024, blocks=9, heads=6, key_heads=3, head_dim=64),
    "qwen3-60m": Preset("qwen3", width=640, mlp=1728, blocks=13, heads=10, key_heads=5, head_dim=64),
    "qwen3-125m": Preset("qwen3", width=768, mlp=2048, blocks=19, heads=12, key_heads=6, head_dim=64),
    "qwen3-350m": Preset("qwen3", width=1024, mlp=3072, blocks=22, heads=16, key_heads=8, head_dim=128),
    "qwen3-1b": Preset("qwen3", width=2048, mlp=6144, blocks=20, heads=16, key_heads=8, head_dim=128),
}


def model_config(source: str, *, vocab_size: int | None, context: int, **token_ids: int | None) -> PreTrainedConfig:
    """The config of a model to be trained from scratch.

    Args:
        source: name of a preset (see `PRESETS`) or path of a config.json.
        vocab_size: of the tokenizer; None takes what the file says.
        context: longest sequence in tokens, for a preset.
        token_ids: bos_token_id, eos_token_id and pad_token_id of the tokenizer.

    Raises:
        UsageError: no such preset or file, no causal LM, keys the model type does not know or values it refuses.
        LowRankError: the file is no JSON object.
    """
    if source in PRESETS:
        settings = {**PRESETS[source].settings, "max_position_embeddings": context}
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
