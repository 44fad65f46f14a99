"""One offline, single-threaded session: a tiny tokenizer, and tiny models built from configs with no download."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Before any import of a Hugging Face library: they read these once, at import.
_CACHE = tempfile.mkdtemp(prefix="lowrank-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ.update(
    HF_HOME=_CACHE,
    LOWRANK_CACHE=f"{_CACHE}/lowrank-kit",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
)

import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from lowrank_kit.data.tokenizer import train_tokenizer  # noqa: E402
from tests.process import same_process  # noqa: E402

# Two OpenMP threads on a busy two-core machine spend their time in barriers.
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _imports_are_no_garbage() -> None:
    """transformers collects garbage in each training: what was imported is not looked at again every time."""
    gc.freeze()


@pytest.fixture
def same_process_after() -> Iterator[None]:
    """What a test of the command line changes in the process is put back."""
    with same_process():
        yield


PROSE = """\
The river ran past the mill before the sun was over the hill. Nobody had opened the gate, and the wheel stood still.
A boy came down the path with a basket on his arm. He sang as he walked, and the birds in the hedge sang too.
The miller heard him and looked out of the window. "You are early," he said, "and the flour is not yet in the sack."
The boy put the basket down and sat on the wall. He could wait, he said, for the road was long and the day was young.

When the gate was opened the water rushed in and the wheel began to turn. The stones groaned and the flour fell.
By noon the sack was full. The boy took it on his back, thanked the miller, and went up the path to the village.
"""

CODE = """\
def normalize(values, total=None):
    \"\"\"Divide every value by the total, so that they sum to one.\"\"\"
    if total is None:
        total = sum(values)
    if total == 0:
        raise ValueError("the values sum to zero")
    return [value / total for value in values]


class Counter:
    def __init__(self, items=()):
        self.counts = {}
        for item in items:
            self.add(item)

    def add(self, item, times=1):
        self.counts[item] = self.counts.get(item, 0) + times
        return self.counts[item]

    def most_common(self, limit=None):
        ordered = sorted(self.counts.items(), key=lambda pair: pair[1], reverse=True)
        return ordered if limit is None else ordered[:limit]
"""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_texts() -> list[str]:
    """A page of prose and a page of code: what the tiny tokenizer was trained on."""
    return [PROSE, CODE]


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 384 tokens."""
    return train_tokenizer(tiny_texts, vocab_size=384, model_max_length=128)


@pytest.fixture(scope="session")
def tiny_llama(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., LlamaForCausalLM]:
    """`tiny_llama(seed=0, **config)`: a fresh random Llama, 2 blocks, hidden size 32, untied, float32, on the CPU."""

    def build(seed: int = 0, **overrides: object) -> LlamaForCausalLM:
        settings: dict[str, object] = {
            "vocab_size": len(tiny_tokenizer),
            "hidden_size": 32,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
            "bos_token_id": tiny_tokenizer.bos_token_id,
            "eos_token_id": tiny_tokenizer.eos_token_id,
            "pad_token_id": tiny_tokenizer.pad_token_id,
        }
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**settings | overrides)).eval()

    return build


@pytest.fixture(scope="session")
def tiny_llama_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """`tiny_llama()` saved with its tokenizer: a Hugging Face folder. Read only: copy it before changing it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder
