"""Headers of a model on the hub: the plan of its folder, for a small part of its bytes; the hub is on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import LlamaForCausalLM

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.headers import INDEX_FILE, SINGLE_FILE
from lowrank_kit.errors import LowRankError, UsageError
from tests.checkpoint.hub_client import described, planned
from tests.checkpoint.hub_server import hub_server

ROOT = Path(__file__).parents[2]
NOT_TO_BE_HAD = "no such model folder, and not to be had from the hub: "


@dataclass(frozen=True)
class Hub:
    """A hub, and what a client told of it.

    Args:
        folder: of the repositories.
        told: by the client.
    """

    folder: Path
    told: dict[str, Any]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., LlamaForCausalLM]) -> Hub:
    root = tmp_path_factory.mktemp("hub")
    folder = root / "tests"
    large = tiny_llama(vocab_size=20_000)
    large.save_pretrained(folder / "sharded", max_shard_size="2MB")
    large.save_pretrained(folder / "single")
    (folder / "pickled").mkdir()
    (folder / "pickled" / "config.json").write_text("{}")
    foreign = shutil.copytree(folder / "single", folder / "foreign")
    (foreign / "config.json").write_text('{"model_type": "foreign", "auto_map": {"AutoConfig": "foreign.Config"}}')
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    next(Path(shutil.copytree(folder / "sharded", folder / "incomplete")).glob("*-00002-*")).unlink()
    os.truncate(shutil.copytree(folder / "single", folder / "damaged") / SINGLE_FILE, 1_000_000)
    home = tmp_path_factory.mktemp("home")
    with hub_server(root) as server:
        environment = os.environ | {"HF_HOME": str(home), "HF_ENDPOINT": server.endpoint, "HF_HUB_OFFLINE": "0"}
        environment |= {"NO_PROXY": "*", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.checkpoint.hub_client"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return Hub(folder, json.loads(done.stdout))


@pytest.mark.parametrize("name", ["sharded", "single"])
def test_headers_are_those_of_the_files(hub: Hub, name: str) -> None:
    told, expected = hub.told[f"tests/{name}"], described(Checkpoint.open(hub.folder / name))
    assert told["headers"] == expected["headers"]
    assert list(told["headers"]) == list(expected["headers"])
    assert told["nbytes"] == expected["nbytes"]
    assert not any(file.endswith(".safetensors") for file in told["files"])
    assert "only its header was read, the weights are on the hub" in told["read"]


def test_little_is_downloaded(hub: Hub) -> None:
    weights = {path.name: path.stat().st_size for path in (hub.folder / "sharded").glob("*.safetensors")}
    assert len(weights) > 1
    # "incomplete" has the same files, but is refused before any is asked for.
    sent = {file: hub.told["sent"][file] for file in weights}
    assert all(0 < sent[file] <= min(nbytes, 100_001) for file, nbytes in weights.items())
    assert sum(sent.values()) < 0.1 * sum(weights.values())


def test_the_plan_is_that_of_the_folder(hub: Hub) -> None:
    local, plans = planned(str(hub.folder / "sharded"), "uniform"), hub.told["plans"]
    for key in ("totals", "matrices", "note"):
        assert plans["uniform"][key] == local[key]
    assert local["forecast"] is not None
    assert plans["uniform"]["forecast"] is None  # from the weights
    assert plans["erank"]["matrices"] == local["matrices"]
    assert "erank decides by the weights, which are not downloaded" in plans["erank"]["note"]


@pytest.mark.parametrize("name", ["gated", "missing"])
def test_a_model_that_is_not_to_be_had(hub: Hub, name: str) -> None:
    told = hub.told[f"tests/{name}"]
    assert told["error"].startswith(f"{NOT_TO_BE_HAD}tests/{name} (40")
    assert "hf auth login" in told["error"]
    assert told["code"] == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pickled", "tests/pickled: no model.safetensors and no model.safetensors.index.json in this repository"),
        ("incomplete", "1 of the 3 shards named in model.safetensors.index.json are missing: model-00002"),
        ("damaged", "tests/damaged/model.safetensors: 1000000 bytes, but its header of 21 tensors asks for "),
    ],
)
def test_a_repository_that_is_no_good(hub: Hub, name: str, message: str) -> None:
    assert message in hub.told[f"tests/{name}"]["error"]


def test_a_downloaded_model_is_read_from_the_cache(hub: Hub) -> None:
    downloaded = hub.told["downloaded"]
    assert downloaded["read"] == len(downloaded["headers"]) == 21
    assert hub.told["cached"] == downloaded
    assert hub.told["unreachable"] == downloaded


@pytest.fixture
def snapshot() -> Iterator[Path]:
    """The empty folder of "tests/cached" in the cache."""
    repository = Path(HF_HUB_CACHE) / "models--tests--cached"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    yield repository / "snapshots" / ("0" * 40)
    shutil.rmtree(repository)


def test_offline_from_the_cache(snapshot: Path, tiny_llama_folder: Path) -> None:
    shutil.copytree(tiny_llama_folder, snapshot, dirs_exist_ok=True)
    assert Checkpoint.open_headers("tests/cached") == Checkpoint.open(snapshot)


@pytest.mark.parametrize("how", ["open", "open_headers"])
def test_a_model_that_needs_its_own_code_is_not_downloaded(hub: Hub, how: str) -> None:
    told = hub.told["foreign"][how]
    assert "asks for code of its own (auto_map: foreign.Config)" in told["error"]
    assert hub.told["foreign"]["sent"] == []


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        ([], "not to be had from the hub", "in the cache"),
        (["config.json"], "no model.safetensors and no", "only a part of this model is in the cache"),
        (["config.json", INDEX_FILE], "1 of the 1 shards named in .* are missing: x.safetensors", "download"),
    ],
    ids=["nothing", "config", "index"],
)
def test_offline_with_a_part_in_the_cache(
    snapshot: Path, tiny_llama_folder: Path, files: list[str], message: str, hint: str
) -> None:
    """As a dry run leaves it."""
    for file in files:
        index = '{"weight_map": {"a": "x.safetensors"}}'
        (snapshot / file).write_text(index if file == INDEX_FILE else (tiny_llama_folder / file).read_text())
    with pytest.raises(UsageError, match=rf"{NOT_TO_BE_HAD}tests/cached \(") as caught:
        Checkpoint.open_headers("tests/cached")
    assert "in the cache" in str(caught.value.hint)
    with pytest.raises(LowRankError, match=message) as caught_too:
        Checkpoint.open("tests/cached")
    assert hint in str(caught_too.value.hint)


def test_a_folder_is_opened_as_ever(tiny_llama_folder: Path) -> None:
    checkpoint = Checkpoint.open_headers(tiny_llama_folder)
    assert checkpoint == Checkpoint.open(tiny_llama_folder)
    assert checkpoint.has_weights
    ((file, shard),) = checkpoint.shards.items()
    assert not replace(checkpoint, shards={file: replace(shard, mtime_ns=None)}).has_weights
