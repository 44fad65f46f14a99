"""Two processes make what one makes, up to the order of sums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lowrank_kit.compression import team
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.errors import UsageError
from tests.compression.processes import Job, launch
from tests.compression.test_streaming import SMALL, WAYS
from tests.families import FAMILIES

# Odd numbers, so that the shares are not alike.
TEXT = SMALL | {"calibration_blocks": 13, "check_blocks": 5, "refine_blocks": 9}


def asked(way: str, text: str, **given: Any) -> dict[str, Any]:
    return {"keep": 0.5, "text": text, **TEXT, **WAYS[way], **given}


@pytest.fixture(scope="module")
def tiny_mixtral_folder(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-mixtral"
    config = FAMILIES["mixtral"]()
    config.vocab_size = len(tiny_tokenizer)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(
    tiny_llama_folder: Path, tiny_mixtral_folder: Path, text_file: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """A folder with `NAME-2` of two processes for each of `NAME-1`, and what the first process printed."""
    root = tmp_path_factory.mktemp("team")
    jobs: list[Job] = [
        (str(tiny_llama_folder), str(root / f"{way}-2"), asked(way, text_file), {"spill": str(root / "spill")})
        for way in WAYS
    ]
    for way in ("whiten", "loss", "anchored"):
        jobs.append((str(tiny_mixtral_folder), str(root / f"mixtral-{way}-2"), asked(way, text_file), {}))
    jobs.append((str(tiny_llama_folder), str(root / "few"), asked("whiten", text_file, check_blocks=1), {}))
    done = launch(jobs, root / "jobs.json")
    assert [process.returncode for process in done] == [0, 0], done[0].stderr[-3000:] + done[1].stderr[-3000:]
    for model, output, settings, _ in jobs[:-1]:
        compress(model, output.removesuffix("2") + "1", CompressSettings(**settings), device="cpu")
    return root, done[0].stdout.splitlines()


def off(one: Path, other: Path) -> float:
    """Largest distance of a tensor in two folders, relative to its size."""
    tensors, others = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert tensors.keys() == others.keys()

    def apart(a: Tensor, b: Tensor) -> float:
        assert a.shape == b.shape
        return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))

    return max(apart(tensor, others[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", [*WAYS, "mixtral-whiten", "mixtral-loss", "mixtral-anchored"])
def test_two_processes_make_what_one_makes(name: str, made: tuple[Path, list[str]]) -> None:
    root, _ = made
    one, two = (json.loads((root / f"{name}-{n}" / "compression.json").read_text()) for n in (1, 2))
    assert [row["rank"] for row in two["matrices"]] == [row["rank"] for row in one["matrices"]]
    for a, b in zip(two["matrices"], one["matrices"], strict=True):
        assert a["relative_error"] == (b["relative_error"] and pytest.approx(b["relative_error"], 1e-3))
    for key, loss in (one["check"] or {}).items():
        assert two["check"][key] == pytest.approx(loss, 1e-4)
    for stage, refined in one["refined"].items():
        assert two["refined"][stage]["before"] == pytest.approx(refined["before"], 1e-3)
        assert two["refined"][stage]["after"] == pytest.approx(refined["after"], 2e-2)
    # Signs of directions are free, and training makes much of little: losses and errors have been compared.
    if name in ("plain", "whiten", "lagrange"):
        assert off(root / f"{name}-2", root / f"{name}-1") < 1e-4
    assert not (root / f"{name}-2.partial").exists()
    assert not any((root / "spill").rglob("*"))


def test_fewer_sequences_than_processes_are_refused(made: tuple[Path, list[str]]) -> None:
    root, told = made
    assert told == ["few: 1 sequences of text do not divide over 2 processes"]
    assert not list(root.glob("few*"))


def test_shares_are_whole_and_disjoint(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(7).reshape(7, 1)
    chosen = torch.tensor([6, 1, 4, 3])
    seen: list[int] = []
    found: list[int] = []
    for rank in range(3):
        monkeypatch.setenv("WORLD_SIZE", "3")
        monkeypatch.setenv("RANK", str(rank))
        share = team.share_of(ids)
        seen += share.flatten().tolist()
        assert [team.place_of(index) for index in range(len(share))] == share.flatten().tolist()
        found += share[team.own_of(chosen)].flatten().tolist()
    assert sorted(seen) == list(range(7))
    assert sorted(found) == sorted(chosen.tolist())
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(UsageError, match="7 sequences of text do not divide over 8 processes"):
        team.share_of(ids)
