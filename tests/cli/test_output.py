"""Results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from cli.output import check_new_folder, emit, setup_logging
from lowrank_kit.errors import UsageError


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    emit({"loss": 1.0}, "loss 1.0", as_json=False)
    assert capsys.readouterr() == ("loss 1.0\n", "")


def test_one_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    emit({"rows": [{"loss": math.nan, "kl": math.inf, "name": "é"}], "path": Path("a")}, "unused", as_json=True)
    captured = capsys.readouterr()
    document = json.loads(captured.out, parse_constant=pytest.fail)
    assert document == {"schema_version": 1, "rows": [{"loss": None, "kl": None, "name": "é"}], "path": "a"}
    assert next(iter(document)) == "schema_version"
    assert captured.err == ""


@pytest.mark.parametrize(
    ("verbosity", "seen"),
    [(-2, "error"), (-1, "warning error"), (0, "info warning error"), (1, "debug info warning error")],
)
def test_our_own_log(verbosity: int, seen: str, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(verbosity)
    logger = logging.getLogger("lowrank_kit.somewhere")
    for level in ("debug", "info", "warning", "error"):
        getattr(logger, level)(f"a {level}")
    captured = capsys.readouterr()
    assert [line.split()[-1] for line in captured.err.splitlines()] == seen.split()
    assert captured.out == ""


@pytest.mark.parametrize(("verbosity", "warned"), [(0, False), (1, True)])
@pytest.mark.parametrize("library", ["accelerate.state", "httpx", "matplotlib", "urllib3"])
def test_libraries_chatter_only_when_asked(
    library: str, verbosity: int, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(verbosity)
    logging.getLogger("lowrank_kit").warning("ours")
    logging.getLogger(library).warning("chatter")
    logging.getLogger(library).error("trouble")
    expected = ["warning: ours", f"warning: {library}: chatter", f"error: {library}: trouble"]
    assert capsys.readouterr().err.splitlines() == [line for line in expected if warned or "chatter" not in line]


def test_libraries_that_set_their_own_levels_stay_quiet() -> None:
    code = """
from lowrank_kit.cli.output import setup_logging
setup_logging(0)
import datasets, huggingface_hub, logging, transformers.utils.logging
for name in ("transformers", "datasets", "huggingface_hub"):
    logging.getLogger(name + ".somewhere").warning("chatter")
"""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_VERBOSITY")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stderr == ""


def test_set_up_twice_logs_once(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(0)
    setup_logging(0)
    logging.getLogger("lowrank_kit").info("once")
    assert capsys.readouterr().err == "once\n"


def test_a_log_line_does_not_break_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(0)
    with tqdm(total=2, ascii=True, ncols=40, mininterval=0) as bar:
        bar.update()
        logging.getLogger("lowrank_kit").info("half way")
        bar.update()
    drawn = capsys.readouterr().err
    assert "\nhalf way\n" not in drawn.split("half way")[0]
    assert "\r" + " " * 40 + "\rhalf way\n" in drawn  # the bar is wiped first


def test_the_users_own_levels_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "debug")
    monkeypatch.delenv("DATASETS_VERBOSITY", raising=False)
    setup_logging(0)
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "debug"
    assert os.environ["DATASETS_VERBOSITY"] == "error"


def test_new_and_empty_folders_pass(tmp_path: Path) -> None:
    check_new_folder(tmp_path)
    check_new_folder(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UsageError, match=r"not empty \(1 entries\)") as caught:
        check_new_folder(tmp_path)
    assert caught.value.hint is not None
    assert f"rm -r {tmp_path}" in caught.value.hint


@pytest.mark.parametrize("path", ["taken", "taken/below"])
def test_a_file_in_the_way_is_refused(path: str, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(UsageError, match="taken is a file"):
        check_new_folder(tmp_path / path)
