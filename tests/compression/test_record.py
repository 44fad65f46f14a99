"""What a compression says of itself: true, measured on what is on disk, and enough to do it again."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from cli.main import lowrank
from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.loading import load_model, load_tokenizer
from lowrank_kit.compression.calibration import calibrate
from lowrank_kit.compression.record import command_line
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.compression.texts import draw_texts
from lowrank_kit.evaluation.perplexity import perplexity
from tests.compression.folders import once, report_of, weights

SMALL: dict[str, Any] = {
    "keep": 0.5,
    "calibration_blocks": 12,
    "check_blocks": 6,
    "refine_blocks": 12,
    "block_epochs": 2,
    "block_rate": 0.003,
    "e2e_epochs": 2,
    "e2e_rate": 0.003,
    "block_tokens": 32,
    "batch_size": 4,
}
WAYS: dict[str, dict[str, Any]] = {
    "whiten": {"objective": "whiten"},
    "anchored": {"objective": "anchored", "blend": 0.123456789, "form": "auto", "align": 2},
    "refined": {"objective": "whiten", "refine": "both", "form": "pivoted", "seed": 3},
    "all": {"objective": "anchored-two-sided", "allocation": "loss", "refine": "both", "seed": 1},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path, text_file: str) -> Callable[[str], Path]:
    """`made(way)`: the tiny Llama compressed, once."""
    return once(
        tmp_path_factory.mktemp("made"),
        lambda way, folder: compress(tiny_llama_folder, folder, settings_of(way, text_file), device="cpu"),
    )


def settings_of(way: str, text: str, **given: Any) -> CompressSettings:
    return CompressSettings(**(SMALL | {"text": text} | WAYS[way] | given))


@pytest.mark.parametrize("way", WAYS)
def test_the_command_does_the_same_again(
    way: str, made: Callable[[str], Path], tmp_path: Path, same_process_after: None
) -> None:
    words = shlex.split(report_of(made(way))["command"])
    assert words[:2] == ["lowrank", "compress"]
    assert words[-2:] == ["-o", "OUTPUT"]
    result = CliRunner().invoke(lowrank, [*words[1:-1], str(tmp_path / "again")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert weights(tmp_path / "again") == weights(made(way))
    again, first = report_of(tmp_path / "again"), report_of(made(way))
    assert again["command"] == first["command"]
    for report in (again, first):
        for timed in (*report["refined"].values(), *report["matrices"]):
            del timed["seconds"]
        for clock in ("seconds", "environment", "choice"):
            del report[clock]
    assert again == first


def test_a_command_has_what_is_not_by_default_and_all_digits() -> None:
    settings = CompressSettings(keep=1 / 3, objective="whiten", text="a file.txt", time=60.0, max_shard_bytes=10**6)
    words = shlex.split(command_line("some/model", settings, device="cuda:1", dtype="bfloat16"))
    assert words == [
        *("lowrank", "compress", "some/model", "--keep", "0.3333333333333333", "--objective", "whiten"),
        *("--text", "a file.txt", "--max-shard-bytes", "1000000", "--device", "cuda:1", "--dtype", "bfloat16"),
        *("-o", "OUTPUT"),
    ]
    assert "--size 123456789012 " in command_line("m", CompressSettings(size=123456789012))


@pytest.mark.parametrize("way", WAYS)
def test_the_loss_is_what_evaluation_says_of_the_folder(
    way: str, made: Callable[[str], Path], tiny_llama_folder: Path, text_file: str
) -> None:
    report, settings = report_of(made(way)), settings_of(way, text_file)
    texts = draw_texts(
        text_file,
        load_tokenizer(tiny_llama_folder),
        block_tokens=SMALL["block_tokens"],
        calibration=settings.calibration_blocks,
        check=settings.check_blocks,
        refinement=settings.refine_blocks if settings.refine == "both" else 0,
        seed=settings.seed,
    )
    assert texts.record() == report["calibration"]
    for key, folder in (("loss_dense", tiny_llama_folder), ("loss_compressed", made(way))):
        model = load_model(Checkpoint.open(folder), device=torch.device("cpu"), dtype=torch.float32)
        assert report["check"][key] == pytest.approx(perplexity(model, texts.check).loss_nats, rel=1e-5)
    card = (made(way) / "README.md").read_text()
    assert f"{report['check']['loss_compressed']:.4f} compressed" in card


def test_the_fields(made: Callable[[str], Path], tiny_llama_folder: Path) -> None:
    report = report_of(made("all"))
    assert set(report) == {
        *("schema_version", "model", "command", "settings", "totals", "calibration", "check", "refined", "matrices"),
        *("seconds", "environment", "choice", "forecast"),
    }
    assert {"torch", "transformers", "lowrank-kit"} <= set(report["environment"])
    stages = ["model.layers.0", "model.layers.1", "end to end"]
    assert list(report["refined"]) == stages
    for stage in report["refined"].values():
        assert set(stage) == {"before", "after", "steps", "tokens", "seconds"}
        assert stage["after"] <= stage["before"]
        assert stage["tokens"] == stage["steps"] * SMALL["batch_size"] * SMALL["block_tokens"]
    for row in report["matrices"]:
        assert (row["rank"] is None) == (row["kept_energy"] is None) == (row["relative_error"] is None)
        if row["rank"] is not None:
            assert 0 < row["kept_energy"] < 1
            assert 0 < row["relative_error"] < 2
            numbers = row["rank"] * (row["out"] + row["in"]) + 1
            assert row["kept"] == pytest.approx(numbers / (row["out"] * row["in"]))
    assert {"survey", "grams", "refine by block", "refine end to end"} <= set(report["seconds"])
    card = (made("all") / "README.md").read_text()
    assert "- allocation: loss" in card
    assert all(f"{stage}: " in card for stage in stages)
    # A folder on this machine is nobody else's business.
    assert str(tiny_llama_folder) not in card


def test_kept_and_removed(made: Callable[[str], Path], tiny_llama_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    for way in WAYS:
        totals = report_of(made(way))["totals"]
        assert totals["model_numbers_before"] == sum(p.numel() for p in model.parameters())
        assert 0.4 < totals["matrix_keep"] <= 0.5
        after = totals["model_numbers_before"] - totals["matrix_numbers_before"] + totals["matrix_numbers_after"]
        assert totals["model_numbers_after"] == after
        assert totals["bytes_after"] == sum(map(len, weights(made(way)).values()))


@pytest.mark.parametrize("way", ["anchored", "refined", "all"])
def test_two_budgets_of_one_calibration_are_two_runs(
    way: str, tiny_llama_folder: Path, text_file: str, tmp_path: Path
) -> None:
    calibration = calibrate(Checkpoint.open(tiny_llama_folder), settings_of(way, text_file), device="cpu")
    taken = dict(calibration.seconds)
    reports = []
    for keep in (0.35, 0.6):
        settings = settings_of(way, text_file, keep=keep)
        once = compress(tiny_llama_folder, tmp_path / f"once-{keep}", settings, calibration=calibration, device="cpu")
        fresh = calibrate(Checkpoint.open(tiny_llama_folder), settings, device="cpu")
        anew = compress(tiny_llama_folder, tmp_path / f"anew-{keep}", settings, calibration=fresh, device="cpu")
        assert weights(tmp_path / f"once-{keep}") == weights(tmp_path / f"anew-{keep}")
        for report in (once, anew):
            for row in report["matrices"]:
                del row["seconds"]
        for field in ("totals", "check", "calibration", "matrices", "settings", "command"):
            assert once[field] == anew[field]
        assert once["totals"]["matrix_keep"] <= keep
        reports.append(once)
    # Each has a clock of its own.
    assert calibration.seconds == taken
    for report in reports:
        refining = sum(stage["seconds"] for stage in report["refined"].values())
        told = sum(seconds for what, seconds in report["seconds"].items() if what.startswith("refine"))
        assert refining <= told <= 2 * refining + 0.5


def test_a_calibration_without_text_to_refine_on(tiny_llama_folder: Path, text_file: str, tmp_path: Path) -> None:
    settings = settings_of("refined", text_file)
    calibration = calibrate(Checkpoint.open(tiny_llama_folder), replace(settings, refine="none"), device="cpu")
    with pytest.raises(ValueError, match="no refinement text"):
        compress(tiny_llama_folder, tmp_path / "out", settings, calibration=calibration, device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_what_refinement_reads_changes_no_other_text(tiny_llama_folder: Path, text_file: str) -> None:
    plain, refined = (
        calibrate(
            Checkpoint.open(tiny_llama_folder), settings_of("whiten", text_file, refine=refine), device="cpu"
        ).texts
        for refine in (None, "both")
    )
    assert plain.refinement is None
    assert plain.calibration.sha256 == refined.calibration.sha256
    assert plain.check.sha256 == refined.check.sha256
