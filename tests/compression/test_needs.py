"""What a run takes: as many bytes as the tensors that it holds have; refused where the disk is too small."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cli.main import run
from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.compression import needs as module
from lowrank_kit.compression.calibration import calibrate
from lowrank_kit.compression.chain import Chain, block_paths
from lowrank_kit.compression.needs import AFTER, BEFORE, Needs, estimate_needs, planned_needs
from lowrank_kit.compression.plan import make_plan
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.errors import DoesNotFitError
from tests.families import build

SMALL: dict[str, Any] = {"keep": 0.5, "calibration_blocks": 6, "check_blocks": 3, "refine_blocks": 5, "batch_size": 2}


def settings(**given: Any) -> CompressSettings:
    return CompressSettings(**SMALL | {"block_tokens": 16, "objective": "whiten"} | given).with_defaults()


def needs(folder: Path, **given: Any) -> Needs:
    estimated = {name: given.pop(name) for name in ("dtype", "spill", "kept") if name in given}
    return estimate_needs(Checkpoint.open(folder), settings(**given), **estimated)


def nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "opt_projected", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_of_all_sections_are_those_of_the_model(
    dense: Callable[..., Path], family: str, dtype: torch.dtype
) -> None:
    model = build(family)
    found = needs(dense(family), dtype=dtype, kept=0.0)
    assert [section.section for section in found.sections][0::3] == [BEFORE, AFTER]
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight.numel()
    total = sum(section.weights for section in found.sections)
    assert total == dtype.itemsize * (sum(p.numel() for p in model.parameters()) + tied * head)
    blocks = block_paths(stored.matrix for stored in Checkpoint.open(dense(family)).matrices())
    for path, section in zip(blocks, found.sections[1:-1], strict=True):
        assert section.section == path
        assert section.weights == dtype.itemsize * sum(p.numel() for p in model.get_submodule(path).parameters())
    # Its factors are beside it, and trained in float32.
    half = needs(dense(family), dtype=dtype, kept=0.5, refine="block").sections[1]
    matrices = sum(
        stored.matrix.shape[0] * stored.matrix.shape[1]
        for stored in Checkpoint.open(dense(family)).matrices()
        if stored.matrix.block == 0
    )
    assert half.weights == 4 * found.sections[1].weights // dtype.itemsize + 4 * matrices // 2
    assert half.training == 5 * 4 * matrices // 2


def test_grams_streams_and_factors_have_the_bytes_of_the_real_ones(tiny_llama_folder: Path, text_file: str) -> None:
    asked = settings(objective="two-sided", allocation="loss", text=text_file, calibration_blocks=8)
    checkpoint = Checkpoint.open(tiny_llama_folder)
    calibration = calibrate(checkpoint, asked, device="cpu")
    found = estimate_needs(checkpoint, asked)
    grams: dict[int, dict[int, Tensor]] = {0: {}, 1: {}}
    for stored in checkpoint.matrices():
        here, known = grams[stored.matrix.block or 0], calibration.statistics[stored.matrix.name]
        for gram in (known.gram, known.output_gram):
            assert gram is not None
            here[id(gram)] = gram
    assert [section.grams for section in found.sections] == [0, *(nbytes(g.values()) for g in grams.values()), 0]
    factors = calibration.factors(checkpoint, "two-sided", asked.options).values()
    assert found.disk["survey"] == nbytes(tensor for one in factors for tensor in (one.A, one.B))
    model = build("llama")
    chain = Chain(model, ["model.layers.0", "model.layers.1"], torch.zeros(2, 16, dtype=torch.long), batch_size=2)
    one = next(chain.enter(torch.zeros(1, 16, dtype=torch.long))).nbytes
    # Backward: what each block and the head read, and a gradient; forward: calibration, and the check text twice.
    assert found.sections[1].streams == one * max(8 * (2 + 1 + 1), 8 + 2 * 3)
    assert needs(tiny_llama_folder).sections[1].streams == one * (6 + 2 * 3)
    assert needs(tiny_llama_folder, objective="anchored").sections[1].streams == one * (2 * 6 + 2 * 3)
    assert needs(tiny_llama_folder, refine="block").sections[1].streams == one * (6 + 2 * 3 + 2 * 5)
    spilled = needs(tiny_llama_folder, spill=True)
    assert {section.streams for section in spilled.sections} == {0}
    assert spilled.disk["streams"] == 2 * one * (6 + 2 * 3)


def test_more_is_asked_where_more_is_done(tiny_llama_folder: Path) -> None:
    ways: list[dict[str, Any]] = [
        {"objective": "plain"},
        {"objective": "whiten"},
        {"objective": "anchored"},
        {"objective": "anchored-two-sided", "allocation": "loss"},
        {"objective": "anchored-two-sided", "allocation": "loss", "refine": "block"},
    ]
    peaks = [needs(tiny_llama_folder, **way).memory for way in ways]
    assert peaks == sorted(peaks)
    assert len(set(peaks)) == len(peaks)
    assert {section.streams + section.grams for section in needs(tiny_llama_folder, objective="plain").sections} == {0}
    whole = needs(tiny_llama_folder, refine="e2e")
    numbers = sum(torch.Size(h.shape).numel() for h in Checkpoint.open(tiny_llama_folder).headers.values())
    assert whole.memory == whole.end_to_end > 2 * 4 * numbers
    assert needs(tiny_llama_folder).end_to_end == 0


def test_what_is_left_out_takes_nothing(tiny_llama_folder: Path) -> None:
    found = needs(tiny_llama_folder, include=("*.0.mlp.up_proj",), objective="two-sided", allocation="loss")
    assert [section.grams for section in found.sections] == [0, 8 * (32**2 + 80**2), 0, 0]
    assert found.disk["survey"] == 4 * (80 + 32) * 32


@pytest.mark.parametrize("given", [{}, {"allocation": "loss", "objective": "two-sided"}])
def test_too_little_disk(
    given: dict[str, Any], tiny_llama_folder: Path, text_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(text=text_file, calibration_blocks=8, **given)
    plan = make_plan(Checkpoint.open(tiny_llama_folder), settings())
    wanted = sum(planned_needs(plan, asked).disk.values())
    assert wanted >= 2 * plan.totals()["bytes_after"]
    seen: list[Path] = []

    def with_free(free: int) -> None:
        def usage(path: Path) -> SimpleNamespace:
            seen.append(path)
            return SimpleNamespace(free=free)

        monkeypatch.setattr(module.shutil, "disk_usage", usage)

    with_free(wanted - 1)
    with pytest.raises(DoesNotFitError) as raised:
        compress(tiny_llama_folder, tmp_path / "deep" / "out", asked, device="cpu")
    assert raised.value.exit_code == 3
    assert f"{wanted:,} bytes of disk are needed" in raised.value.message
    assert f"{wanted - 1:,} are free: output " in raised.value.message
    assert set(seen) == {tmp_path / "deep"}
    assert list(tmp_path.iterdir()) == []
    with_free(wanted)
    compress(tiny_llama_folder, tmp_path / "deep" / "out", asked, device="cpu")


def test_a_dry_run_tells_what_it_takes(
    tiny_llama_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    same_process_after: None,
) -> None:
    words = ["compress", str(tiny_llama_folder), "--keep", "0.5", "--objective", "whiten", "--device", "cpu"]
    words += ["--refine", "both", "--dry-run", "-o", str(tmp_path / "out")]
    assert run([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    found = told["needs"]
    assert (told["time_class"], found["fits"], found["warnings"]) == ("seconds", True, [])
    assert found["memory"] == max(found["end_to_end"], *(section["total"] for section in found["sections"]))
    for section in found["sections"]:
        parts = (section[name] for name in ("weights", "grams", "streams", "workspace", "training"))
        assert section["total"] == sum(parts)
    assert found["disk"]["output"] == told["totals"]["bytes_after"]
    assert found["disk_free"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)
    monkeypatch.setattr(module, "available_memory", lambda device: found["memory"] - 1)
    monkeypatch.setattr(module, "free_disk", lambda folder: found["disk"]["total"] - 1)
    assert run([*words, "--json"]) == 0  # a warning: an estimate does not refuse
    told = json.loads(capsys.readouterr().out)["needs"]
    assert (told["fits"], len(told["warnings"])) == (False, 2)
    assert run(words) == 0
    out = capsys.readouterr().out
    assert "may not fit: " in out
    assert "model.layers.0 to model.layers.1  " in out
    assert "time: seconds" in out
    assert run(words[:-2]) == 0
    assert "of disk are needed" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
