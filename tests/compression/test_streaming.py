"""A model of which one block at a time is in memory: the same result, interrupted or not, in memory or spilled."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import PreTrainedModel

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.partial import PartialModel
from lowrank_kit.compression import fold, run, work
from lowrank_kit.compression.calibration import calibrate
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.errors import LowRankError, UsageError
from tests.compression.folders import once, report_of, weights
from tests.families import FAMILIES, build

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "calibration_blocks": 12,
    "check_blocks": 4,
    "refine_blocks": 8,
    "block_tokens": 32,
    "batch_size": 4,
    "block_epochs": 1,
    "e2e_epochs": 1,
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"objective": "plain"},
    "whiten": {"objective": "whiten"},
    "lagrange": {"objective": "whiten", "allocation": "lagrange"},
    "loss": {"objective": "two-sided", "allocation": "loss", "form": "auto"},
    "anchored": {"objective": "anchored"},
    "all": {"objective": "anchored-two-sided", "allocation": "loss", "form": "auto", "refine": "both"},
}


def settings_of(way: str, text: str, **given: Any) -> CompressSettings:
    asked: dict[str, Any] = {"keep": 0.5, "text": text, **SMALL, **WAYS[way], **given}
    return CompressSettings(**asked)


@pytest.fixture(scope="module")
def uninterrupted(
    tiny_llama_folder: Path, text_file: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """`uninterrupted(way)`: what is to come out, made once."""
    return once(
        tmp_path_factory.mktemp("uninterrupted"),
        lambda way, folder: compress(tiny_llama_folder, folder, settings_of(way, text_file), device="cpu"),
    )


@pytest.mark.parametrize("way", ["whiten", "lagrange", "loss", "anchored"])
def test_the_same_as_with_the_model_whole(
    way: str, uninterrupted: Callable[[str], Path], tiny_llama_folder: Path, text_file: str, tmp_path: Path
) -> None:
    settings = settings_of(way, text_file)
    calibration = calibrate(Checkpoint.open(tiny_llama_folder), settings, device="cpu")
    whole = compress(tiny_llama_folder, tmp_path / "whole", settings, calibration=calibration, device="cpu")
    streamed = report_of(uninterrupted(way))
    for one, other in zip(whole["matrices"], streamed["matrices"], strict=True):
        assert one["rank"] == other["rank"]
        if one["rank"] is not None:
            assert one["relative_error"] == pytest.approx(other["relative_error"], 1e-3)
    for name, loss in whole["check"].items():
        assert loss == pytest.approx(streamed["check"][name], 1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_spilled_is_the_same_to_the_byte_and_leaves_no_file(
    way: str, uninterrupted: Callable[[str], Path], tiny_llama_folder: Path, text_file: str, tmp_path: Path
) -> None:
    compress(tiny_llama_folder, tmp_path / "out", settings_of(way, text_file), device="cpu", spill=tmp_path / "spill")
    assert weights(tmp_path / "out") == weights(uninterrupted(way))
    assert not any((tmp_path / "spill").rglob("*"))
    assert not (tmp_path / "out.partial").exists()


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def killed_after(monkeypatch: pytest.MonkeyPatch, files: int) -> list[str]:
    """Writing files of the work folder stops after so many."""
    written: list[str] = []
    write = work.write_tensors

    def stop(path: Path, *args: Any) -> None:
        if len(written) == files:
            raise Killed
        write(path, *args)
        written.append(path.name)

    monkeypatch.setattr(work, "write_tensors", stop)
    monkeypatch.setattr("lowrank_kit.compression.survey.write_tensors", stop)
    return written


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("way", ["whiten", "lagrange", "loss", "all"])
def test_interrupted_after_every_file_it_goes_on_to_the_same_bytes(
    way: str,
    spilled: bool,
    uninterrupted: Callable[[str], Path],
    tiny_llama_folder: Path,
    text_file: str,
    tmp_path: Path,
) -> None:
    settings, spill = settings_of(way, text_file), tmp_path / "spill" if spilled else None
    done = 0
    while True:
        with pytest.MonkeyPatch.context() as patch:
            written = killed_after(patch, 1)
            try:
                compress(tiny_llama_folder, tmp_path / "out", settings, device="cpu", resume=bool(done), spill=spill)
                break
            except Killed:
                assert len(written) == 1, "nothing was gained"
                done += 1
    assert done == {"whiten": 2, "lagrange": 4, "loss": 4, "all": 5}[way]
    assert weights(tmp_path / "out") == weights(uninterrupted(way))
    assert report_of(tmp_path / "out")["check"] == report_of(uninterrupted(way))["check"]
    assert sorted(path.name for path in tmp_path.iterdir()) == (["out", "spill"] if spilled else ["out"])


def test_killed_by_a_signal_it_goes_on(
    uninterrupted: Callable[[str], Path], tiny_llama_folder: Path, text_file: str, tmp_path: Path
) -> None:
    settings = settings_of("all", text_file)
    script = (
        "import sys, json, torch\nfrom lowrank_kit.compression.run import compress\n"
        "from lowrank_kit.compression.settings import CompressSettings\n"
        "torch.set_num_threads(int(sys.argv[4]))  # it is part of what a run must agree on to be gone on with\n"
        "compress(sys.argv[1], sys.argv[2], CompressSettings(**json.loads(sys.argv[3])), device='cpu')"
    )
    given = json.dumps({"keep": 0.5, "text": text_file} | SMALL | WAYS["all"])
    arguments = [str(tiny_llama_folder), str(tmp_path / "out"), given, str(torch.get_num_threads())]
    process = subprocess.Popen([sys.executable, "-c", script, *arguments])
    sections = tmp_path / "out.partial" / "sections"
    waiting = threading.Event()
    while process.poll() is None and not any(sections.glob("*.safetensors")):
        waiting.wait(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(UsageError, match=r"has left \d+ finished parts.*\n.*--resume"):
        compress(tiny_llama_folder, tmp_path / "out", settings, device="cpu")
    compress(tiny_llama_folder, tmp_path / "out", settings, device="cpu", resume=True)
    assert weights(tmp_path / "out") == weights(uninterrupted("all"))


def test_killed_while_the_result_is_written_or_named(
    uninterrupted: Callable[[str], Path],
    tiny_llama_folder: Path,
    text_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings, output = settings_of("whiten", text_file), tmp_path / "out"
    output.mkdir()

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise Killed

    for name in ("write_shards", "write_documents"):
        with monkeypatch.context() as patch:
            patch.setattr(run, name, stop)
            with pytest.raises(Killed):
                compress(tiny_llama_folder, output, settings, device="cpu", resume=True)
        assert not any(output.iterdir())
    moved: list[Path] = []
    replace = Path.replace

    def move(path: Path, target: Path) -> Path:
        if target.parent == output:
            moved.append(path)
            if len(moved) == 3:
                raise Killed
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", move)
        with pytest.raises(Killed):
            compress(tiny_llama_folder, output, settings, device="cpu", resume=True)
    assert len(list(output.iterdir())) == 2
    compress(tiny_llama_folder, output, settings, device="cpu", resume=True)
    assert weights(output) == weights(uninterrupted("whiten"))
    assert {p.name for p in output.iterdir()} == {p.name for p in uninterrupted("whiten").iterdir()}


def test_killed_while_the_rest_is_removed(
    uninterrupted: Callable[[str], Path],
    tiny_llama_folder: Path,
    text_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings, output = settings_of("whiten", text_file), tmp_path / "out"
    remove, expected = work._remove, weights(uninterrupted("whiten"))
    removed: list[str] = []

    def stop(path: Path) -> None:
        if path.name not in removed:
            removed.append(path.name)
            raise Killed
        remove(path)

    monkeypatch.setattr(work, "_remove", stop)
    monkeypatch.setattr(work.WorkFolder, "_leave", lambda *_: None)  # a kill leaves no time for it
    for _ in range(20):
        with contextlib.suppress(Killed):
            compress(tiny_llama_folder, output, settings, device="cpu", resume=True)
            break
        assert weights(output) == expected
    assert {"sections", "manifest.json"} < set(removed)
    assert removed[-1] == work.WHOLE
    assert weights(output) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.fixture
def stopped(tiny_llama_folder: Path, text_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output of a run that stopped after a block."""
    with monkeypatch.context() as patch:
        killed_after(patch, 1)
        with pytest.raises(Killed):
            compress(tiny_llama_folder, tmp_path / "out", settings_of("whiten", text_file), device="cpu")
    return tmp_path / "out"


def test_after_an_error_it_is_told_how_to_go_on(
    tiny_llama_folder: Path, text_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        killed_after(patch, 1)
        with pytest.raises(Killed):
            compress(tiny_llama_folder, tmp_path / "out", settings_of("whiten", text_file), device="cpu")
    assert f"1 finished parts are kept in {tmp_path / 'out.partial'}: the same with --resume goes on" in caplog.text


def test_another_setting_is_refused_with_the_difference(stopped: Path, tiny_llama_folder: Path, text_file: str) -> None:
    before = sorted(stopped.parent.rglob("*"))
    for given, told in (({"keep": 0.4}, r"settings, keep: 0.5 -> 0.4"), ({"seed": 1}, "settings, seed: 0 -> 1")):
        with pytest.raises(UsageError, match=told):
            compress(tiny_llama_folder, stopped, settings_of("whiten", text_file, **given), device="cpu", resume=True)
    assert sorted(stopped.parent.rglob("*")) == before


def test_other_numbers_of_threads_are_refused(
    stopped: Path, tiny_llama_folder: Path, text_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with pytest.raises(UsageError, match=r"run, threads: \d+ -> 77"):
        compress(tiny_llama_folder, stopped, settings_of("whiten", text_file), device="cpu", resume=True)


def test_another_model_is_refused(stopped: Path, tiny_llama_folder: Path, text_file: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_llama_folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    with pytest.raises(UsageError, match=r"files, config.json: .* -> "):
        compress(other, stopped, settings_of("whiten", text_file), device="cpu", resume=True)


def test_two_processes_on_one_output_are_refused(tiny_llama_folder: Path, text_file: str, tmp_path: Path) -> None:
    folder = tmp_path / "out.partial"
    folder.mkdir()
    with FileLock(folder / "lock"), pytest.raises(UsageError, match="another process is at work on this output"):
        compress(tiny_llama_folder, tmp_path / "out", settings_of("plain", text_file))


def test_an_error_keeps_what_is_finished_and_nothing_else(
    tiny_llama_folder: Path, text_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> Any:
        raise LowRankError("stopped")

    settings = settings_of("whiten", text_file)
    with monkeypatch.context() as patch:
        patch.setattr("lowrank_kit.compression.fold.cut", stop)
        with pytest.raises(LowRankError, match="stopped"):
            compress(tiny_llama_folder, tmp_path / "a" / "out", settings, device="cpu")
    assert not any(tmp_path.iterdir())


def test_one_block_at_a_time_is_in_memory(
    tiny_llama_folder: Path, text_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[PreTrainedModel] = []
    filled: list[set[str]] = []
    fill = PartialModel.fill

    def watch(parts: PartialModel, names: list[str]) -> None:
        fill(parts, names)
        models.append(parts.model)
        there = {name for name, p in parts.model.named_parameters() if not p.is_meta}
        filled.append({".".join(name.split(".")[:3]) for name in there})

    monkeypatch.setattr(PartialModel, "fill", watch)
    compress(tiny_llama_folder, tmp_path / "out", settings_of("loss", text_file), device="cpu")
    blocks = [{name for name in there if name.startswith("model.layers.")} for there in filled]
    assert max(map(len, blocks)) == 1
    assert all(not there or len(filled[i]) == 1 for i, there in enumerate(blocks)), "a block and what is outside"
    assert not any({"lm_head.weight", "model.embed_tokens.weight"} <= there for there in filled)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set().union(*filled)
    assert all(p.is_meta for p in models[-1].parameters())


@pytest.mark.parametrize(("way", "there"), [("loss", False), ("anchored", True)])
def test_dense_weights_are_not_there_while_they_are_cut(
    way: str,
    there: bool,
    tiny_llama_folder: Path,
    text_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But where the block is run between one matrix and the next; and never while errors are found."""
    seen: dict[str, set[bool]] = {"_cut": set(), "errors_of": set()}
    chains: list[Any] = []

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def watching(*args: Any, **kwargs: Any) -> Any:
            if isinstance(args[0], fold.Fold):
                chains.append(args[0].chain)
            seen[name].add(any(not p.is_meta for p in chains[-1].block(0).parameters()))
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, watching)

    watch(fold.Fold, "_cut")
    watch(fold, "errors_of")
    compress(tiny_llama_folder, tmp_path / "out", settings_of(way, text_file), device="cpu")
    assert (True in seen["_cut"]) == there
    assert seen["errors_of"] == {False}


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_a_model_are_those_that_from_pretrained_loads(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    parts = PartialModel(Checkpoint.open(tmp_path), device=CPU, dtype=torch.float32)
    with parts.filled(parts.outside(())):
        state, expected = parts.model.state_dict(), model.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert all(p.is_meta for p in parts.model.parameters())
