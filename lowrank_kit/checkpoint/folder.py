"""A checkpoint folder: its config, its headers, its matrices, and its tensors one shard at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lowrank_kit.checkpoint.headers import TensorHeader, read_headers
from lowrank_kit.checkpoint.quantizer import QUANT_METHOD, LowRankConfig
from lowrank_kit.checkpoint.stored import StoredMatrix, disk_names, stored_matrices
from lowrank_kit.errors import LowRankError, UsageError

CONFIG_FILE = "config.json"
# What a compression says of itself, in the folder it made.
REPORT_FILE = "compression.json"

# "name" or "organisation/name", as the hub allows them. Nothing that starts like a path.
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)?")

# Weights, config, tokenizer: no pickles, no code, no copies in other formats.
HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
HUB_IGNORED = ["*/*", "consolidated*"]


def resolve_model(model: str) -> Path:
    """The folder of a model: the folder itself, or a snapshot of a model on the hub.

    Args:
        model: a folder, or a hub id such as "gpt2" or "Qwen/Qwen3-0.6B".

    Raises:
        UsageError: neither.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise UsageError(f"{model} is a file, a model is a folder", hint=f"give its folder: {path.parent}")
    if not HUB_ID.fullmatch(model):
        raise UsageError(f"no such model folder: {model}", hint="give a folder that save_pretrained wrote, or a hub id")
    try:
        return Path(snapshot_download(model, allow_patterns=HUB_PATTERNS, ignore_patterns=HUB_IGNORED))
    # Offline, not found, private, disk full: the hub client has no common base class, and the user one question.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UsageError(
            f"no such model folder, and not to be had from the hub: {model} ({reason})",
            hint="check the path; a private model needs `hf auth login`; offline, only models in the cache are found",
        ) from error


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face model folder, dense or compressed, with all headers read and checked; no weight is read.

    Args:
        path: the folder.
        config: its config.json.
        headers: tensor name -> header, in shard order.
    """

    path: Path
    config: dict[str, Any]
    headers: dict[str, TensorHeader]

    @classmethod
    def open(cls, model: Path | str) -> Checkpoint:
        """Open a folder or a hub id.

        Raises:
            UsageError: no such model, no config.json, no safetensors.
            LowRankError: damaged files, found before any work.
        """
        path = resolve_model(str(model))
        return cls(path, _read_config(path), read_headers(path))

    def meta_model(self) -> PreTrainedModel:
        """The dense causal LM of config.json on the meta device: all names and shapes, no memory. Built once.

        Raises:
            UsageError: config.json describes no causal LM that transformers knows.
        """
        return self._meta_model

    @cached_property
    def _meta_model(self) -> PreTrainedModel:
        try:
            config = AutoConfig.from_pretrained(self.path, trust_remote_code=False)
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        # A config can be wrong in as many ways as there are architectures, each with its own exception.
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UsageError(
                f"{self.path / CONFIG_FILE}: no causal language model can be built from it: {reason}",
                hint="lowrank-kit works on architectures of transformers itself, without trust_remote_code",
            ) from error

    def matrices(self) -> list[StoredMatrix]:
        """Every matrix of the model and the tensors that hold it. Found once.

        Raises:
            UsageError: no matrix in this architecture, or a quantized checkpoint.
            LowRankError: config and tensors disagree, or a newer format version.
        """
        return self._matrices

    @cached_property
    def _matrices(self) -> list[StoredMatrix]:
        quantization = self.config.get("quantization_config") or {"quant_method": QUANT_METHOD}
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        if method != QUANT_METHOD:
            raise UsageError(
                f"{self.path}: the weights are quantized with {method}, their numbers are codes and not matrices",
                hint="use the unquantized model",
            )
        try:
            LowRankConfig(**quantization)  # refuses a newer format
            return stored_matrices(self.meta_model(), self.headers)
        except LowRankError as error:
            raise type(error)(f"{self.path}: {error.message}", hint=error.hint) from error

    def disk_names(self) -> dict[str, str]:
        """Parameter name -> name on disk, of the parameters that are one tensor there with the same shape."""
        return disk_names(self.meta_model(), self.headers)

    def tensors(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Read tensors in shard order, one shard open at a time.

        Args:
            names: the wanted ones; None for all.

        Raises:
            KeyError: a wanted name is not in the checkpoint.
        """
        wanted = dict.fromkeys(self.headers if names is None else names)
        unknown = [name for name in wanted if name not in self.headers]
        if unknown:
            raise KeyError(f"{self.path}: no tensor {unknown[0]}")
        by_file: dict[str, list[str]] = {}
        for name, header in self.headers.items():
            if name in wanted:
                by_file.setdefault(header.file, []).append(name)
        for file, here in by_file.items():
            with safe_open(self.path / file, framework="pt") as shard:
                for name in here:
                    yield name, shard.get_tensor(name)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UsageError(
            f"{folder}: no {CONFIG_FILE} in this folder", hint="give the folder that save_pretrained wrote"
        )
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise LowRankError(f"{path}: not valid JSON: {error}", hint="download or copy it again") from error
    if not isinstance(config, dict):
        raise LowRankError(f"{path}: a JSON object is expected, found {type(config).__name__}")
    return config
