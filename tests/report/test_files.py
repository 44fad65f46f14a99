"""Files and folders appear whole or not at all."""

from __future__ import annotations

import csv
import json
import math
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from lowrank_kit.errors import UsageError
from lowrank_kit.report.files import finite, json_text, new_folder, write_csv, write_json, write_png, write_text


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_a_folder_gets_its_content_at_the_end(tmp_path: Path, there: bool) -> None:
    target = tmp_path / "a" / "out"
    if there:
        target.mkdir(parents=True)
    with new_folder(target) as folder:
        (folder / "x").write_text("1")
        (folder / "sub").mkdir()
        (folder / "sub" / "y").write_text("2")
        assert target.exists() == there
        assert not there or not list(target.iterdir())
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*")) == ["sub", "sub/y", "x"]
    assert os.listdir(target.parent) == ["out"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "x").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill()
    assert not os.listdir(tmp_path)


def test_an_error_leaves_no_new_parent_either(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with pytest.raises(ValueError), new_folder(tmp_path / "old" / "new" / "out"):
        raise ValueError
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["old"]


def test_an_existing_folder_stays_after_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError), new_folder(tmp_path / "out"):
        raise ValueError
    assert os.listdir(tmp_path) == ["out"]


def test_what_a_killed_run_of_the_same_id_left_is_no_obstacle(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("")
        name = folder.name
    (tmp_path / name).mkdir()
    (tmp_path / name / "old").write_text("")
    with new_folder(tmp_path / "second") as folder:
        assert folder.name != name
    (tmp_path / "out" / "new").unlink()
    with new_folder(tmp_path / "out") as folder:
        assert folder.name == name
        assert not os.listdir(folder)


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_makes_is_not(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    for pid in (process.pid, os.getppid()):
        (tmp_path / f".out.{pid}.tmp").mkdir()
        (tmp_path / f".out.{pid}.tmp" / "half").write_text("")
        (tmp_path / f".x.json.{pid}.tmp").write_text("")
    with new_folder(tmp_path / "out"):
        pass
    write_json(tmp_path / "x.json", {})
    living = {f".out.{os.getppid()}.tmp", f".x.json.{os.getppid()}.tmp"}
    assert set(os.listdir(tmp_path)) == {"out", "x.json", *living}


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("1")
    match = rf"the output folder {tmp_path}/x/a/out cannot be made: Not a directory \({tmp_path}/x/a"
    with pytest.raises(UsageError, match=match) as caught, new_folder(tmp_path / "x" / "a" / "out"):
        pytest.fail("the work began")
    assert "where you may write" in str(caught.value.hint)
    assert os.listdir(tmp_path) == ["x"]


READ_ONLY = """
import os, sys
from lowrank_kit.errors import UsageError
from lowrank_kit.report.files import new_folder
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)  # nobody: the administrator may write everywhere
try:
    with new_folder(sys.argv[1]):
        print("the work began")
except UsageError as error:
    print(error)
"""


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_a_read_only_place_is_refused(there: bool) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # where anybody may look
        os.chmod(name, 0o555)
        target = Path(name, "out")
        if there:
            target.mkdir()
        command = [sys.executable, "-c", READ_ONLY, str(target)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        os.chmod(name, 0o755)
    assert done.stdout.startswith(f"the output folder {target} cannot be made: Permission denied"), done.stderr
    assert "hint: choose an output where you may write" in done.stdout


def test_a_taken_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("1")
    with pytest.raises(UsageError, match=r"not empty \(1 entries\)"), new_folder(tmp_path):
        pytest.fail("the work began")
    with pytest.raises(UsageError, match="is a file"), new_folder(tmp_path / "x"):
        pytest.fail("the work began")
    assert os.listdir(tmp_path) == ["x"]


def test_the_folder_one_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with new_folder(".") as folder:
        (folder / "x").write_text("1")
    assert os.listdir() == ["x"]
    assert os.listdir(tmp_path) == ["here"]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_text(path, "old")
    old = path.open()
    write_text(path, "née")
    with old:
        assert old.read() == "old"  # the old file is another file, not this one emptied
    assert path.read_bytes() == "née".encode()
    assert os.listdir(path.parent) == ["a.txt"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    before = path.read_text()
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert path.read_text() == before
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_text(tmp_path / "folder", "x")
    assert sorted(os.listdir(tmp_path)) == ["a.json", "folder"]


def test_files_are_readable_as_the_umask_says(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    write_text(tmp_path / "ours", "x")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "ours")}
    assert len(modes) == 1


def test_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"rows": [{"x": math.nan}, (1.5, -math.inf)], "path": Path("a/b"), "by": {3: None}})
    document = json.loads((tmp_path / "a.json").read_text())
    assert document == {"schema_version": 1, "rows": [{"x": None}, [1.5, None]], "path": "a/b", "by": {"3": None}}
    assert json_text({}, schema_version=2).startswith('{\n "schema_version": 2')
    assert finite({"x": [math.inf]}) == {"x": [None]}


def test_csv(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [{"a": 'say "hi", ok', "b": 0.1, "c": None}, {"a": "two\nlines", "b": 2}])
    with (tmp_path / "a.csv").open(newline="") as stream:
        assert list(csv.DictReader(stream)) == [
            {"a": 'say "hi", ok', "b": "0.1", "c": ""},
            {"a": "two\nlines", "b": "2", "c": ""},
        ]
    write_csv(tmp_path / "b.csv", [{"a": 1, "b": 2}], ["b"])
    assert (tmp_path / "b.csv").read_bytes() == b"b\n2\n"
    write_csv(tmp_path / "c.csv", [])
    assert (tmp_path / "c.csv").read_text().strip() == ""


def test_png_needs_no_display(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    write_png(tmp_path / "a.png", Figure(figsize=(2, 1)))
    data = (tmp_path / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert int.from_bytes(data[16:20]) == 300  # 2 inches at 150 dots
