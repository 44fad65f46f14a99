"""`lowrank compress` on broken input and full disks: one error, nothing half-written, and what is finished goes on."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from cli.main import run
from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.headers import INDEX_FILE
from lowrank_kit.compression.job import Job
from tests.compression.folders import weights
from tests.pages import write_pages

ROOT = Path(__file__).parents[2]
OPTIONS = ["--keep", "0.5", "--objective", "whiten", "--calibration-blocks", "12", "--check-blocks", "4"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_pages(tmp_path_factory.mktemp("text") / "pages.jsonl", num_pages=30))


@pytest.fixture
def sharded(tiny_llama: Callable[..., LlamaForCausalLM], tiny_llama_folder: Path, tmp_path: Path) -> Path:
    """The tiny Llama in several shards, which a test may break."""
    return copied(tiny_llama, tiny_llama_folder, tmp_path / "model")


def copied(tiny_llama: Callable[..., LlamaForCausalLM], tiny_llama_folder: Path, folder: Path) -> Path:
    shutil.copytree(tiny_llama_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tiny_llama().save_pretrained(folder, max_shard_size="60KB")
    return folder


def arguments(model: Path, pages: str, *more: str) -> list[str]:
    output = str(model.parent / "out")
    fixed = ["--block-tokens", "32", "--device", "cpu", "--text", pages, "-o", output]
    return ["compress", str(model), *fixed, *OPTIONS, *more]


def refused(command: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """Run; one error with a hint on stderr, nothing on stdout, no output, and no file that is not whole."""
    output = Path(command[command.index("-o") + 1])
    capsys.readouterr()
    assert run(command) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("error: ") == 1, captured.err
    assert "\nhint: " in captured.err
    assert "this is a bug" not in captured.err
    assert "Traceback" not in captured.err
    assert not output.exists()
    assert not [path for path in output.parent.rglob("*") if path.name.endswith(".tmp")]
    left = output.with_name(f"{output.name}.partial")
    assert not left.exists() or any(left.rglob("sections/*.safetensors"))
    return captured.err


# Before any work


def cut_short(model: Path) -> str:
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-7])
    return rf"{shard.name}.* bytes"


def lacking(model: Path) -> str:
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.unlink()
    return rf"{shard.name}"


def twice(model: Path) -> str:
    index = model / INDEX_FILE
    name = next(iter(json.loads(index.read_text())["weight_map"]))
    index.write_text(index.read_text().replace(f'"{name}":', f'"{name}": "other.safetensors", "{name}":', 1))
    return rf"{re.escape(name)}.* twice|twice.*{re.escape(name)}"


def in_two_shards(model: Path) -> str:
    first, second, *_ = sorted(model.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second, metadata={"format": "pt"})
    return re.escape(name)


def of_no_dtype(model: Path) -> str:
    shard = sorted(model.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes().replace(b'"F32"', b'"F99"', 1))
    return rf"{shard.name}.*F99"


def linked_out(model: Path) -> str:
    shard = sorted(model.glob("*.safetensors"))[1]
    elsewhere = Path(tempfile.mkdtemp(dir=model.parent)) / "model.safetensors"
    shard.rename(elsewhere)
    shard.symlink_to(elsewhere)
    return rf"{shard.name}.*out of|{shard.name}.*link|link.*{shard.name}"


def asking_for_code(model: Path) -> str:
    config = json.loads((model / "config.json").read_text())
    own = {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}
    (model / "config.json").write_text(json.dumps(config | own))
    (model / "modeling_mine.py").write_text("raise SystemExit('it was run')")
    return "asks for code of its own"


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry-run"])
@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (cut_short, 1),
        (lacking, 1),
        (twice, 1),
        (in_two_shards, 1),
        (of_no_dtype, 1),
        (linked_out, 1),
        (asking_for_code, 2),
    ],
)
def test_a_broken_model_is_refused_before_any_work(
    damage: Callable[[Path], str],
    code: int,
    dry: list[str],
    sharded: Path,
    pages: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = damage(sharded)
    before = sorted(sharded.parent.rglob("*"))
    told = refused(arguments(sharded, pages, *dry), code, capsys)
    assert re.search(message, told), told
    assert sorted(sharded.parent.rglob("*")) == before


# On the way


def touch(shard: Path) -> None:
    """Other numbers of the same size."""
    save_file({name: 2 * tensor for name, tensor in load_file(shard).items()}, shard, metadata={"format": "pt"})


@pytest.mark.parametrize("step", [(Checkpoint, "verify"), (Job, "plan"), (Job, "fold")], ids=lambda step: step[1])
def test_a_shard_that_changes_while_it_is_at_work(
    step: tuple[type, str],
    sharded: Path,
    pages: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    owner, name = step
    go_on, shard = getattr(owner, name), sorted(sharded.glob("*.safetensors"))[0]

    def change(*args: object) -> object:
        touch(shard)
        return go_on(*args)

    monkeypatch.setattr(owner, name, change)
    told = refused(arguments(sharded, pages), 1, capsys)
    assert re.search(rf"{shard.name}.*changed", told)


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """Inside, the system writes no larger file: as a disk that is full, for those that want more."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


LARGEST = 110_000  # bytes: more than a section has, and less than the result


@pytest.fixture(scope="module")
def without_room(
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_llama_folder: Path,
    pages: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with a model, and what a run has left that found no room for its result."""
    folder = tmp_path_factory.mktemp("full")
    model = copied(tiny_llama, tiny_llama_folder, folder / "model")
    with files_of_at_most(LARGEST):
        assert run(arguments(model, pages)) == 1
    return folder


@pytest.fixture
def stopped(without_room: Path, tmp_path: Path) -> Path:
    """The model; beside it what a run has left that found no room for its result."""
    shutil.copytree(without_room, tmp_path, dirs_exist_ok=True)
    return tmp_path / "model"


@pytest.fixture(scope="module")
def uninterrupted(
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_llama_folder: Path,
    pages: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("uninterrupted") / "model"
    shutil.copytree(tiny_llama_folder, folder)
    assert run(arguments(folder, pages)) == 0
    return weights(folder.parent / "out")


def sections(model: Path) -> list[Path]:
    return sorted((model.parent / "out.partial" / "sections").glob("*.safetensors"))


def test_with_room_again_it_goes_on_to_the_same_bytes(
    stopped: Path, pages: str, uninterrupted: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(sections(stopped)) == 3  # two blocks, and what comes after them
    written = {path: path.stat().st_mtime_ns for path in sections(stopped)}
    with files_of_at_most(LARGEST):
        told = refused(arguments(stopped, pages, "--resume"), 1, capsys)
    assert re.search(r"model\.safetensors: File too large: it takes [\d,]+ bytes, [\d,]+ are free\nhint: ", told)
    assert {path: path.stat().st_mtime_ns for path in sections(stopped)} == written
    assert run(arguments(stopped, pages, "--resume")) == 0
    assert weights(stopped.parent / "out") == uninterrupted
    assert not (stopped.parent / "out.partial").exists()


def test_what_is_finished_stays_and_is_not_gone_on_with_unasked(
    stopped: Path, pages: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(arguments(stopped, pages), 2, capsys)
    assert re.search(
        r"has left 3 finished parts\nhint: --resume goes on with it; to begin anew, remove .*out\.par", told
    )
    told = refused(arguments(stopped, pages, "--resume", "--keep", "0.4"), 2, capsys)
    assert "settings, keep: 0.5 -> 0.4" in told
    assert len(sections(stopped)) == 3


def test_a_shard_that_changed_while_a_stopped_run_was_waiting(
    stopped: Path, pages: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = sorted(stopped.glob("*.safetensors"))[1]
    original = shard.read_bytes()
    touch(shard)
    assert re.search(rf"files, {shard.name}: ", refused(arguments(stopped, pages, "--resume"), 2, capsys))
    shard.write_bytes(original)
    assert run(arguments(stopped, pages, "--resume")) == 0


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def empty(data: bytes) -> bytes:
    return b""


def no_header(data: bytes) -> bytes:
    return b"\xff" * 16 + data[16:]


def one_bit(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    ("damage", "place"), [(cut, 0), (cut, 1), (cut, 2), (empty, 1), (no_header, 1), (one_bit, 0), (one_bit, 2)]
)
def test_a_damaged_part_is_made_again(
    damage: Callable[[bytes], bytes],
    place: int,
    stopped: Path,
    pages: str,
    uninterrupted: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = sections(stopped)[place]
    path.write_bytes(damage(path.read_bytes()))
    assert run(arguments(stopped, pages, "--resume", "-v")) == 0
    assert f"{path} is damaged, and its part is made again" in capsys.readouterr().err
    assert weights(stopped.parent / "out") == uninterrupted


def test_two_processes_at_one_output(stopped: Path, pages: str, capsys: pytest.CaptureFixture[str]) -> None:
    with FileLock(stopped.parent / "out.partial" / "lock"):
        told = refused(arguments(stopped, pages, "--resume"), 2, capsys)
    assert "another process is at work on this output" in told
    assert len(sections(stopped)) == 3


# Where nothing may be written

AS_NOBODY = """
import os, sys
from cli.main import run
from tests.compression.folders import weights
*command, new, empty = sys.argv[1:]
run([*command, new, "--dry-run"])  # all is imported while it can be read
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)  # nobody: the administrator may write everywhere
print([run([*command, output]) for output in (new, empty)])
"""


def test_an_output_that_may_not_be_written_to(tiny_llama_folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # where anybody may look
        model, new, empty = Path(name, "model"), Path(name, "place", "new"), Path(name, "empty")
        shutil.copytree(tiny_llama_folder, model)
        for path in (Path(name), model, *model.iterdir()):
            path.chmod(0o755)
        for folder in (new.parent, empty):
            folder.mkdir(mode=0o555)
        command = ["compress", str(model), "--keep", "0.5", "--objective", "plain", "-o"]
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, *command, str(new), str(empty)],
            capture_output=True,
            text=True,
            timeout=100,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert not any(empty.iterdir())
        assert sorted(Path(name).iterdir()) == [empty, model, new.parent]
    assert done.stdout.endswith("\n[2, 2]\n"), done.stderr
    assert f"error: the output folder {new} cannot be made: Permission denied" in done.stderr
    assert f"error: {empty} may not be written to\n" in done.stderr
    assert done.stderr.count("hint: choose an output where you may write") == 2
