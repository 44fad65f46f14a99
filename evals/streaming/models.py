"""Random models with a tokenizer, written shard by shard: what time and memory depend on is not what weights are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from lowrank_kit.checkpoint.writer import Shard, plan_shards, write_shards
from lowrank_kit.data.corpus import load_corpus
from lowrank_kit.data.tokenizer import train_tokenizer

MAX_BYTES = 2_000_000
CONTEXT = 256


def make_model(folder: Path, *, max_shard_bytes: int, seed: int = 0, **config: Any) -> Path:
    """Write a Llama with the weights of its initialization, one tensor in memory.

    Args:
        folder: to make.
        max_shard_bytes: most bytes of tensors in a file.
        seed: of the weights.
        config: of `LlamaConfig`.
    """
    llama = LlamaConfig(max_position_embeddings=CONTEXT, tie_word_embeddings=True, dtype="float32", **config)
    llama.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    folder.mkdir(parents=True)
    shards = plan_shards(([(name, "F32", shape)] for name, shape in shapes.items()), max_shard_bytes=max_shard_bytes)
    generator = torch.Generator().manual_seed(seed)

    def fill(shard: Shard) -> Iterator[tuple[str, Tensor]]:
        for header in shard.headers:
            if len(header.shape) == 1:
                yield header.name, torch.ones(header.shape)
            else:
                yield header.name, torch.randn(header.shape, generator=generator).mul_(llama.initializer_range)

    write_shards(folder, shards, fill)
    llama.save_pretrained(folder)
    texts = (document.text for document in load_corpus(max_bytes=MAX_BYTES).train)
    train_tokenizer(texts, vocab_size=llama.vocab_size, model_max_length=CONTEXT).save_pretrained(folder)
    return folder
