"""The benchmark: FLOPs against torch's own count, greedy decoding against generate(), turns, ratios, what fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.errors import DoesNotFitError, UsageError
from lowrank_kit.evaluation import bench as bench_module
from lowrank_kit.evaluation import speed
from lowrank_kit.evaluation.bench import SCHEMA, BenchSettings, bench, summary
from lowrank_kit.evaluation.flops import TokenFlops, token_flops
from lowrank_kit.evaluation.speed import Runner, Timing, pass_bytes, peak_growth, weight_bytes
from lowrank_kit.layers.fused import StackedInputs

FEW = BenchSettings(prompt=6, new_tokens=4, batches=(1, 3), rounds=2)
PROMPT = torch.arange(20, 20 + 3 * 6).reshape(3, 6)  # no special tokens


@pytest.fixture(scope="module")
def folders(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny Llama dense, as factors, pivoted, and pivoted with its head."""
    folder = tmp_path_factory.mktemp("forms")
    kinds: dict[str, dict[str, Any]] = {
        "factors": {"form": "factors"},
        "pivoted": {"form": "pivoted"},
        "head": {"form": "pivoted", "include": ("*", "lm_head")},
    }
    for name, kind in kinds.items():
        compress(tiny_llama_folder, folder / name, CompressSettings(keep=0.5, objective="plain", align=1, **kind))
    return {"dense": tiny_llama_folder} | {name: folder / name for name in kinds}


def load(folder: Path) -> Any:
    # Products of eager attention are counted, those of fused kernels on the CPU are not.
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


# FLOPs


def counted(model: Any, **inputs: Any) -> tuple[int, Any]:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        output = model(**inputs)
    return counter.get_total_flops(), output


@pytest.mark.parametrize("form", ["dense", "factors", "pivoted", "head"])
def test_flops_are_those_that_torch_counts(form: str, folders: dict[str, Path]) -> None:
    model, flops = load(folders[form]), token_flops(Checkpoint.open(folders[form]))
    rotary = 2 * 8 * 3  # half a head's frequencies times positions, a product by name only
    whole, output = counted(model, input_ids=torch.arange(9)[None], use_cache=True, logits_to_keep=1)
    assert 0 <= whole - flops.prefill(9) <= 9 * rotary
    step, _ = counted(model, input_ids=torch.tensor([[5]]), past_key_values=output.past_key_values)
    # The one step of two new tokens attends to the prompt and itself.
    assert 0 <= step - flops.decode(9, 2) <= rotary


def test_flops_of_experts(tmp_path: Path) -> None:
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "dense")
    dense = token_flops(Checkpoint.open(tmp_path / "dense"))
    attention, expert = 16 * 16 * 2 + 2 * 8 * 16, 3 * 16 * 24
    assert dense == TokenFlops(matrices=2 * 2 * (attention + 2 * expert), head=2 * 40 * 16, attention=4 * 2 * 16)
    compress(tmp_path / "dense", tmp_path / "half", CompressSettings(keep=0.5, objective="plain", align=1))
    model, half = load(tmp_path / "half"), token_flops(Checkpoint.open(tmp_path / "half"))
    routers = 2 * 2 * 16 * 4
    whole, _ = counted(model, input_ids=torch.arange(8)[None], logits_to_keep=1)
    assert 0 <= whole - half.prefill(8) - 8 * routers <= 8 * 48
    assert half.matrices < 0.6 * dense.matrices


# Passes


@pytest.mark.parametrize("form", ["dense", "pivoted"])
def test_greedy_decoding_is_that_of_generate(form: str, folders: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders[form]).eval()
    ours = Runner(model, PROMPT, 10)
    expected = model.generate(PROMPT, do_sample=False, min_new_tokens=10, max_new_tokens=10, eos_token_id=None)
    for timing in (ours(), ours()):
        assert torch.equal(timing.tokens, expected[:, 6:])
        assert min(timing.prefill_s, timing.decode_s) > 0


def test_compiled_decodes_the_same(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "BACKEND", "eager")  # traced, with a static cache, and not left to a C++ compiler
    model = AutoModelForCausalLM.from_pretrained(folders["factors"]).eval()
    expected = Runner(model, PROMPT, 5)().tokens
    compiled = Runner(model, PROMPT, 5, "compiled")
    assert torch.equal(compiled().tokens, expected)
    assert torch.equal(compiled().tokens, expected)
    heads, width, layers = 2, 8, 2
    assert compiled.cache_bytes() == 2 * layers * 3 * heads * (6 + 5) * width * 4


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_peak_of_memory() -> None:
    def work() -> None:
        torch.ones(2**24)  # 64 MiB, mapped by itself and gone again
        torch.ones(2**20)

    growth = peak_growth(work, torch.device("cpu"))
    assert growth is not None
    assert 60 * 2**20 < growth < 90 * 2**20
    again = peak_growth(lambda: None, torch.device("cpu"))
    assert again is not None
    assert again < 8 * 2**20


def test_estimate_of_a_pass_grows_with_the_batch(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_llama()
    cache = 2 * 2 * 2 * 8 * (6 + 4) * 4
    assert pass_bytes(model, 8, 6, 4) == 8 * pass_bytes(model, 1, 6, 4)
    assert pass_bytes(model, 1, 6, 4) > cache


# Models side by side


def test_models_take_turns(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []

    def noted(self: Runner) -> Timing:
        calls.append((Path(self.model.name_or_path).name, len(self.prompt)))
        return Timing(1.0, 1.0, self.prompt)

    monkeypatch.setattr(Runner, "__call__", noted)
    settings = BenchSettings(prompt=6, new_tokens=4, batches=(2,), rounds=3, warmup=2)
    bench([str(folders["dense"]), str(folders["factors"])], settings, device="cpu")
    dense, factors = (folders["dense"].name, 2), ("factors", 2)
    assert calls == [dense] * 3 + [factors] * 3 + [dense, factors] * 3  # warm-up, memory, rounds


@pytest.mark.parametrize("asked", [True, False])
def test_models_are_fused_if_asked_for(asked: bool, folders: dict[str, Path]) -> None:
    (contender,) = bench_module.load(
        [str(folders["pivoted"])], replace(FEW, fuse=asked), torch.device("cpu"), torch.float32
    )
    assert any(isinstance(module, StackedInputs) for module in contender.model.modules()) == asked
    assert weight_bytes(contender.model) == weight_bytes(load(folders["pivoted"]))


def test_ratios_are_of_the_same_round() -> None:
    found = summary([1.0, 4.0, 1.0], [2.0, 4.0, 3.0], tokens=12, calls=4)
    assert found == {
        "seconds": [1.0, 4.0, 1.0],
        "tokens_per_s": {"median": 12, "min": 3, "max": 12},
        "ms": {"median": 250, "min": 250, "max": 1000},
        "ratio": {"median": 2, "min": 1, "max": 3},
    }
    assert summary([1.0], [], tokens=1, calls=1)["ratio"] is None


def test_the_document(folders: dict[str, Path]) -> None:
    models = [str(folders["dense"]), str(folders["factors"]), str(folders["dense"])]
    found = bench(models, FEW, device="cpu")
    assert found["schema"] == SCHEMA == "lowrank-bench/1"
    assert [(row["model"], row["batch"], row["mode"], row["error"]) for row in found["rows"]] == [
        (label, batch, "eager", None) for batch in (1, 3) for label in ("tiny-llama #1", "factors", "tiny-llama #3")
    ]
    dense, factors, again = found["models"]
    assert dense["flop_ratio"] == again["flop_ratio"] == {"prefill": 1, "decode": 1}
    small, large = (token_flops(Checkpoint.open(folders[name])) for name in ("factors", "dense"))
    assert factors["flop_ratio"]["decode"] == small.decode(6, 4) / large.decode(6, 4) < 1
    loaded = {name: AutoModelForCausalLM.from_pretrained(folders[name]) for name in ("factors", "dense")}
    assert factors["byte_ratio"] == weight_bytes(loaded["factors"]) / weight_bytes(loaded["dense"]) < 1
    for row in found["rows"]:
        prefill, decode = row["prefill"], row["decode"]
        assert len(prefill["seconds"]) == len(decode["seconds"]) == 2
        fastest = min(decode["seconds"])
        assert decode["tokens_per_s"]["max"] == pytest.approx(row["batch"] * 3 / fastest)
        assert decode["ms"]["min"] == pytest.approx(1000 * fastest / 3)
        assert prefill["tokens_per_s"]["max"] == pytest.approx(row["batch"] * 6 / min(prefill["seconds"]))
    assert found["rows"][0]["decode"]["ratio"] == {"median": 1, "min": 1, "max": 1}


def test_the_threads_are_put_back(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    before, real = torch.get_num_threads(), Runner.__call__
    seen: list[int] = []

    def noted(self: Runner) -> Timing:
        seen.append(torch.get_num_threads())
        return real(self)

    monkeypatch.setattr(Runner, "__call__", noted)
    settings = BenchSettings(prompt=2, new_tokens=2, batches=(1,), rounds=1, threads=2)
    assert bench([str(folders["dense"])], settings, device="cpu")["threads"] == 2
    assert set(seen) == {2}
    assert torch.get_num_threads() == before


def test_prompts_hold_what_all_models_know(
    tiny_llama: Callable[..., LlamaForCausalLM], folders: dict[str, Path], tmp_path: Path
) -> None:
    tiny_llama(vocab_size=3).save_pretrained(tmp_path / "few")
    found = bench([str(folders["dense"]), str(tmp_path / "few")], FEW, device="cpu")
    assert all(row["error"] is None for row in found["rows"])


# What does not work


def test_a_batch_that_does_not_fit(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    models = [str(folders["dense"]), str(folders["factors"])]
    weights = sum(Checkpoint.open(model).nbytes for model in models)
    monkeypatch.setattr(bench_module, "available_memory", lambda device: weights)
    monkeypatch.setattr(bench_module, "pass_bytes", lambda model, batch, *_: weights if batch == 1 else weights + 1)
    found = bench(models, FEW, device="cpu")
    few, many = found["rows"][:2], found["rows"][2:]
    assert [row["error"] for row in few] == [None, None]
    for row in many:
        assert row["error"].startswith("does not fit: about ")
        assert row["prefill"] is row["decode"] is row["peak_bytes"] is None


def test_memory_that_ends_in_a_round(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = Runner.__call__, [0]

    def scarce(self: Runner) -> Timing:
        calls[0] += 1
        if calls[0] == 5:  # the first model's in the first round
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(self)

    monkeypatch.setattr(Runner, "__call__", scarce)
    first, second, *rest = bench([str(folders["dense"]), str(folders["factors"])], FEW, device="cpu")["rows"]
    assert first["error"] == "does not fit: CUDA out of memory. Tried to allocate 2 GiB"
    assert first["decode"] is None
    assert second["error"] is None
    assert second["decode"]["ratio"] is None
    assert len(second["decode"]["seconds"]) == 2
    assert all(row["error"] is None for row in rest)


def test_what_cannot_be_compiled_is_tried_once(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def broken(graph: Any, inputs: Any) -> None:
        tried.append(1)
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(speed, "BACKEND", broken)
    settings = BenchSettings(prompt=6, new_tokens=4, batches=(1, 3), rounds=2, compile=True)
    rows = bench([str(folders["dense"])], settings, device="cpu")["rows"]
    assert [(row["batch"], row["mode"]) for row in rows] == [
        *((1, "eager"), (1, "compiled"), (3, "eager"), (3, "compiled"))
    ]
    assert [row["error"] is None for row in rows] == [True, False, True, False]
    assert rows[1]["error"].startswith("torch.compile failed: ")
    assert rows[3]["error"] == rows[1]["error"]
    assert len(tried) == 1


def test_weights_that_do_not_fit(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "available_memory", lambda device: Checkpoint.open(folders["dense"]).nbytes)
    with pytest.raises(DoesNotFitError, match="the weights of 2 models take "):
        bench([str(folders["dense"]), str(folders["factors"])], FEW, device="cpu")


@pytest.mark.parametrize(
    "wrong",
    [{"prompt": 0}, {"new_tokens": 1}, {"rounds": 0}, {"batches": ()}, {"batches": (4, 0)}, {"batches": (2, 2)}],
)
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        BenchSettings(**wrong)
