"""A causal LM that is in memory only in parts: built empty, filled from its files and emptied again, part by part."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.stored import StoredMatrix, sources_by_parameter
from lowrank_kit.device import return_fragments
from lowrank_kit.errors import LowRankError
from lowrank_kit.matrices import find_matrices


class PartialModel:
    """The dense causal LM of a checkpoint, in evaluation mode, its weights on the meta device unless they are filled.

    Buffers that are not in the files, as rotary frequencies, are always there.

    Args:
        checkpoint: dense.
        device: where what is filled goes.
        dtype: of what is filled; "auto" is the checkpoint's own.

    Raises:
        LowRankError: tensors are missing.
        NotInPartsError: it can only be loaded as a whole.
    """

    def __init__(self, checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype | str = "auto") -> None:
        self.checkpoint, self.device = checkpoint, device
        checkpoint.meta_model()  # refuses what is no causal LM
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
        with init_empty_weights(include_buffers=False):
            wanted = _own_dtype(checkpoint) if isinstance(dtype, str) else dtype
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=wanted)
        self.model.tie_weights()  # emptying has cut what was tied
        self.model.eval().requires_grad_(False)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        self._aliases = _aliases(self.model)
        self._on_disk = {name: disk for name, disk in checkpoint.disk_names().items() if name in self._aliases}
        self._stacks = _stacks(checkpoint)
        self._refuse_missing()

    def below(self, path: str) -> list[str]:
        """Names of the weights of a module."""
        return [name for name in self._aliases if name.startswith(f"{path}.")]

    def outside(self, paths: Collection[str]) -> list[str]:
        """Names of the weights that are in none of these modules."""
        return [name for name in self._aliases if not any(name.startswith(f"{path}.") for path in paths)]

    @contextmanager
    def filled(self, names: Iterable[str]) -> Iterator[None]:
        """Inside, these weights are there."""
        names = list(names)
        try:
            self.fill(names)
            yield
        finally:
            self.forget(names)
            return_fragments()

    def fill(self, names: Iterable[str]) -> None:
        """Read weights; what is tied to one of them is filled with it. Those that are there stay as they are."""
        wanted = {alias: name for name in names if self._get(name).is_meta for alias in self._aliases[name]}
        plain = {self._on_disk[alias]: name for alias, name in wanted.items() if alias in self._on_disk}
        for disk, tensor in self.checkpoint.tensors(plain):
            self._put(plain[disk], tensor)
        for name in {name for alias, name in wanted.items() if alias in self._stacks}:
            self._put(name, self._read_stack(name))

    def forget(self, names: Iterable[str]) -> None:
        """Give the memory of weights back; of layers that have been exchanged meanwhile nothing is left."""
        for name in names:
            if not (found := self._get(name)).is_meta:
                self._put(name, torch.empty_like(found, device="meta"))

    def _read_stack(self, name: str) -> Tensor:
        """A fused tensor of experts, from the tensors of each."""
        stack, transposed = torch.empty_like(self._get(name), device="cpu"), self._stacks[name].transposed
        places = self._stacks[name].places
        for tensor_name, tensor in self.checkpoint.tensors(places):
            stored, first_row = places[tensor_name]
            expert = stack[stored.matrix.expert]
            rows = slice(first_row, first_row + stored.matrix.shape[0])
            (expert.mT if transposed else expert)[rows] = stored.weight(tensor)
        return stack

    def _get(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        tensor: Tensor = getattr(self.model.get_submodule(owner), leaf)
        return tensor

    def _put(self, name: str, tensor: Tensor) -> None:
        old = self._get(name)
        if not tensor.is_meta:
            tensor = tensor.to(self.device, old.dtype if old.is_floating_point() else tensor.dtype)
        for alias in self._aliases[name]:
            owner, _, leaf = alias.rpartition(".")
            module = self.model.get_submodule(owner)
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            else:
                module._buffers[leaf] = tensor

    def _refuse_missing(self) -> None:
        ignored = [re.compile(pattern) for pattern in self.model._keys_to_ignore_on_load_missing or ()]
        missing = [
            name
            for name, aliases in self._aliases.items()
            if not any(alias in self._on_disk or alias in self._stacks for alias in aliases)
            and not any(pattern.search(name) for pattern in ignored)
        ]
        if missing and all(
            len(sources_by_parameter(self.model, self.checkpoint.headers)[name]) > 1 for name in missing
        ):
            raise NotInPartsError(
                f"{missing[0]} of {type(self.model).__name__} is put together of several tensors of its files",
                hint="--objective whiten with --refine none or e2e, for which the model is loaded as a whole",
            )
        if missing:
            raise LowRankError(
                f"{self.checkpoint.path}: {len(missing)} tensors of {type(self.model).__name__} are missing, "
                f"first {missing[0]}",
                hint="config.json and the safetensors files seem to belong to different models",
            )


class NotInPartsError(LowRankError):
    """A weight that only `from_pretrained` can make of what is in the files."""


@dataclass(frozen=True)
class _Stack:
    """A fused parameter of experts that is stored apart: tensor on disk -> its matrix, and its first row there."""

    places: dict[str, tuple[StoredMatrix, int]]
    transposed: bool


def _stacks(checkpoint: Checkpoint) -> dict[str, _Stack]:
    transposed = {matrix.parameter: matrix.transposed for matrix in find_matrices(checkpoint.meta_model())}
    stacks: dict[str, _Stack] = {}
    rows: dict[tuple[str, int], int] = {}
    for stored in checkpoint.matrices():
        parameter, expert = stored.matrix.parameter, stored.matrix.expert
        if expert is None or len(checkpoint.headers[stored.tensors[0]].shape) == 3:
            continue
        first = rows.get((parameter, expert), 0)
        rows[parameter, expert] = first + stored.matrix.shape[0]
        stack = stacks.setdefault(parameter, _Stack({}, transposed[parameter]))
        stack.places[stored.tensors[0]] = (stored, first)
    return stacks


def _aliases(model: PreTrainedModel) -> dict[str, list[str]]:
    """Name of each weight that is to be in the files -> its names: several where weights are tied."""
    saved = model.state_dict(keep_vars=True)
    by_tensor: dict[int, list[str]] = {}
    for name, tensor in saved.items():
        by_tensor.setdefault(id(tensor), []).append(name)
    return {name: by_tensor[id(tensor)] for name, tensor in saved.items()}


def _own_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """That of config.json, else the widest of the files, as transformers reads "auto"."""
    config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False).get_text_config()
    return config.dtype or torch.float32
