"""Text from the cache in a run: the same weights as from memory, exact resume, shares of ranks, packed documents."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from lowrank_kit.data.cache import StoredCorpus
from lowrank_kit.data.corpus import Corpus
from lowrank_kit.errors import UsageError
from lowrank_kit.training import data as data_module
from lowrank_kit.training.callbacks import ProgressLog
from lowrank_kit.training.data import load_data
from lowrank_kit.training.model import check_packing
from lowrank_kit.training.run import train
from lowrank_kit.training.settings import TrainSettings

Make = Callable[..., TrainSettings]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(text_file: Path, tmp_path: Path) -> Path:
    """The pages as files, which are read in the order in which they are kept in memory."""
    (tmp_path / "pages").mkdir()
    for number, line in enumerate(text_file.read_text().splitlines()):
        (tmp_path / "pages" / f"{number:03}.txt").write_text(json.loads(line)["text"])
    return tmp_path / "pages"


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model.safetensors")


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("packing", ["blocks", "documents"])
def test_from_the_cache_is_from_memory_bit_for_bit(
    settings_for: Make, folder: Path, tmp_path: Path, packing: str
) -> None:
    for stream in (False, True):
        settings = settings_for(text=str(folder), packing=packing, stream=stream, steps=6, eval_blocks=5)
        train(settings, tmp_path / f"run-{stream}", device="cpu")
    assert equal(weights(tmp_path / "run-False"), weights(tmp_path / "run-True"))
    records = [json.loads((tmp_path / f"run-{stream}" / "run.json").read_text()) for stream in (False, True)]
    assert records[0]["validation_loss"] == records[1]["validation_loss"]
    for name in ("train_tokens", "bytes_per_token", "heldout_blocks_sha256"):
        assert records[0]["corpus"][name] == records[1]["corpus"][name]


def test_a_large_text_is_streamed(settings_for: Make, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def corpus(**changes: Any) -> Corpus | StoredCorpus:
        return load_data(settings_for(text=str(folder), **changes)).corpus

    size = sum(path.stat().st_size for path in folder.iterdir())
    monkeypatch.setattr(data_module, "STREAM_ABOVE_BYTES", size)
    assert isinstance(corpus(), Corpus)
    assert isinstance(corpus(stream=True), StoredCorpus)
    monkeypatch.setattr(data_module, "STREAM_ABOVE_BYTES", size - 1)
    assert isinstance(corpus(), StoredCorpus)
    assert isinstance(corpus(stream=False), Corpus)


class StopError(Exception):
    """A run that ends too soon."""


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`stop_at(step)`: the run ends at that step; 0: it does not."""
    on_step_end = ProgressLog.on_step_end

    def at(step: int) -> None:
        def stopping(log: ProgressLog, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            on_step_end(log, args, state, control, **kwargs)
            if state.global_step == step:
                raise StopError

        monkeypatch.setattr(ProgressLog, "on_step_end", stopping)

    return at


@pytest.mark.parametrize("cleared", [False, True], ids=["cached", "cache-cleared"])
def test_resumed_is_uninterrupted(
    settings_for: Make, tmp_path: Path, cache: Path, stop_at: Callable[[int], None], cleared: bool
) -> None:
    settings = settings_for(stream=True, max_bytes=4000, packing="documents", save_every=3)
    whole = train(settings, tmp_path / "whole", device="cpu")
    assert whole["corpus"]["train_tokens"] < 6 * whole["step_tokens"]  # the checkpoint is in the second epoch
    stop_at(7)
    with pytest.raises(StopError):
        train(settings, tmp_path / "run", device="cpu")
    stop_at(0)
    if cleared:
        shutil.rmtree(cache)
    train(settings, tmp_path / "run", resume=True, device="cpu")
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_resuming_with_other_text(settings_for: Make, text_file: Path, tmp_path: Path, stop_at: Any) -> None:
    settings = settings_for(stream=True, save_every=3)
    stop_at(4)
    with pytest.raises(StopError):
        train(settings, tmp_path / "run", device="cpu")
    text_file.write_text(text_file.read_text().replace("Page 7.", "Page 8."))
    with pytest.raises(UsageError, match=r"the text of .* has changed since"):
        train(settings, tmp_path / "run", resume=True, device="cpu")


def test_ranks_share_the_blocks(settings_for: Make) -> None:
    blocks = load_data(settings_for(stream=True)).train
    seen = []
    for rank in range(3):
        loader = prepare_data_loader(DataLoader(blocks, batch_size=2), num_processes=3, process_index=rank)
        seen.append([tuple(row) for batch in loader for row in batch["input_ids"].tolist()])
    assert len({len(rows) for rows in seen}) == 1
    wanted = {tuple(blocks[index]["input_ids"].tolist()) for index in range(len(blocks))}
    assert set().union(*seen) == wanted
    # Only the last batches are filled up, with blocks from the beginning.
    assert 0 <= sum(map(len, seen)) - len(blocks) < 3 * 2


# Attention inside documents


def test_the_loss_is_that_of_each_document_by_itself(settings_for: Make, tmp_path: Path) -> None:
    settings = settings_for(packing="documents", stream=True, steps=2, batch_size=8, accumulate=1)
    record = train(settings, tmp_path / "run", device="cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    heldout = load_data(settings).heldout
    losses = []
    for item in (heldout[index] for index in range(len(heldout))):
        starts = np.flatnonzero(item["position_ids"].numpy() == 0)
        assert len(starts) <= 3
        for ids in np.split(item["input_ids"].numpy(), starts[1:]):
            document = torch.from_numpy(ids)[None]
            with torch.no_grad():
                logits = model(input_ids=document).logits[0]
            losses.append(F.cross_entropy(logits[:-1], document[0, 1:], reduction="none"))
    assert len(losses) > len(heldout) == 8
    assert record["validation_loss"] == pytest.approx(float(torch.cat(losses).mean()), abs=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_do_not_depend_on_the_document_before(tiny_llama: Any, attention: str) -> None:
    model = tiny_llama(attn_implementation=attention)
    documents = torch.randint(384, (3, 9))
    packed = [torch.cat([documents[first], documents[2]])[None] for first in (0, 1)]
    positions = torch.arange(9).repeat(2)[None]
    with torch.no_grad():
        one, other = (model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, 9:] for ids in packed)
        alone = model(input_ids=documents[2:], use_cache=False).logits[0]
        joined = model(input_ids=packed[0], use_cache=False).logits[0, 9:]
    assert torch.equal(one, other)
    torch.testing.assert_close(one, alone, rtol=1e-5, atol=1e-6)
    assert (joined - alone).abs().max() > 1e-3


def test_a_model_that_cannot_is_refused(settings_for: Make, tmp_path: Path) -> None:
    check_packing(GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2)))
    small = {"vocab_size": 384, "hidden_size": 8, "n_layer": 1, "n_head": 2}
    model = BloomForCausalLM(BloomConfig(**small)).train()
    with pytest.raises(UsageError, match="BloomForCausalLM cannot keep its attention inside documents"):
        check_packing(model)
    assert model.training
    (tmp_path / "bloom.json").write_text(json.dumps({"model_type": "bloom", **small}))
    with pytest.raises(UsageError, match="cannot keep its attention inside documents\nhint: --packing blocks"):
        train(settings_for(model_config=str(tmp_path / "bloom.json"), packing="documents"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
