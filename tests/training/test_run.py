"""A run end to end: what it writes, that it learns, that it resumes bit for bit, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.config import to_dict
from lowrank_kit.data.blocks import token_blocks
from lowrank_kit.data.corpus import load_corpus
from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.evaluation.perplexity import perplexity
from lowrank_kit.layers import LowRankLinear
from lowrank_kit.optim.schedule import RankSchedule
from lowrank_kit.training import checkpoints, run
from lowrank_kit.training.callbacks import ProgressLog
from lowrank_kit.training.run import train
from lowrank_kit.training.settings import TrainSettings
from tests.cli.test_compress_bad_input import files_of_at_most
from tests.training.runs import equal, log_of, weights, without_clock

Make = Callable[..., TrainSettings]


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "numuon"},
        {"optimizer": "numuon", "rank": "fixed:0.25", "spectral_decay": 0.1},
        {"optimizer": "muon"},
        {"optimizer": "adamw"},
        {"optimizer": "sgd", "lr": 0.1, "adamw_lr": 1e-2},
    ],
    ids=["numuon", "numuon-fixed", "muon", "adamw", "sgd"],
)
def test_a_run(changes: dict[str, Any], settings_for: Make, tmp_path: Path) -> None:
    settings = settings_for(eval_every=4, **changes)
    record = train(settings, tmp_path / "run", device="cpu")
    steps = [line for line in log_of(tmp_path / "run") if "loss" in line]
    validations = [line for line in log_of(tmp_path / "run") if "validation_loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert [line["step"] for line in validations] == [0, 4, 8]
    # It starts at a uniform guess and learns.
    assert steps[0]["loss"] == pytest.approx(math.log(384), abs=0.3)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    assert validations[-1]["validation_loss"] == record["validation_loss"] < validations[0]["validation_loss"]
    assert max(line["lr"] for line in steps) == settings.peak_lr
    assert all(line["grad_norm"] > 0 and line["tokens_per_s"] > 0 for line in steps)
    schedule = RankSchedule.parse(settings.chosen("rank"))
    numuon = settings.optimizer == "numuon"
    fractions = [schedule.fraction(step / 8) if numuon else None for step in range(8)]
    assert [line["rank_fraction"] for line in steps] == pytest.approx(fractions)


def test_matrices_and_the_rest_have_learning_rates_of_their_own(settings_for: Make, tmp_path: Path) -> None:
    embeddings, matrix = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"
    found = {}
    for name, lrs in {"still": (1e-9, 1e-9), "rest": (1e-9, 1e-2), "matrices": (1e-2, 1e-9)}.items():
        settings = settings_for(steps=2, lr=lrs[0], adamw_lr=lrs[1])
        train(settings, tmp_path / name, device="cpu")
        found[name] = load_file(tmp_path / name / "model.safetensors")
    for name, (moved, kept) in {"rest": (embeddings, matrix), "matrices": (matrix, embeddings)}.items():
        torch.testing.assert_close(found[name][kept], found["still"][kept], rtol=0, atol=1e-7)
        assert (found[name][moved] - found["still"][moved]).abs().max() > 1e-3


def test_the_folder(settings_for: Make, tmp_path: Path) -> None:
    settings = settings_for(steps=2)
    record = train(settings, tmp_path / "run", device="cpu")
    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert made == {
        *("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("run.json", "log.jsonl", "checkpoints"),
    }
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    corpus = load_corpus(settings.text)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    train_blocks = token_blocks(corpus.train, tokenizer, 32)
    heldout = token_blocks(corpus.heldout, tokenizer, 32, max_blocks=8)
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not any(found.values())
    assert (model.dtype, model.config.vocab_size, model.config.eos_token_id) == (torch.float32, len(tokenizer), 0)
    # The loss it tells is the one the saved model has: a mean over the same tokens, in another order.
    assert record["validation_loss"] == pytest.approx(perplexity(model, heldout).loss_nats, abs=1e-5)
    environment = record.pop("environment")
    assert environment["torch"]
    assert record == {
        "settings": to_dict(settings),
        "finished": True,
        "step": 2,
        "validation_loss": record["validation_loss"],
        "num_steps": 2,
        "step_tokens": 128,
        "peak_lr": 1e-2,
        "peak_adamw_lr": 1e-2,
        "chosen": {name: settings.chosen(name) for name in ("momentum", "nesterov", "spectral_decay", "rank")},
        "parameters": sum(p.numel() for p in model.parameters()),
        "matrix_parameters": 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 80),
        "corpus": {
            "source": settings.text,
            "sha256": corpus.sha256,
            "train_blocks_sha256": train_blocks.sha256,
            "heldout_blocks_sha256": heldout.sha256,
            "train_tokens": train_blocks.num_tokens,
            "bytes_per_token": heldout.bytes_per_token,
        },
    }
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert {key: stored[key] for key in record} == record


def test_the_seed_decides_the_weights(settings_for: Make, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        torch.rand(7)  # whatever was drawn before does not matter
        train(settings_for(steps=2, seed=seed), tmp_path / name, device="cpu")
    one, again, two = (weights(tmp_path / name) for name in ("one", "again", "two"))
    assert equal(one, again)
    assert not equal(one, two)


def test_fine_tuning_starts_from_the_checkpoint(settings_for: Make, tiny_llama_folder: Path, tmp_path: Path) -> None:
    settings = settings_for(model=str(tiny_llama_folder), steps=1, lr=1e-6)
    train(settings, tmp_path / "run", device="cpu")
    before, after = weights(tiny_llama_folder), weights(tmp_path / "run")
    assert not equal(before, after)
    # One step of 1e-6 times at most 0.2 sqrt(80), or of AdamW.
    assert all((after[name] - tensor).abs().max() <= 3e-6 for name, tensor in before.items())
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (tiny_llama_folder, tmp_path / "run"))
    assert old.get_vocab() == new.get_vocab()


def test_fine_tuning_a_compressed_model(settings_for: Make, tiny_llama_folder: Path, tmp_path: Path) -> None:
    compress(tiny_llama_folder, tmp_path / "compressed", CompressSettings(keep=0.5, objective="plain"))
    train(settings_for(model=str(tmp_path / "compressed"), steps=2), tmp_path / "run", device="cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert sum(isinstance(module, LowRankLinear) for module in model.modules()) == 14
    before, after = weights(tmp_path / "compressed"), weights(tmp_path / "run")
    assert before.keys() == after.keys()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name, tensor in after.items() if tensor.shape != (1,)}


# Resume


class Stop(KeyboardInterrupt):
    """Ctrl-C at a known step."""


class Interrupt:
    """`interrupt(step)`: the run stops, as by Ctrl-C, at the end of that step; 0: never. `steps` are those made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at, self.steps = 0, list[int]()
        on_step_end = ProgressLog.on_step_end

        def stopping(log: ProgressLog, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            on_step_end(log, args, state, control, **kwargs)
            self.steps.append(state.global_step)
            if state.global_step == self.at:
                raise Stop

        monkeypatch.setattr(ProgressLog, "on_step_end", stopping)

    def __call__(self, step: int) -> None:
        self.at = step
        self.steps.clear()


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Interrupt:
    return Interrupt(monkeypatch)


RESUMABLE = {"save_every": 3, "eval_every": 2}


def stopped_run(settings: TrainSettings, output: Path, step: int, interrupt: Interrupt) -> None:
    interrupt(step)
    with pytest.raises(Stop):
        train(settings, output, device="cpu")
    interrupt(0)


# What an optimizer keeps beside its momentum: warm a basis, filter a threshold. Effective ranks are logged as before.
@pytest.mark.usefixtures("measured_at_any_cost")
@pytest.mark.parametrize(
    ("step", "checkpoint", "changes"),
    [
        (5, 3, {}),
        (8, 6, {}),
        (2, 0, {}),
        (5, 3, {"rank": "fixed:0.25", "spectral_decay": 0.1}),
        (5, 3, {"rank": "fixed:0.25", "topk": "filter"}),
        (5, 3, {"optimizer": "adamw", "spectra_every": 1}),
        (5, 3, {"optimizer": "sgd", "overrides": ("*.o_proj.*=muon",)}),
    ],
    ids=["between-checkpoints", "last-step", "before-the-first", "warm", "filter", "adamw", "overridden"],
)
def test_resumed_is_uninterrupted(
    step: int, checkpoint: int, changes: dict[str, Any], settings_for: Make, tmp_path: Path, interrupt: Interrupt
) -> None:
    settings = settings_for(**changes, **RESUMABLE)
    whole = train(settings, tmp_path / "whole", device="cpu")
    stopped_run(settings, tmp_path / "run", step, interrupt)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["finished"] is False
    assert not (tmp_path / "run" / "model.safetensors").exists()
    torch.rand(7)
    resumed = train(settings, tmp_path / "run", resume=True, device="cpu")
    assert interrupt.steps == list(range(checkpoint + 1, 9))
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    assert resumed == whole
    assert without_clock(log_of(tmp_path / "run")) == without_clock(log_of(tmp_path / "whole"))


def test_resumed_over_the_end_of_an_epoch(settings_for: Make, tmp_path: Path, interrupt: Interrupt) -> None:
    settings = settings_for(max_bytes=4000, **RESUMABLE)
    whole = train(settings, tmp_path / "whole", device="cpu")
    assert whole["corpus"]["train_tokens"] < 6 * whole["step_tokens"]
    stopped_run(settings, tmp_path / "run", 7, interrupt)
    train(settings, tmp_path / "run", resume=True, device="cpu")
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_a_damaged_checkpoint_is_passed_over(settings_for: Make, tmp_path: Path, interrupt: Interrupt) -> None:
    settings = settings_for(**RESUMABLE)
    train(settings, tmp_path / "whole", device="cpu")
    stopped_run(settings, tmp_path / "run", 7, interrupt)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"checkpoint-3", "checkpoint-6"}
    state = checkpoints / "checkpoint-6" / "trainer_state.json"
    state.write_bytes(state.read_bytes().replace(b"6", b"7"))  # of the same length
    log = tmp_path / "run" / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 3, "lo')  # as when it was killed while it wrote
    train(settings, tmp_path / "run", resume=True, device="cpu")
    assert interrupt.steps == [4, 5, 6, 7, 8]
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_killed_before_the_folder_is_whole(settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_json", lambda *_: os._exit(9))
        if not (child := os.fork()):
            with suppress(BaseException):
                train(settings_for(steps=1), tmp_path / "run", device="cpu")
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / "run").exists()
    train(settings_for(steps=1), tmp_path / "run", device="cpu")
    assert list(tmp_path.glob(".run*")) == []


def test_killed_between_a_checkpoint_and_the_removal_of_another(
    settings_for: Make, tmp_path: Path, interrupt: Interrupt, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(**RESUMABLE, keep_checkpoints=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "rotate", lambda *_: None)
        stopped_run(settings, tmp_path / "run", 7, interrupt)
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2
    train(settings, tmp_path / "run", resume=True, device="cpu")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-6"]


def test_resuming_with_other_settings(settings_for: Make, tmp_path: Path, interrupt: Interrupt) -> None:
    stopped_run(settings_for(**RESUMABLE), tmp_path / "run", 4, interrupt)
    other = settings_for(**RESUMABLE, lr=2e-2, rank="fixed:0.5")
    with pytest.raises(UsageError, match=r'other settings: lr: 0.01 -> 0.02; rank: null -> "fixed:0.5"\n'):
        train(other, tmp_path / "run", resume=True, device="cpu")


def test_resuming_with_other_text(settings_for: Make, text_file: Path, tmp_path: Path, interrupt: Interrupt) -> None:
    stopped_run(settings_for(**RESUMABLE), tmp_path / "run", 4, interrupt)
    with text_file.open("a") as file:
        file.write(json.dumps({"text": "One more page."}) + "\n")
    with pytest.raises(UsageError, match=r"has changed since .*\(sha256 [0-9a-f]{12} -> [0-9a-f]{12}\)"):
        train(settings_for(**RESUMABLE), tmp_path / "run", resume=True, device="cpu")


def test_resuming_what_is_finished(settings_for: Make, tmp_path: Path) -> None:
    train(settings_for(steps=1), tmp_path / "run", device="cpu")
    with pytest.raises(UsageError, match="finished at step 1: nothing to resume"):
        train(settings_for(steps=1), tmp_path / "run", resume=True, device="cpu")


@pytest.mark.parametrize(
    "change", [lambda text: text[:-20], lambda text: text.replace('"corpus"', '"x"'), lambda text: "[1]"]
)
def test_resuming_a_damaged_record(
    change: Callable[[str], str], settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {"schema_version": 1, "settings": {}, "finished": False, "step": 0, "corpus": {"sha256": ""}}
    (tmp_path / "run.json").write_text(change(json.dumps(record)))
    with pytest.raises(LowRankError, match=r"run\.json is damaged: .*\nhint: restore it from a copy"):
        run.stored_settings(tmp_path)


def test_resuming_nothing(settings_for: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing to resume in .*: it has no run.json"):
        train(settings_for(), tmp_path / "run", resume=True, device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_written_over(settings_for: Make, tmp_path: Path) -> None:
    train(settings_for(steps=1), tmp_path / "run", device="cpu")
    before = weights(tmp_path / "run")
    with pytest.raises(UsageError, match="is not empty"):
        train(settings_for(steps=2), tmp_path / "run", device="cpu")
    assert equal(before, weights(tmp_path / "run"))


# What cannot be trained on leaves no folder


def refused(settings: TrainSettings, output: Path, error: type[LowRankError], message: str) -> None:
    with pytest.raises(error, match=message):
        train(settings, output, device="cpu")
    assert not output.exists()


def test_text_shorter_than_a_block(settings_for: Make, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("The gate was open.\nThe wheel stood still.\n")
    settings = settings_for(text=str(tmp_path / "short.txt"))
    refused(settings, tmp_path / "run", UsageError, r"\d+ tokens, fewer than one block of 32")


def test_blocks_longer_than_the_context(settings_for: Make, tmp_path: Path) -> None:
    refused(settings_for(block_tokens=33), tmp_path / "run", UsageError, "blocks of 33 tokens are longer than the cont")


def test_a_tokenizer_of_another_model(
    settings_for: Make, tiny_llama: Callable[..., LlamaForCausalLM], tiny_llama_folder: Path, tmp_path: Path
) -> None:
    tiny_llama(vocab_size=300).save_pretrained(tmp_path / "model")
    settings = settings_for(model=str(tmp_path / "model"), tokenizer=str(tiny_llama_folder))
    refused(settings, tmp_path / "run", UsageError, r"token id 3\d\d, but .* knows 300 tokens")


def test_an_architecture_without_matrices(settings_for: Make, config_file: Path, tmp_path: Path) -> None:
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"num_hidden_layers": 0}))
    refused(settings_for(), tmp_path / "run", UsageError, "no matrix found in LlamaForCausalLM")


def test_a_truncated_checkpoint(settings_for: Make, tiny_llama_folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))
    shard = model / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(settings_for(model=str(model)), tmp_path / "run", LowRankError, r"model\.safetensors")


@pytest.mark.parametrize("given", [{"model": "no/such/model"}, {"tokenizer": "no/such/tokenizer"}])
def test_no_such_model(settings_for: Make, given: dict[str, str], tmp_path: Path) -> None:
    refused(settings_for(**given), tmp_path / "run", UsageError, "no such model folder")


def test_weights_that_are_not_finite(settings_for: Make, tiny_llama_folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))
    tensors = weights(model)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = math.inf
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LowRankError, match="is not finite at step 0"):
        train(settings_for(model=str(model)), tmp_path / "run", device="cpu")
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_a_learning_rate_that_blows_up(settings_for: Make, tmp_path: Path) -> None:
    with pytest.raises(LowRankError, match=r"is not finite at step [1-7]; .*\nhint: lower the learning rate"):
        train(settings_for(lr=1e30, warmup=0.0), tmp_path / "run", device="cpu")
    assert not list((tmp_path / "run").glob("*.safetensors"))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["finished"] is False


def test_a_full_disk(settings_for: Make, tmp_path: Path) -> None:
    """At the beginning nothing is left; at the end what was there, and room again brings the same model."""
    settings = settings_for(steps=3, save_every=2)
    train(settings, tmp_path / "whole", device="cpu")
    with files_of_at_most(1000), pytest.raises(LowRankError, match=r"run: File too large: it takes [\d,]+ bytes"):
        train(settings, tmp_path / "run", device="cpu")
    assert [path.name for path in tmp_path.glob("*run*")] == []
    config = "model.safetensors: File too large: it takes [\\d,]+ bytes, [\\d,]+ are free\nhint: .*--resume -o "
    with files_of_at_most(60_000), pytest.raises(LowRankError, match=config):
        train(settings_for(steps=3), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run" / ".saving").exists()
    assert not list((tmp_path / "run").glob("*.safetensors"))
    train(settings_for(steps=3), tmp_path / "run", resume=True, device="cpu")
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_the_weights_come_last(settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run killed while it saves leaves a folder without weights, which resumes."""
    settings = settings_for(steps=3, save_every=2)
    train(settings, tmp_path / "whole", device="cpu")

    def full(self: Any, folder: Path, **_: Any) -> None:
        Path(folder).mkdir()
        (Path(folder) / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(LlamaForCausalLM, "save_pretrained", full)
        # Checkpoints are saved with it too.
        with pytest.raises(LowRankError, match="No space left"):
            train(settings_for(steps=3), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run" / "config.json").exists()
    with pytest.raises(UsageError, match=r"no config\.json"):
        Checkpoint.open(tmp_path / "run")
    train(settings_for(steps=3), tmp_path / "run", resume=True, device="cpu")
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    assert not (tmp_path / "run" / ".saving").exists()
