"""`lowrank train`: what it says and writes, what it refuses with which exit code, and how it goes on after Ctrl-C."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cli.main import run
from lowrank_kit.training.callbacks import ProgressLog
from tests.pages import write_pages

Arguments = Callable[..., list[str]]
MODEL = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
MODEL |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.fixture
def arguments(tmp_path: Path) -> Arguments:
    """`arguments("--lr", "0.1")`: a command line that trains for four steps into tmp_path/run, and what is added."""
    (tmp_path / "tiny.json").write_text(json.dumps(MODEL))
    write_pages(tmp_path / "pages.jsonl")

    def make(*added: str, **changes: str | None) -> list[str]:
        options: dict[str, str | None] = {
            "model_config": str(tmp_path / "tiny.json"),
            "text": str(tmp_path / "pages.jsonl"),
            "vocab_size": "384",
            "steps": "4",
            "batch_size": "4",
            "block_tokens": "32",
            "log_every": "1",
            "device": "cpu",
            "output": str(tmp_path / "run"),
        }
        given = [(name, value) for name, value in (options | changes).items() if value is not None]
        return ["train", *(word for name, value in given for word in (f"--{name.replace('_', '-')}", value)), *added]

    return make


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`stop_at(step)`: Ctrl-C at the end of that step; 0: never."""
    on_step_end = ProgressLog.on_step_end

    def at(step: int) -> None:
        def stopping(self: ProgressLog, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            on_step_end(self, args, state, control, **kwargs)
            if state.global_step == step:
                raise KeyboardInterrupt

        monkeypatch.setattr(ProgressLog, "on_step_end", stopping)

    return at


def said(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err


def test_train_and_what_it_says_next(arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments()) == 0
    lines, _ = said(capsys)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["finished"]
    loss = record["validation_loss"]
    numbers, share = record["parameters"], record["matrix_parameters"] / record["parameters"]
    assert lines[:3] == [
        f"trained {numbers:,} parameters, {share:.0%} of them in matrices, for 4 steps of 128 tokens",
        f"validation loss {loss:.4f} nats per token, perplexity {math.exp(loss):.2f}",
        f"wrote {tmp_path / 'run'}",
    ]
    word, command = lines[3].split(" lowrank ")
    assert word == "next:"
    # A hint is a command that runs.
    assert run(shlex.split(command)) == 0
    assert (tmp_path / "run-half" / "compression.json").is_file()


def test_json_is_one_document(arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments("--json", "--eval-every", "2", "--save-every", "2")) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "run" / "run.json").read_text())
    assert document["schema_version"] == 1
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 4 + 3


def test_tokens_in_place_of_steps(arguments: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments("--json", steps=None, tokens="129")) == 0
    assert json.loads(capsys.readouterr().out)["num_steps"] == 2


def test_a_settings_file_with_flags_over_it(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("optimizer: adamw\nlr: 1e-3\nsteps: 3\nlog_every: 3\n")
    command = arguments("--json", "--config", str(tmp_path / "run.yaml"), "--steps", "1", steps=None)
    assert run(command) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    # --log-every is written out in the command line, --optimizer is left at its default there.
    assert [settings[key] for key in ("optimizer", "lr", "steps", "log_every")] == ["adamw", 1e-3, 1, 1]


OVERRIDES = ["*.o_proj.*=adamw", "*.down_proj.*=rank_schedule=fixed:0.5"]


def test_text_from_the_cache(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))
    assert run(arguments("--stream", "--packing", "documents", "--json")) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert (settings["stream"], settings["packing"]) == (True, "documents")
    assert len(list((tmp_path / "cache").rglob("tokens.bin"))) == 2


def test_a_text_that_ends_in_the_middle_of_a_line(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pages.jsonl").write_bytes((tmp_path / "pages.jsonl").read_bytes()[:-9])
    for streaming in ("--stream", "--no-stream"):
        assert run(arguments(streaming)) == 1
        assert "pages.jsonl, line 60: the last line is cut off after" in said(capsys)[1]
        assert not (tmp_path / "run").exists()


def test_options_of_the_optimizer(arguments: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    by_name = [word for line in OVERRIDES for word in ("--override", line)]
    momentum = ["--momentum", "0.9", "--no-nesterov"]
    assert (
        run(
            arguments(
                "--json", "-v", "--topk", "exact", "--spectral-decay", "0.1", "--rank", "fixed:0.5", *by_name, *momentum
            )
        )
        == 0
    )
    captured = capsys.readouterr()
    expected = {"topk": "exact", "spectral_decay": 0.1, "overrides": OVERRIDES, "momentum": 0.9, "nesterov": False}
    settings = json.loads(captured.out)["settings"]
    assert {key: settings[key] for key in expected} == expected
    # It says what steps what before it starts.
    assert re.search(r"^o +1 +16 x 16 +adamw +0\.002 +-$", captured.err, re.MULTILINE)
    assert re.search(r"^down +1 +16 x 32 +numuon +0\.01 +8 of 16$", captured.err, re.MULTILINE)


@pytest.mark.parametrize("in_file", [True, False], ids=["file", "flags"])
def test_resuming_with_overrides(
    in_file: bool,
    arguments: Arguments,
    tmp_path: Path,
    stop_at: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They are a list in the file that stores them."""
    (tmp_path / "run.yaml").write_text(f"overrides: {json.dumps(OVERRIDES)}\n")
    by_name = [word for line in OVERRIDES for word in ("--override", line)]
    given = ["--config", str(tmp_path / "run.yaml")] if in_file else by_name
    stop_at(2)
    assert run(arguments("--save-every", "1", *given)) == 130
    again = ["train", "--resume", "-o", str(tmp_path / "run"), "--device", "cpu", "--json"]
    capsys.readouterr()
    assert run([*again, "--override", "*.o_proj.*=sgd"]) == 2
    assert f'overrides: {json.dumps(OVERRIDES)} -> ["*.o_proj.*=sgd"]' in said(capsys)[1]
    stop_at(0)
    assert run(again) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["overrides"] == OVERRIDES


def test_fine_tuning(
    arguments: Arguments, tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments(str(tiny_llama_folder), "--json", model_config=None, vocab_size=None)) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["model"] == str(tiny_llama_folder)
    assert (
        load_file(tmp_path / "run" / "model.safetensors").keys()
        == load_file(tiny_llama_folder / "model.safetensors").keys()
    )


@pytest.mark.parametrize(
    ("added", "changes", "code", "error", "hint"),
    [
        ([], {"model_config": None}, 2, "give exactly one of MODEL", "lowrank train --model-config 1m"),
        ([], {"model_config": "13m"}, 2, 'no model config "13m"', 'did you mean "1m"?'),
        ([], {"steps": None}, 2, "give exactly one of --steps and --tokens", "--steps 1000"),
        ([], {"steps": "many"}, 2, "Invalid value for '--steps'", "lowrank train --help"),
        ([], {"output": None}, 2, "no output folder", "-o DIR, or --dry-run"),
        (["--optimizer", "numoun"], {}, 2, 'unknown optimizer "numoun"', 'did you mean "numuon"?'),
        (["--rank", "cosin:1"], {}, 2, 'unknown rank schedule "cosin"', 'did you mean "cosine"?'),
        (["--topk", "wram"], {}, 2, 'unknown topk "wram"', 'did you mean "warm"?'),
        (["--override", "*.o_proj.*"], {}, 2, 'PATTERN=RULE or PATTERN=KEY=VALUE, got "*.o_proj.*"', '"*.o_proj.*=ad'),
        (["--override", "*.o_prj.*=adamw"], {}, 2, 'the pattern "*.o_prj.*" matches none', "names are as"),
        (["--spectral-decay", "-1"], {}, 2, "spectral_decay must be at least 0, got -1", "--spectral-decay 0.4"),
        (["--lr", "nan"], {}, 2, "command line: lr must be a number or null, not NaN", ""),
        (["--lr-schedule", "linea"], {}, 2, 'unknown lr schedule "linea"', 'did you mean "linear"?'),
        (["--lr-schedule", "wsd", "--decay-share", "1"], {}, 2, "decay_share must be above 0", "--decay-share 0.2"),
        (["--lr-schedule", "linear", "--min-lr", "0.1"], {}, 2, "min_lr is for the lr sch", "--lr-schedule wsd"),
        (["--tracker", "tensorbord"], {}, 2, 'unknown tracker "tensorbord"', 'did you mean "tensorboard"?'),
        ([], {"text": "no/such/text"}, 2, "no such text source: no/such/text", "a text source is a file or folder"),
        ([], {"block_tokens": "65"}, 2, "blocks of 65 tokens are longer", "--block-tokens 64"),
        ([], {"vocab_size": "256"}, 2, "needs at least 257 tokens, got 256", "4096"),
        ([], {"device": "gpu"}, 2, "'gpu' is not one of auto, cpu", "lowrank train --help"),
        (["--lora", "2"], {}, 2, "--lora fine-tunes a MODEL", "leave out --lora"),
        (["--lora-roles", "q"], {}, 2, "--lora-alpha and --lora-roles are of --lora", "--lora 16"),
        (["--tokenizer", "no/such/one"], {}, 2, "no such model folder: no/such/one", "give a folder"),
    ],
)
def test_refused_and_nothing_made(
    added: list[str],
    changes: dict[str, str | None],
    code: int,
    error: str,
    hint: str,
    arguments: Arguments,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert run(arguments(*added, **changes)) == code
    lines, told = said(capsys)
    assert lines == []
    assert told.startswith("error: ")
    assert error in told
    assert f"hint: {hint}" in told or not hint
    assert sorted(tmp_path.rglob("*")) == before


def test_text_shorter_than_a_block(arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("The gate was open.\nThe wheel stood still.\n")
    assert run(arguments(text=str(tmp_path / "short.txt"))) == 2
    assert "tokens, fewer than one block of 32\nhint: " in said(capsys)[1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimiser: adamw\n", 'unknown key "optimiser"\nhint: did you mean "optimizer"?'),
        ("steps: many\n", "steps must be a whole number or null"),
        ("steps: 3\nsteps: 4\n", 'key "steps" is written twice'),
    ],
)
def test_a_settings_file_that_is_wrong(
    text: str, message: str, arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert run(arguments("--config", str(tmp_path / "run.yaml"), steps=None)) == 2
    told = said(capsys)[1]
    assert str(tmp_path / "run.yaml") in told
    assert message in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            MODEL | {"hiden_size": 8},
            'keys that llama does not know: hiden_size\nhint: "hiden_size": did you mean "hidden_',
        ),
        (
            MODEL | {"model_type": "lama"},
            'model_type "lama" is no causal language model of transformers\nhint: did you',
        ),
        (MODEL | {"num_hidden_layers": 0}, "no matrix found in LlamaForCausalLM"),
    ],
)
def test_a_model_config_that_is_wrong(
    config: dict[str, Any], message: str, arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    assert run(arguments()) == 2
    assert message in said(capsys)[1]
    assert not (tmp_path / "run").exists()


def test_an_output_that_is_not_empty(arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("mine")
    assert run(arguments()) == 2
    assert "is not empty (1 entries)\nhint: give another folder with -o" in said(capsys)[1]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine"]


def test_a_broken_checkpoint_to_fine_tune(
    arguments: Arguments, tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))
    shard = model / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    assert run(arguments(str(model), model_config=None)) == 1
    assert "hint: the file is damaged or incomplete" in said(capsys)[1]
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges(arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments("--lr", "1e30", "--warmup", "0")) == 1
    told = said(capsys)[1]
    assert "is not finite at step " in told
    assert "hint: lower the learning rate" in told
    assert not (tmp_path / "run" / "model.safetensors").exists()


# Fine-tuning


def test_fine_tuning_on_conversations(
    arguments: Arguments, tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes"}]} for i in range(20)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tune = arguments(str(tiny_llama_folder), model_config=None, vocab_size=None, text=str(tmp_path / "chat.jsonl"))
    assert run(tune) == 0
    lines, told = said(capsys)
    assert "18 conversations to train on" in told
    assert "the tokenizer has no chat template" in told
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert lines[0].endswith(f"for 4 steps of {record['step_tokens']} tokens")
    assert " nats per answer token, perplexity " in lines[1]
    assert run(shlex.split(lines[3].split(" lowrank ")[1])) == 0
    rows.append({"messages": [{"role": "user", "content": "?"}]})
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run([*tune, "--output", str(tmp_path / "other")]) == 1
    assert 'chat.jsonl:21: the conversation has no message of the role "assistant"' in said(capsys)[1]
    assert not (tmp_path / "other").exists()


def test_lora_and_what_it_says_next(
    arguments: Arguments, tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [str(tiny_llama_folder), "--lora", "2", "--lora-roles", "q, down"]
    assert run(arguments(*model, model_config=None, vocab_size=None)) == 0
    lines, told = said(capsys)
    assert re.search(r"^adapters +8 +- +adamw +0\.002 +-$", told, re.MULTILINE)
    assert lines[0].startswith("trained 704 parameters of adapters beside ")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["lora_roles"] == ["q", "down"]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert run(shlex.split(lines[3].split(" lowrank ")[1])) == 0


# Before any work


def test_a_dry_run_writes_nothing_and_reads_no_text(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    given = arguments("--dry-run", output=None, text="no/such/text")
    assert run(given) == 0
    lines, _ = said(capsys)
    assert lines[-1] == "nothing written (--dry-run)"
    assert run([*given, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema_version"] == 1
    assert (document["steps"], document["tokens"]) == (4, 512)
    assert f"{document['parameters']['total']:,}" in next(line for line in lines if line.startswith("parameters"))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("dry", [True, False], ids=["dry", "real"])
def test_a_run_that_does_not_fit(
    dry: bool, arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(MODEL | {"hidden_size": 2**18, "intermediate_size": 2**20}))
    before = sorted(tmp_path.rglob("*"))
    assert run(arguments(*["--dry-run"] * dry)) == 3
    lines, told = said(capsys)
    # A dry run tells what is asked for all the same.
    assert bool(lines) == dry
    assert told.startswith("error: the run needs at least ")
    assert "TB and cpu has " in told
    assert "\nhint: a smaller model" in told
    assert sorted(tmp_path.rglob("*")) == before


# Ctrl-C and resume


def test_the_hint_after_ctrl_c_goes_on(
    arguments: Arguments, tmp_path: Path, stop_at: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    saving = ["--save-every", "1"]
    folder = tmp_path / "a run"  # a shell would split it
    assert run(arguments(*saving, output=str(tmp_path / "whole"))) == 0
    stop_at(3)
    assert run(arguments(*saving, output=str(folder))) == 130
    _, told = said(capsys)
    hint = told.rpartition("interrupted\nhint: ")[2].strip()
    assert hint == f"lowrank train --resume -o '{folder}'"
    stop_at(0)
    assert run(shlex.split(hint)[1:]) == 0
    assert said(capsys)[0][0].endswith("for 4 steps of 128 tokens")
    whole, resumed = (load_file(path / "model.safetensors") for path in (tmp_path / "whole", folder))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_sigterm_saves_and_says_how_to_go_on(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_step_end = ProgressLog.on_step_end

    def killing(self: ProgressLog, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(ProgressLog, "on_step_end", killing)
        assert run(arguments("--save-every", "3")) == 143
    hint = said(capsys)[1].rpartition("terminated\nhint: ")[2].strip()
    assert hint == f"lowrank train --resume -o {tmp_path / 'run'}"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert run(shlex.split(hint)[1:]) == 0
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_no_hint_where_nothing_was_saved(
    arguments: Arguments, stop_at: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    stop_at(2)
    assert run(arguments()) == 130
    assert said(capsys)[1].endswith("interrupted\n")


def test_resuming_with_other_flags(
    arguments: Arguments, tmp_path: Path, stop_at: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    stop_at(2)
    run(arguments("--save-every", "1"))
    capsys.readouterr()
    again = ["train", "--resume", "-o", str(tmp_path / "run"), "--device", "cpu"]
    assert run([*again, "--lr", "0.5"]) == 2
    assert "started with other settings: lr: null -> 0.5\nhint: resume with the same" in said(capsys)[1]
    # A settings file counts as well as a flag.
    (tmp_path / "other.yaml").write_text("model_config: 1m\nsteps: 9\n")
    assert run([*again, "--config", str(tmp_path / "other.yaml")]) == 2
    assert "steps: 4 -> 9" in said(capsys)[1]
    # The same, spelled out again.
    stop_at(0)
    assert run([*arguments("--save-every", "1"), "--resume"]) == 0


def test_resuming_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--resume", "-o", str(tmp_path / "run")]) == 2
    assert "nothing to resume in" in (told := said(capsys)[1])
    assert "hint: leave out --resume to start" in told
    assert not (tmp_path / "run").exists()


def test_resuming_what_is_finished(arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments(steps="1")) == 0
    assert run(["train", "--resume", "-o", str(tmp_path / "run")]) == 2
    assert "is finished at step 1: nothing to resume" in said(capsys)[1]
