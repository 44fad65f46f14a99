"""Fine-tuning: on conversations, whose answers alone are learned, and by LoRA adapters."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.compression.calibration import calibrate
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.data.answers import DEFAULT_TEMPLATE, IGNORED, AnswerTokens, answer_tokens
from lowrank_kit.data.chat import load_chat
from lowrank_kit.errors import UsageError
from lowrank_kit.evaluation.run import EvalSettings, evaluate
from lowrank_kit.layers import LowRankLinear
from lowrank_kit.training.callbacks import ProgressLog
from lowrank_kit.training.lora import add_adapters, save_adapters
from lowrank_kit.training.run import train
from lowrank_kit.training.settings import TrainSettings
from tests.families import build, token_ids
from tests.pages import WORDS

Make = Callable[..., TrainSettings]


@pytest.fixture
def chat_file(tmp_path: Path) -> Path:
    """Forty conversations with answers of one to twenty words."""
    rows = [
        {"prompt": f"{WORDS[i % 20]} {i}?", "completion": " ".join(WORDS[(i + j) % 20] for j in range(1 + i * 7 % 20))}
        for i in range(40)
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def chat_settings(settings_for: Make, chat_file: Path, tiny_llama_folder: Path) -> Make:
    """`chat_settings(**changes)`: eight steps of four conversations from the tiny Llama, which has no dropout."""

    def make(**changes: Any) -> TrainSettings:
        return settings_for(**{"model": str(tiny_llama_folder), "text": str(chat_file), "block_tokens": 96, **changes})

    return make


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    on_step_end = ProgressLog.on_step_end

    def at(step: int) -> None:
        def stopping(self: ProgressLog, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            on_step_end(self, args, state, control, **kwargs)
            if state.global_step == step:
                raise KeyboardInterrupt

        monkeypatch.setattr(ProgressLog, "on_step_end", stopping)

    return at


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def answer_loss(folder: Path, tokens: AnswerTokens) -> float:
    """Mean over all answer tokens, one conversation at a time and without any padding."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    nats = 0.0
    for item in (tokens[index] for index in range(len(tokens))):
        with torch.no_grad():
            logits = model(item["input_ids"][None]).logits[0, :-1]
        nats += cross_entropy(logits, item["labels"][1:], ignore_index=IGNORED, reduction="sum").item()
    return nats / tokens.num_answer_tokens


# Conversations


def test_conversations(chat_settings: Make, tiny_llama_folder: Path, chat_file: Path, tmp_path: Path) -> None:
    settings = chat_settings(eval_blocks=3, optimizer="adamw", steps=12)
    record = train(settings, tmp_path / "run", device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert tokenizer.chat_template == DEFAULT_TEMPLATE
    corpus = load_chat(str(chat_file))
    tokens = answer_tokens(corpus.train, tokenizer, 96)
    heldout = answer_tokens(corpus.heldout, tokenizer, 96, max_conversations=3)
    assert record["corpus"] == {
        "source": str(chat_file),
        "sha256": corpus.sha256,
        "train_blocks_sha256": tokens.sha256,
        "heldout_blocks_sha256": heldout.sha256,
        "train_tokens": tokens.num_tokens,
        "bytes_per_token": heldout.bytes_per_token,
        "train_conversations": len(corpus.train),
        "train_answer_tokens": tokens.num_answer_tokens,
    }
    assert record["step_tokens"] == round(4 * tokens.num_tokens / len(tokens))
    # Answers of different length, two and one in a batch: still the mean over tokens.
    assert len({int((heldout[i]["labels"] != IGNORED).sum()) for i in range(3)}) > 1
    assert record["validation_loss"] == pytest.approx(answer_loss(tmp_path / "run", heldout), abs=1e-5)
    assert record["validation_loss"] < answer_loss(tiny_llama_folder, heldout) - 1
    # What is asked was not learned: its numbers are as unlikely as they were.
    asked = AnswerTokens(tokens.ids, ~tokens.answers & (torch.rand(tokens.num_tokens) < 0.2), tokens.ends, 1.0)
    assert answer_loss(tmp_path / "run", tokens) < answer_loss(tmp_path / "run", asked) - 0.5


def test_the_first_loss_is_the_mean_over_all_answers(
    chat_settings: Make, tiny_llama_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    count = len(load_chat(str(chat_file)).train)
    train(chat_settings(steps=1, batch_size=count, accumulate=1), tmp_path / "run", device="cpu")
    tokens = answer_tokens(load_chat(str(chat_file)).train, AutoTokenizer.from_pretrained(tmp_path / "run"), 96)
    (loss,) = (line["loss"] for line in log_of(tmp_path / "run") if "loss" in line)
    assert loss == pytest.approx(answer_loss(tiny_llama_folder, tokens), abs=1e-5)


@pytest.mark.parametrize("lora", [None, 2], ids=["full", "lora"])
def test_accumulating_is_a_larger_batch(lora: int | None, chat_settings: Make, tmp_path: Path) -> None:
    for name, batch_size, accumulate in (("at-once", 4, 1), ("in-parts", 2, 2)):
        # SGD: what is nearly zero stays so, where AdamW makes a sign of it.
        changes: dict[str, Any] = {"overrides": ("*lora_*=sgd",), "lora": lora} if lora else {}
        settings = chat_settings(steps=3, batch_size=batch_size, accumulate=accumulate, optimizer="sgd", **changes)
        train(settings, tmp_path / name, device="cpu")
    at_once, in_parts = (log_of(tmp_path / name) for name in ("at-once", "in-parts"))
    for line, expected in zip(in_parts, at_once, strict=True):
        key = "loss" if "loss" in expected else "validation_loss"
        assert line[key] == pytest.approx(expected[key], abs=1e-6)
    after = weights(tmp_path / "in-parts")
    for name, tensor in weights(tmp_path / "at-once").items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)


def test_a_template_of_the_tokenizers_own_is_kept(chat_settings: Make, tiny_llama_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    train(chat_settings(steps=1, tokenizer=str(tmp_path / "tokenizer")), tmp_path / "run", device="cpu")
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template == tokenizer.chat_template


def test_conversations_from_scratch(chat_settings: Make, config_file: Path, tmp_path: Path) -> None:
    config = json.loads(config_file.read_text()) | {"max_position_embeddings": 96}
    config_file.write_text(json.dumps(config))
    settings = chat_settings(model=None, model_config=str(config_file), steps=1, vocab_size=300)
    train(settings, tmp_path / "run", device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    # Trained on what is said, not on the JSON around it.
    assert "mill" in tokenizer.get_vocab()
    assert not any("ole" in token or "user" in token for token in tokenizer.get_vocab())


def test_steps_of_conversations_are_not_counted_in_tokens(chat_settings: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"chat\.jsonl holds conversations.*--tokens cannot say") as caught:
        train(chat_settings(steps=None, tokens=1000), tmp_path / "run", device="cpu")
    assert caught.value.hint == "--steps 1000"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{}, {"lora": 2}], ids=["conversations", "lora"])
def test_resumed_is_uninterrupted(
    changes: dict[str, Any], chat_settings: Make, tmp_path: Path, stop_at: Callable[[int], None]
) -> None:
    settings = chat_settings(save_every=3, **changes)
    whole = train(settings, tmp_path / "whole", device="cpu")
    stop_at(5)
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "run", device="cpu")
    stop_at(0)
    resumed = train(settings, tmp_path / "run", resume=True, device="cpu")
    assert resumed == whole
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert log_of(tmp_path / "run")[-1] == log_of(tmp_path / "whole")[-1]


@pytest.mark.parametrize("changes", [{"stream": True}, {"packing": "documents"}], ids=["stream", "packing"])
def test_settings_that_are_for_text(changes: dict[str, Any], chat_settings: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"chat\.jsonl holds conversations.*--stream and --packing are for text"):
        train(chat_settings(**changes), tmp_path / "run", device="cpu")


def test_calibration_on_conversations(tiny_llama_folder: Path, chat_file: Path) -> None:
    settings = CompressSettings(
        keep=0.5, objective="whiten", text=str(chat_file), block_tokens=32, calibration_blocks=200, check_blocks=1
    )
    texts = calibrate(Checkpoint.open(tiny_llama_folder), settings, device="cpu").texts
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    text = "\n".join(tokenizer.decode(blocks.ids.flatten()) for blocks in texts.sets.values())
    corpus = load_chat(str(chat_file))
    asked, left_out = (
        [json.loads(document.text)["messages"][0]["content"] for document in side]
        for side in (corpus.train, corpus.heldout)
    )
    # All but the last, and those that the one block of check text is cut out of.
    assert sum(f"### User:\n{question}\n\n### Assistant:\n" in text for question in asked) >= len(asked) - 5
    assert not any(f"User:\n{question}\n" in text for question in left_out)


# LoRA


def test_adapters_merged_and_apart(settings_for: Make, tiny_llama_folder: Path, tmp_path: Path) -> None:
    settings = settings_for(model=str(tiny_llama_folder), lora=2, lora_alpha=6, lora_roles=("q", "down"), steps=4)
    record = train(settings, tmp_path / "run", device="cpu")
    before, after = weights(tiny_llama_folder), weights(tmp_path / "run")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        change = after[name] - tensor
        if "q_proj" in name or "down_proj" in name:
            values = torch.linalg.svdvals(change)
            assert values[0] > 1e-3
            assert values[2] < 1e-5 * tensor.norm()
        else:
            assert not change.any(), name
    assert record["parameters"] == sum(tensor.numel() for tensor in before.values())
    assert (record["adapter_parameters"], record["lora_alpha"]) == (2 * 2 * (32 + 32 + 80 + 32), 6)
    # AdamW steps them: numuon has nothing to step.
    assert {line["rank_fraction"] for line in log_of(tmp_path / "run") if "loss" in line} == {None}
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    ids = token_ids()
    torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=0, atol=1e-5)
    config = adapted.peft_config["default"]
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (2, 6, str(tiny_llama_folder))
    assert {path.name for path in (tmp_path / "run" / "adapter").iterdir()} >= {"adapter_model.safetensors"}
    assert not list((tmp_path / "run").rglob("*.bin"))


def test_what_is_merged_is_what_was_scored(settings_for: Make, tiny_llama_folder: Path, tmp_path: Path) -> None:
    settings = settings_for(model=str(tiny_llama_folder), lora=4, steps=4)
    record = train(settings, tmp_path / "run", device="cpu")
    assert record["lora_alpha"] == 8
    scored = EvalSettings(text=settings.text, part="heldout", blocks=8, block_tokens=32)
    compress(tmp_path / "run", tmp_path / "half", CompressSettings(keep=0.5, objective="plain"))
    rows = evaluate([str(tmp_path / name) for name in ("run", "half")], scored, device="cpu")
    assert rows[0]["loss"] == pytest.approx(record["validation_loss"], abs=1e-5)
    assert math.isfinite(rows[1]["loss"])
    assert not any(name.startswith("adapter") for name in Checkpoint.open(tmp_path / "half").headers)


def test_adapters_of_a_compressed_model(settings_for: Make, tiny_llama_folder: Path, tmp_path: Path) -> None:
    compress(tiny_llama_folder, tmp_path / "half", CompressSettings(keep=0.5, objective="plain"))
    train(settings_for(model=str(tmp_path / "half"), lora=2, steps=2), tmp_path / "run", device="cpu")
    before, after = weights(tmp_path / "half"), weights(tmp_path / "run")
    assert {name: tensor.shape for name, tensor in before.items()} == {n: t.shape for n, t in after.items()}
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if name.endswith(("A.weight", "B.weight"))}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert sum(isinstance(module, LowRankLinear) for module in model.modules()) == 14


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3", "qwen3", "mixtral"])
def test_families(family: str, tmp_path: Path) -> None:
    model, ids = build(family), token_ids()
    names = model.state_dict().keys()
    settings = TrainSettings(model="somewhere", lora=2, steps=1)
    adapted = add_adapters(model, settings)
    # As the user named it, not the folder it was found in.
    assert adapted.peft_config["default"].base_model_name_or_path == "somewhere"
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        expected = adapted(ids).logits
        merged = save_adapters(adapted, tmp_path)
        torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-4)
    assert merged.state_dict().keys() == names


def test_fused_experts_get_no_adapter(caplog: pytest.LogCaptureFixture) -> None:
    adapted = add_adapters(build("mixtral"), TrainSettings(model="somewhere", lora=2, steps=1))
    assert "16 of 24 matrices are fused experts and get no adapter" in caplog.text
    trained = {name.split(".")[-4] for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(UsageError, match="all 8 matrices are fused experts"):
        add_adapters(build("mixtral"), TrainSettings(model="somewhere", lora=2, steps=1, lora_roles=("down",)))


def test_a_role_that_there_is_not() -> None:
    with pytest.raises(UsageError, match='no matrix of LlamaForCausalLM has the role "quey"') as caught:
        add_adapters(build("llama"), TrainSettings(model="somewhere", lora=2, steps=1, lora_roles=("q", "quey")))
    assert caught.value.hint == "its roles: q, k, v, o, gate, up, down"


def test_without_peft(
    settings_for: Make, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match="--lora needs the package peft, which is not installed") as caught:
        train(settings_for(model=str(tiny_llama_folder), lora=2), tmp_path / "run", device="cpu")
    assert caught.value.hint == "pip install 'lowrank-kit[lora]'"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": 2, "model": None, "model_config": "1m"}, "--lora fine-tunes a MODEL"),
        ({"lora": 2, "spectra_every": 5}, "--spectra-every measures the matrices, which --lora leaves"),
        ({"lora": 2, "fsdp": True}, "--lora and --fsdp do not go together"),
        ({"lora": 0}, "lora must be at least 1, got 0\nhint: --lora 16"),
        ({"lora": 2, "lora_alpha": 0}, "lora_alpha must be at least 1, got 0"),
        ({"lora_alpha": 2}, "--lora-alpha and --lora-roles are of --lora"),
        ({"lora_roles": ("q",)}, "--lora-alpha and --lora-roles are of --lora"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainSettings(**{"model": "x", "steps": 1, **changes})
