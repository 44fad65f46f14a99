"""`lowrank env` and the record of an environment."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from cli.main import run
from lowrank_kit.report import environment as environment_module
from lowrank_kit.report.environment import environment, source_commit


def test_the_block_to_paste(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["env"]) == 0
    captured = capsys.readouterr()
    told = dict(re.split(r"  +", line, maxsplit=1) for line in captured.out.splitlines())
    assert told["torch"] == metadata.version("torch")
    assert told["python"].startswith(platform.python_version())
    assert {"lowrank-kit", "commit", "transformers", "lm-eval", "os", "cpus", "memory", "cuda devices", "mps"} <= set(
        told
    )
    assert captured.err == ""


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["env", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document.pop("schema_version") == 1
    assert document == environment(with_devices=True)
    assert document["torch threads"] == str(torch.get_num_threads())


def test_recording_it_imports_no_torch() -> None:
    code = "import sys; from lowrank_kit.report.environment import environment as e; e(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment_module, "PACKAGES", ("lowrank-kit", "no-such-package"))
    assert environment()["no-such-package"] is None


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with one commit in which our module seems to lie."""
    for name in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{name}_NAME", "t")
        monkeypatch.setenv(f"{name}_EMAIL", "t@example.org")
    module = tmp_path / "lowrank_kit" / "report" / "environment.py"
    module.parent.mkdir(parents=True)
    module.write_text("one\n")
    git(tmp_path, "init", "-q")
    monkeypatch.setattr(environment_module, "__file__", str(module))
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def commit(folder: Path) -> str:
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "one")
    return git(folder, "rev-parse", "HEAD")


def test_commit_of_a_checkout(checkout: Path) -> None:
    assert source_commit() is None  # no commit yet
    head = commit(checkout)
    git(checkout, "tag", "-a", "-m", "v1", "v1")  # a tag must not stand in for the commit
    assert source_commit() == head
    (checkout / "lowrank_kit" / "report" / "environment.py").write_text("two\n")
    assert source_commit() == f"{head}-dirty"


def test_a_package_installed_into_somebodys_repository_has_no_commit(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(checkout)
    installed = checkout / "site-packages" / "lowrank_kit" / "report" / "environment.py"
    installed.parent.mkdir(parents=True)
    monkeypatch.setattr(environment_module, "__file__", str(installed))
    assert source_commit() is None


def test_no_git_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(checkout)
    monkeypatch.setenv("PATH", os.fspath(checkout))
    assert source_commit() is None
