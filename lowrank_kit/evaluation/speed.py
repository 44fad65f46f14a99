"""One model under the clock: prefill and greedy decode with a cache, eager or compiled, and the memory they take.

Shape legend: B batch, T prompt tokens, N new tokens.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from lowrank_kit.device import return_fragments

EAGER, COMPILED = "eager", "compiled"
MODES = (EAGER, COMPILED)
BACKEND = "inductor"
# Graphs of CUDA calls, as transformers' own generate() has them.
COMPILE_MODES = {"cuda": "reduce-overhead"}
# Everything of every model in turn is compiled apart; past the limit of 8 torch falls back to eager and only warns.
RECOMPILE_LIMIT = 1024
MEMORY_MEASURED = {
    "cuda": "weights, and the most that a pass allocated beyond (torch.cuda.max_memory_allocated)",
    "cpu": "weights, and the most by which the resident set grew in a pass (VmHWM, begun anew)",
}
# Linux: writing 5 begins the peak of the resident set anew.
_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class Timing:
    """One pass.

    Args:
        prefill_s: seconds of the forward pass over the prompts.
        decode_s: seconds of the N - 1 forward passes of one token each.
        tokens: int64 [B, N], the new ones.
    """

    prefill_s: float
    decode_s: float
    tokens: Tensor


class Runner:
    """Passes of one model over prompts of one shape.

    Eager, the cache grows by each token; compiled, it is static, and so are all shapes: what transformers' generate()
    has in both cases. The first pass of a compiled one compiles.

    Args:
        model: in evaluation mode.
        prompt: int64 [B, T], on the model's device.
        new_tokens: N, at least 2; the first comes of the prefill.
        mode: one of `MODES`.
    """

    def __init__(self, model: PreTrainedModel, prompt: Tensor, new_tokens: int, mode: str = EAGER) -> None:
        self.model, self.prompt, self.new_tokens, self.mode = model, prompt, new_tokens, mode
        taken = inspect.signature(model.forward).parameters
        # All but the last logits of a prompt are for training.
        self.last = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
        self.positions = "cache_position" in taken  # of older transformers
        self.cache: Any = None
        self.forward: Callable[..., Any] = model
        if mode == COMPILED:
            compile_mode = COMPILE_MODES.get(model.device.type, "default")
            self.forward = torch.compile(
                model.__call__, dynamic=False, fullgraph=True, backend=BACKEND, mode=compile_mode
            )

    def __call__(self) -> Timing:
        """One pass, timed.

        Raises:
            Exception: of many kinds, where the model cannot be compiled; torch.OutOfMemoryError on a GPU.
        """
        with torch.inference_mode():
            self._new_cache()
            tokens = torch.empty(len(self.prompt), self.new_tokens, dtype=torch.long, device=self.prompt.device)

            def prefill() -> None:
                tokens[:, 0] = self._next(self.prompt, 0)

            def decode() -> None:
                for index in range(1, self.new_tokens):
                    seen = self.prompt.shape[1] + index - 1
                    tokens[:, index] = self._next(tokens[:, index - 1 : index].clone(), seen)

            timing = Timing(seconds(prefill, self.model.device), seconds(decode, self.model.device), tokens)
            if self.mode == EAGER:
                self.cache = None  # a pass begins with no cache in memory
            return timing

    def cache_bytes(self) -> int:
        """Of the cache that stays between passes; 0 eager, where each has its own."""
        kept = [
            getattr(layer, name, None) for layer in getattr(self.cache, "layers", []) for name in ("keys", "values")
        ]
        return sum(tensor.nbytes for tensor in kept if isinstance(tensor, Tensor))

    def _next(self, ids: Tensor, seen: int) -> Tensor:
        """The likeliest next tokens, [B], after ids [B, t] that follow `seen` tokens in the cache."""
        output = self.forward(**self._inputs(ids, seen), **self.last)
        return output.logits[:, -1].argmax(dim=-1)

    def _inputs(self, ids: Tensor, seen: int) -> dict[str, Any]:
        where = {"cache_position": torch.arange(seen, seen + ids.shape[1], device=ids.device)} if self.positions else {}
        return {"input_ids": ids, "past_key_values": self.cache, "use_cache": True, **where}

    def _new_cache(self) -> None:
        if self.mode == EAGER:
            self.cache = DynamicCache(config=self.model.config)
        elif self.cache is not None:
            self.cache.reset()  # one cache for all passes: a graph of CUDA calls knows addresses
        else:
            length = self.prompt.shape[1] + self.new_tokens
            self.cache = StaticCache(config=self.model.config, max_cache_len=length)
            # Its tensors are made by the first forward pass, which must not be a compiled one.
            self.model(**self._inputs(self.prompt[:, :1], 0))
            self.cache.reset()


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """Of one call, all that it has begun on the device done."""
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        if device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record(torch.cuda.current_stream(device))
    work()
    end.record(torch.cuda.current_stream(device))
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000


def peak_growth(work: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes by which memory in use grew at most during a call; None where the system does not tell.

    What is in use before, of which the weights of all models are, does not count.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not _CLEAR_REFS.exists():
        return None
    return_fragments()  # what was freed before would be taken again without growing
    with suppress(OSError):
        _CLEAR_REFS.write_text("5")
        before = psutil.Process().memory_info().rss
        work()
        return max(_peak_resident() - before, 0)
    return None


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of parameters and buffers in memory, each once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def pass_bytes(model: PreTrainedModel, batch: int, prompt: int, new_tokens: int) -> int:
    """What a pass takes beside the weights, estimated: keys and values, the widest block of a prefill, last logits."""
    config = model.config.get_text_config()
    width, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    inner = getattr(config, "intermediate_size", None) or 4 * width
    cache = 2 * config.num_hidden_layers * key_heads * head_dim * (prompt + new_tokens)
    block = prompt * (2 * width + max(3 * inner, 3 * heads * head_dim))
    return batch * (cache + block + config.vocab_size) * model.dtype.itemsize


def _peak_resident() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
