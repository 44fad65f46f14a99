"""A checkpoint folder: its config, its headers, its matrices, and its tensors one shard at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lowrank_kit.checkpoint.headers import ShardFile, TensorHeader, headers_by_name, read_shards
from lowrank_kit.checkpoint.hub import CONFIG_FILE, resolve_config, resolve_model, resolve_shards
from lowrank_kit.checkpoint.parts import check_rank
from lowrank_kit.checkpoint.quantizer import QUANT_METHOD, LowRankConfig
from lowrank_kit.checkpoint.reading import non_finite, opened, read_tensor, read_whole
from lowrank_kit.checkpoint.stacks import Unit, with_stacks
from lowrank_kit.checkpoint.stored import StoredMatrix, disk_names, stored_matrices
from lowrank_kit.errors import LowRankError, UsageError

# What a compression says of itself, in the folder it made.
REPORT_FILE = "compression.json"
_COUNTS_OF_BLOCKS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face model folder, dense or compressed, with all headers read and checked; no weight is read.

    Args:
        path: the folder.
        config: its config.json.
        shards: file -> its size, time of change and headers, as they were when it was opened.
        head: whether the LM head is one of the matrices, see `with_head`.
    """

    path: Path
    config: dict[str, Any]
    shards: dict[str, ShardFile]
    head: bool = False

    @classmethod
    def open(cls, model: Path | str) -> Checkpoint:
        """Open a folder or a hub id.

        Raises:
            UsageError: no such model, no config.json, no safetensors, an architecture that transformers has not.
            LowRankError: damaged files, found before any work.
        """
        _read_config(resolve_config(str(model)))  # refuses much before weights are downloaded
        path = resolve_model(str(model))
        return cls(path, _read_config(path), read_shards(path))

    @classmethod
    def open_headers(cls, model: Path | str) -> Checkpoint:
        """Open a folder or a hub id for its headers; what is not in the cache is not downloaded.

        Raises:
            As `open`.
        """
        path = resolve_config(str(model))
        return cls(path, _read_config(path), resolve_shards(str(model), path))

    @property
    def has_weights(self) -> bool:
        """Whether the tensors can be read: not of a model on the hub of which the headers alone were."""
        return all(shard.mtime_ns is not None for shard in self.shards.values())

    @cached_property
    def headers(self) -> dict[str, TensorHeader]:
        """Tensor name -> header, in shard order."""
        return headers_by_name(self.shards.values())

    @property
    def nbytes(self) -> int:
        """Size of all shards together."""
        return sum(shard.nbytes for shard in self.shards.values())

    def meta_model(self) -> PreTrainedModel:
        """The dense causal LM of config.json on the meta device: all names and shapes, no memory. Built once.

        Raises:
            UsageError: config.json describes no causal LM that transformers knows.
        """
        return self._meta_model

    @cached_property
    def _meta_model(self) -> PreTrainedModel:
        for key in _COUNTS_OF_BLOCKS:  # a loop over a number of twelve digits would not end
            if type(count := self.config.get(key)) is int and count > max(len(self.headers), 1):
                raise LowRankError(
                    f"{self.path / CONFIG_FILE}: {key} is {count:,}, the files hold {len(self.headers):,} tensors",
                    hint="config.json and the safetensors files seem to belong to different models",
                )
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

    def with_head(self) -> Checkpoint:
        """The same with its LM head among the matrices."""
        return self if self.head else self._with_head

    @cached_property
    def _with_head(self) -> Checkpoint:
        return replace(self, head=True)

    def matrices(self) -> list[StoredMatrix]:
        """Every matrix of the model and the tensors that hold it. Found once.

        Raises:
            UsageError: no matrix in this architecture, or a quantized checkpoint.
            LowRankError: config and tensors disagree, or a newer format version.
        """
        return self._matrices

    @cached_property
    def _matrices(self) -> list[StoredMatrix]:
        entries = self.quantization().matrices
        with told_where(self.path):
            found = stored_matrices(self.meta_model(), self.headers, head=self.head)
            if "quantization_config" in self.config:
                self._check_ranks(found, entries)
            return found

    def quantization(self) -> LowRankConfig:
        """What config.json says of matrices of low rank; of a dense model that there are none.

        Raises:
            UsageError: a checkpoint that is quantized by another method.
            LowRankError: a newer format version.
        """
        quantization = self.config.get("quantization_config") or {"quant_method": QUANT_METHOD}
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        if method != QUANT_METHOD:
            raise UsageError(
                f"{self.path}: the weights are quantized with {method}, their numbers are codes and not matrices",
                hint="use the unquantized model",
            )
        with told_where(self.path):
            return LowRankConfig(**quantization)

    def rank(self, stored: StoredMatrix) -> int | None:
        """Rank of a matrix as it is stored; None of a dense one."""
        return self._A(stored).shape[-2] if stored.compressed else None

    def _A(self, stored: StoredMatrix) -> TensorHeader:
        return next(self.headers[name] for name in stored.tensors if name.endswith((".A", ".A.weight", ".A.codes")))

    def _check_ranks(self, found: list[StoredMatrix], entries: Mapping[str, Mapping[str, Any]]) -> None:
        """What config.json says of the compressed matrices is what is stored."""
        for one in found:
            if one.compressed:
                name, A = one.entry_name, self._A(one)
                check_rank(A.file, name, entries.get(name), one.form, A.shape[-2])

    def units(self) -> list[Unit]:
        """What can be compressed, one by one: every matrix of a dense model, the experts of a fused weight together.

        Raises:
            UsageError, LowRankError: as `matrices`.
        """
        return self._units

    @cached_property
    def _units(self) -> list[Unit]:
        return with_stacks(self.meta_model(), self.headers, self.matrices())

    def weights(self, units: Iterable[Unit]) -> Iterator[tuple[Unit, Tensor]]:
        """Weights of matrices and stacks, each as soon as all its tensors have been read.

        Args:
            units: some of `units()`.

        Returns:
            Unit and its weight, [out, in], or [experts, out, in] of a stack; in shard order.
        """
        owners = {name: unit for unit in units for name in unit.tensors}
        waiting: dict[str, Tensor] = {}
        for name, tensor in self.tensors(owners):
            waiting[name] = tensor
            unit = owners[name]
            if all(one in waiting for one in unit.tensors):
                yield unit, unit.weight(*(waiting.pop(one) for one in unit.tensors))

    def disk_names(self) -> dict[str, str]:
        """Parameter name -> name on disk, of the parameters that are one tensor there with the same shape."""
        return disk_names(self.meta_model(), self.headers)

    def tensors(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Read tensors in shard order, one shard open at a time, each into memory of its own.

        Args:
            names: the wanted ones; None for all.

        Raises:
            KeyError: a wanted name is not in the checkpoint.
            LowRankError: a shard is gone or has changed since the checkpoint was opened, or torch lacks a dtype.
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
            path, shard = self.path / file, self.shards[file]
            with opened(path, shard) as stream:
                for name in here:
                    yield name, read_tensor(stream, path, shard, self.headers[name])

    def verify(self) -> dict[str, str]:
        """Read every shard once, from beginning to end, with one tensor in memory.

        Returns:
            File -> SHA-256 of it.

        Raises:
            LowRankError: NaN or Inf in a tensor, or a shard is gone or has changed since the checkpoint was opened.
        """
        with tqdm(total=self.nbytes, desc="verify", unit="B", unit_scale=True, disable=None) as bar:
            return {
                file: read_whole(self.path / file, shard, partial(refuse_non_finite, self), bar.update)
                for file, shard in self.shards.items()
            }


def refuse_non_finite(checkpoint: Checkpoint, name: str, tensor: Tensor) -> None:
    """Refuse a tensor with a number that is none.

    Raises:
        LowRankError: NaN or Inf, with how many.
    """
    if count := non_finite(tensor):
        raise LowRankError(
            f"{checkpoint.path}: NaN or Inf in {name}: {count:,} of {tensor.numel():,} numbers",
            hint="train or download the model again",
        )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file() and (folder / "adapter_config.json").is_file():
        raise UsageError(
            f"{folder}: LoRA adapters, and no model", hint="give the model with these merged in: the folder above"
        )
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
    _refuse_unknown(path, config)
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD:
        with told_where(path):
            LowRankConfig(**quantization)  # refuses a newer format
    return config


@contextmanager
def told_where(path: Path) -> Iterator[None]:
    """Inside, an error says where."""
    try:
        yield
    except LowRankError as error:
        raise type(error)(f"{path}: {error.message}", hint=error.hint) from error


def _refuse_unknown(path: Path, config: dict[str, Any]) -> None:
    """An architecture that transformers has not, whether or not the folder brings code for it."""
    model_type, code = config.get("model_type"), config.get("auto_map")
    if not isinstance(model_type, str) or model_type in CONFIG_MAPPING:
        return  # without a type transformers goes by the folder's name; with a type of its own it needs no code
    lacking = f"transformers {transformers.__version__} has no model_type {model_type!r}"
    if code:
        names = ", ".join(map(str, code.values())) if isinstance(code, dict) else str(code)
        raise UsageError(
            f"{path}: asks for code of its own (auto_map: {names}), and {lacking}",
            hint="code of a model folder is never run: use a version of transformers that has this architecture",
        )
    raise UsageError(f"{path}: {lacking}", hint="a newer transformers may have it: pip install -U transformers")
