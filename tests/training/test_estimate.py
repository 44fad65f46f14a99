"""What a run is said to take: against what autograd keeps, what the optimizer holds and what is on disk."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.errors import DoesNotFitError
from lowrank_kit.optim import NuMuonFactory
from lowrank_kit.training import estimate as module
from lowrank_kit.training.estimate import Estimate, Memory, check_memory, estimate_run, report, report_rows
from lowrank_kit.training.presets import PRESETS, model_config
from lowrank_kit.training.run import estimate, train
from lowrank_kit.training.settings import TrainSettings

Make = Callable[..., TrainSettings]
CPU = torch.device("cpu")
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def kept_bytes(model: PreTrainedModel, ids: Tensor, *, bf16: bool) -> int:
    """What the backward pass of the loss will read, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model(input_ids=ids, labels=ids)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", ["1m", "qwen3-1m"])
def test_activations_are_what_autograd_keeps(name: str, bf16: bool) -> None:
    # Key heads fewer than heads, which no preset as small has.
    config = model_config(name, vocab_size=384, context=48, **IDS)
    config.num_key_value_heads = 2
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    settings = TrainSettings(model_config=name, steps=1, batch_size=3, block_tokens=48, bf16=bf16, vocab_size=384)
    memory = estimate_run(model, NuMuonFactory()(model, rule="adamw", lr=1.0), settings).memory
    log_softmax = memory.logits // 3
    kept = kept_bytes(model, torch.randint(0, 384, (3, 48)), bf16=bf16) - log_softmax
    assert memory.activations == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_an_estimate(preset: str) -> None:
    found = estimate(TrainSettings(model_config=preset, tokens=10**6, vocab_size=1000))
    assert found.parameters["matrices"] == PRESETS[preset].matrix_parameters
    assert found.parameters["embeddings"] == 1000 * PRESETS[preset].width
    total = sum(found.parameters.values())
    assert found.memory.weights == found.memory.gradients == found.model_bytes == 4 * total
    # Six for each number that a token meets: the embeddings are met as the head.
    expected = 6 * (PRESETS[preset].matrix_parameters + 1000 * PRESETS[preset].width) * found.step_tokens
    assert found.flops["model"] == expected
    heads = PRESETS[preset].blocks * PRESETS[preset].heads * PRESETS[preset].head_dim
    assert found.flops["attention"] == 6 * heads * 256 * found.step_tokens
    assert found.steps == -(-(10**6) // found.step_tokens)


def test_what_a_run_leaves_on_disk_is_as_large_as_said(settings_for: Make, tmp_path: Path) -> None:
    settings = settings_for(save_every=5, vocab_size=300, rank="fixed:0.25")
    found = estimate(settings)
    record = train(settings, tmp_path / "run", device="cpu")
    assert sum(found.parameters.values()) == record["parameters"]
    assert found.parameters["matrices"] == record["matrix_parameters"]
    weights = (tmp_path / "run" / "model.safetensors").stat().st_size
    # Beside the numbers: names and shapes, and where the run stands.
    assert 0 < weights - found.model_bytes < 10_000
    saved = sum(file.stat().st_size for file in (tmp_path / "run" / "checkpoints").rglob("*") if file.is_file())
    assert 0 < saved - found.checkpoint_bytes < 60_000


def test_a_checkpoint_to_fine_tune_counts_its_factors(tiny_llama_folder: Path, tmp_path: Path) -> None:
    settings = CompressSettings(keep=0.5, objective="plain")
    compress(str(tiny_llama_folder), tmp_path / "half", settings, device="cpu", dtype="float32")
    numbers = {}
    for folder in (tiny_llama_folder, tmp_path / "half"):
        headers = Checkpoint.open(folder).headers
        numbers[folder] = sum(torch.Size(h.shape).numel() for h in headers.values() if h.shape != (1,))
        found = estimate(TrainSettings(model=str(folder), steps=1))
        assert sum(found.parameters.values()) == numbers[folder]
    assert numbers[tmp_path / "half"] < numbers[tiny_llama_folder]


def test_shards_divide_what_is_kept_and_processes_what_passes(settings_for: Make) -> None:
    settings = settings_for(batch_size=4)
    model = AutoModelForCausalLM.from_config(model_config("1m", vocab_size=384, context=32, **IDS))
    optimizer = NuMuonFactory()(model, rule="adamw", lr=1.0)

    def of(processes: int, shards: int) -> Estimate:
        return estimate_run(model, optimizer, settings, processes=processes, shards=shards)

    alone, sharded, replicated = of(1, 1), of(2, 2), of(2, 1)
    one, half, whole = alone.memory, sharded.memory, replicated.memory
    for part in ("weights", "gradients", "optimizer_state"):
        assert getattr(half, part) == -(-getattr(one, part) // 2)
    assert (whole.weights, whole.optimizer_state) == (one.weights, one.optimizer_state)
    assert whole.gradients == 2 * one.gradients  # the buckets of DDP
    for several in (half, whole):
        assert (2 * several.activations, 2 * several.logits) == (one.activations, one.logits)
    assert 2 * sharded.seconds(1.0) == 2 * replicated.seconds(1.0) == alone.seconds(1.0)


@pytest.mark.parametrize(("fsdp", "replicas", "shards"), [(False, 1, 1), (True, 1, 4), (True, 2, 2)])
def test_a_launch_says_how_many_processes_and_shards_there_are(
    fsdp: bool, replicas: int, shards: int, settings_for: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    settings = settings_for(batch_size=8, fsdp=fsdp, replicas=replicas)
    found = estimate(settings)
    assert found.processes == 4
    assert found.memory.weights == -(-found.model_bytes // shards)


def test_activations_that_are_computed_again_are_not_kept(settings_for: Make) -> None:
    kept, again = (estimate(settings_for(model_config="5m", checkpoint_activations=on)) for on in (False, True))
    shape, tokens = PRESETS["5m"], 2 * 32
    ends = 3 * shape.width  # of the last norm and the head
    blocks = kept.memory.activations / (4 * tokens) - ends
    expected = blocks / shape.blocks + shape.blocks * shape.width + ends
    assert again.memory.activations == pytest.approx(4 * tokens * expected)
    assert again.flops["model"] == kept.flops["model"] * 8 / 6
    assert dataclasses.replace(again.memory, activations=kept.memory.activations) == kept.memory


def test_adapters_are_all_that_has_gradients_and_state(tiny_llama_folder: Path) -> None:
    whole = estimate(TrainSettings(model=str(tiny_llama_folder), steps=1))
    adapted = estimate(TrainSettings(model=str(tiny_llama_folder), steps=1, lora=2))
    adapters = adapted.parameters["other"] - whole.parameters["other"]
    assert adapters > 0
    assert adapted.memory.weights == whole.memory.weights + 4 * adapters
    assert adapted.memory.gradients == 4 * adapters
    # AdamW's two averages, and a count of steps for each tensor.
    assert 0 < adapted.memory.optimizer_state - 8 * adapters < 4 * 100
    assert adapted.flops["model"] == pytest.approx(whole.flops["model"] * 4 / 6)


# Refusals

MEMORY = Memory(
    weights=10**9, gradients=10**9, optimizer_state=10**9, optimizer_step=10**8, activations=3 * 10**9, logits=10**9
)


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`available(nbytes)`: what the device has left."""
    return lambda nbytes: monkeypatch.setattr(module, "available_memory", lambda device: nbytes)


def test_a_borderline_run_passes_and_one_byte_less_is_refused(settings_for: Make, available: Any) -> None:
    available(7 * 10**9)
    assert check_memory(MEMORY, settings_for(), CPU) == 7 * 10**9
    available(7 * 10**9 - 1)
    with pytest.raises(DoesNotFitError) as refused:
        check_memory(MEMORY, settings_for(), CPU)
    assert refused.value.message == (
        "the run needs at least 7.00 GB and cpu has 7.00 GB left; the largest parts: activations 3.00 GB, "
        "weights 1.00 GB, gradients 1.00 GB"
    )
    # settings_for: two sequences twice in a step.
    assert refused.value.hint == "--batch-size 1 --accumulate 4 takes the same steps in about 5.00 GB"


def test_the_hint_is_another_where_a_smaller_batch_is_still_too_large(settings_for: Make, available: Any) -> None:
    available(4 * 10**9)
    with pytest.raises(DoesNotFitError, match=r"alone take 3\.00 GB") as refused:
        check_memory(MEMORY, settings_for(), CPU)
    assert "a smaller model" in str(refused.value.hint)


def test_copies_of_the_step_count_where_they_are_more(settings_for: Make, available: Any) -> None:
    available(7 * 10**9)
    with pytest.raises(DoesNotFitError, match=r"at least 8\.00 GB"):
        check_memory(dataclasses.replace(MEMORY, optimizer_step=5 * 10**9), settings_for(), CPU)


def test_processes_of_one_machine_share_its_memory(
    settings_for: Make, available: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    available(15 * 10**9)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert check_memory(MEMORY, settings_for(), CPU) == 7.5 * 10**9
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(DoesNotFitError):
        check_memory(MEMORY, settings_for(), CPU)


def test_a_run_that_cannot_fit_is_refused_before_the_text_is_read(settings_for: Make, tmp_path: Path) -> None:
    started = time.process_time()
    for width in (2**17, 2**40):  # 10^12 numbers, and more than a tensor may have
        (tmp_path / "huge.json").write_text(
            f'{{"model_type": "llama", "hidden_size": {width}, "intermediate_size": {4 * width}, '
            '"num_hidden_layers": 4, "num_attention_heads": 1024}'
        )
        with pytest.raises(DoesNotFitError):
            train(settings_for(model_config=str(tmp_path / "huge.json"), text="no/such/text"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert time.process_time() - started < 5


# What is told


def test_the_report_adds_up(settings_for: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "product_flops", lambda device, dtype: 1e6 if dtype == torch.float32 else 1e5)
    settings = settings_for()
    found = estimate(settings)
    told = report(found, CPU, bf16=False)
    assert told["parameters"]["total"] == sum(found.parameters.values())
    assert told["tokens"] == 8 * 128
    assert told["seconds"] == pytest.approx(sum(told["flops"].values()) / (0.5 * 1e6))
    assert told["time_class"] == "minutes"
    assert report(found, CPU, bf16=True)["seconds"] == pytest.approx(10 * told["seconds"])
    rows = {row["what"]: row["how much"] for row in report_rows(told, settings)}
    assert rows["memory: weights"] == f"{told['memory']['weights'] / 1e3:.0f} kB"
    assert {f"memory: {part}" for part in (*found.memory.parts(), "least", "most")} < rows.keys()
