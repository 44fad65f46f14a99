"""What holds whatever is given: one clear error or a result, in time, and nothing half-written.

`FUZZES` is the table of them: the tests run a few cases of each, evals/robustness/fuzz.py thousands.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import lzma
import math
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from safetensors import safe_open

from cli.main import run
from lowrank_kit.checkpoint.headers import read_shards
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.config import from_dict, load_settings, to_dict
from lowrank_kit.data.corpus import load_corpus
from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.training.settings import TrainSettings
from tests.fuzz import strategies as draw
from tests.pages import write_pages
from tests.process import same_process

SECONDS = 60  # that a case may take
SETTINGS: dict[str, type[Any]] = {"train": TrainSettings, "compress": CompressSettings}
CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
# Where a command line may not reach: all that lies there is compared before and after.
READ_ONLY = "given"


class TooSlowError(BaseException):
    """No `Exception`: nothing between here and the property shall take it for an error of its own."""


@contextlib.contextmanager
def in_time(seconds: int = SECONDS) -> Iterator[None]:
    """Inside, what hangs ends in an error."""

    def stop(*_: Any) -> None:
        raise TooSlowError(f"no end after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def told(arguments: list[str], *, codes: tuple[int, ...] = (0, 1, 2, 3, 4)) -> int:
    """Run a command line in this process; its exit code, after seeing that an error is one, and no bug."""
    out, err = io.StringIO(), io.StringIO()
    with same_process(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), in_time():
        code = run(arguments)
    text = err.getvalue()
    assert code in codes, (code, text)
    assert "Traceback" not in text, text
    assert "this is a bug" not in text, text
    if code not in (0, 4) and not text.startswith("Usage:"):  # a verb without arguments shows its help
        assert len(re.findall("^error: ", text, re.MULTILINE)) == 1, text
    return code


class Place:
    """Folders to fuzz: a tiny model and what the verbs made of it, and room to work.

    Args:
        folder: empty.
    """

    def __init__(self, folder: Path) -> None:
        self.given, self.work = folder / READ_ONLY, folder / "work"
        self.given.mkdir()
        (self.given / "config.json").write_text(json.dumps(CONFIG))
        self.text = str(write_pages(self.given / "pages.jsonl", num_pages=40))
        text = ["--text", self.text, "--block-tokens", "16", "--device", "cpu", "-q"]
        dense, factors, pivoted, spectra = (
            str(self.given / name) for name in ("dense", "factors", "pivoted", "spectra")
        )
        train = ["train", "--model-config", str(self.given / "config.json"), "--vocab-size", "280", "--steps", "2"]
        compress = ["compress", dense, "--keep", "0.5", "--objective", "whiten", "--calibration-blocks", "4"]
        compress += ["--check-blocks", "2", "--align", "1", *text]
        for line in (
            [*train, "--batch-size", "2", *text, "-o", dense],
            [*compress, "-o", factors],
            [*compress, "--form", "pivoted", "-o", pivoted],
            ["analyze", dense, "-q", "-o", spectra],
        ):
            assert told(line) == 0, line
        out = io.StringIO()
        with same_process(), contextlib.redirect_stdout(out):
            assert run(["eval", dense, factors, "--part", "heldout", "--blocks", "1", "--json", *text]) == 0
        (self.given / "eval.json").write_text(out.getvalue())
        self._begin([*train, "--batch-size", "2", "--save-every", "1", *text])
        self.before = self._listing()

    def _begin(self, line: list[str]) -> None:
        """A run that was killed when all but the last was done."""
        begun = self.given / "begun"
        assert told([*line, "-o", str(begun)]) == 0
        record = json.loads((begun / "run.json").read_text())
        (begun / "run.json").write_text(json.dumps({**record, "finished": False}))
        (begun / "model.safetensors").unlink()

    def fresh(self) -> Path:
        """The room to work, empty."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        return self.work

    def untouched(self) -> None:
        """See that what was given is as it was, and that no temporary is left."""
        assert self._listing() == self.before
        left = [path for path in self.work.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".saving")]
        assert not left

    def _listing(self) -> dict[str, tuple[int, int]]:
        return {
            str(path.relative_to(self.given)): (path.stat().st_size, path.stat().st_mtime_ns)
            for path in self.given.rglob("*")
            if path.is_file()
        }


# Settings


def settings_are_read(place: Place, case: tuple[str, dict[str, Any]]) -> str:
    """A document makes settings, which give the same document again, or one error."""
    verb, document = case
    try:
        settings = from_dict(SETTINGS[verb], document, "here")
    except UsageError:
        return "refused"
    assert from_dict(SETTINGS[verb], to_dict(settings), "there") == settings
    return "read"


def files_of_settings_are_read(place: Place, case: tuple[str, str, str]) -> str:
    verb, suffix, text = case
    path = place.fresh() / f"settings{suffix}"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load_settings(SETTINGS[verb], path, {})
    except UsageError:
        return "refused"
    return "read"


# Shards


def shards_are_read(place: Place, drawn: dict[str, Any]) -> str:
    """What is read, safetensors reads, with the same shapes; the rest is one error."""
    folder = place.fresh()
    (folder / "model.safetensors").write_bytes(draw.shard_bytes(drawn))
    return _read(folder)


def damaged_shards_are_read(place: Place, damages: list[draw.Damage]) -> str:
    folder = place.fresh()
    data = (place.given / "factors" / "model.safetensors").read_bytes()
    # Headers are the smaller part of a file: half of the damage is to go there.
    end = 8 + int.from_bytes(data[:8], "little")
    whole = len(damages) % 2 == 0
    data = draw.damaged(data, damages) if whole else draw.damaged(data[:end], damages) + data[end:]
    (folder / "model.safetensors").write_bytes(data)
    return _read(folder)


def indices_are_read(place: Place, case: tuple[list[draw.Edit], list[draw.Damage]]) -> str:
    """An index and its shards agree, or one error says where not."""
    edits, damages = case
    folder = place.fresh()
    shutil.copyfile(place.given / "factors" / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    with safe_open(folder / "model-00001-of-00002.safetensors", framework="pt") as file:
        names = list(file.keys())
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    text = json.dumps(draw.edited(index, edits)).encode()
    (folder / "model.safetensors.index.json").write_bytes(draw.damaged(text, damages))
    return _read(folder)


def _refused(error: LowRankError, where: str) -> str:
    """An error says where."""
    assert where in error.message, error.message
    return "refused"


def _read(folder: Path) -> str:
    try:
        shards = read_shards(folder)
    except LowRankError as refused:
        return _refused(refused, str(folder))
    for file, shard in shards.items():
        if all(header.dtype not in ("F4", "F8_E8M0") for header in shard.headers):
            with safe_open(folder / file, framework="np") as opened:
                found = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            assert found == {header.name: header.shape for header in shard.headers}
    return "read"


# Text


def texts_are_read(place: Place, case: tuple[str, str, list[draw.Edit], list[draw.Damage]]) -> str:
    """A damaged file of text is text, or one error."""
    kind, packed, edits, damages = case
    rows = [draw.edited({"text": f"Page {number}. The mill stood still.", "id": number}, edits) for number in range(5)]
    if kind == ".parquet":
        buffer = io.BytesIO()
        texts = [row.get("text") if isinstance(row, dict) else None for row in rows]
        pq.write_table(
            pa.table({"text": pa.array([text if isinstance(text, str) else None for text in texts])}), buffer
        )
        data = buffer.getvalue()
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8", "surrogatepass")
        pack: dict[str, Callable[[bytes], bytes]] = {".xz": lzma.compress, ".gz": gzip.compress, "": bytes}
        data = pack[packed](data)
    path = place.fresh() / f"text{kind}{packed if kind != '.parquet' else ''}"
    path.write_bytes(draw.damaged(data, damages))
    try:
        with in_time():
            load_corpus(str(path))
    except LowRankError as refused:
        return _refused(refused, path.name)
    return "read"


# Folders and commands

FOLDERS = ("dense", "factors", "pivoted")
_TEXT = ["--text", "TEXT", "--block-tokens", "16"]
_BENCH = ["--prompt", "4", "--new-tokens", "2", "--batch", "1", "--rounds", "1", "--warmup", "0"]
COMMANDS = {
    "analyze": [],
    "analyze -o": ["-o", "OUT"],
    "eval": [*_TEXT, "--part", "heldout", "--blocks", "1", "--device", "cpu"],
    "bench": [
        "--prompt",
        "4",
        "--new-tokens",
        "2",
        "--batch",
        "1",
        "--rounds",
        "1",
        "--warmup",
        "0",
        "--device",
        "cpu",
    ],
    "compress": ["--keep", "0.5", "--objective", "plain", "--align", "1", "--device", "cpu", "-o", "OUT"],
    "compress --dry-run": ["--keep", "0.7", "--objective", "plain", "--dry-run"],
    "train": [
        "--text",
        "TEXT",
        "--steps",
        "1",
        "--batch-size",
        "2",
        "--block-tokens",
        "16",
        "--device",
        "cpu",
        "-o",
        "OUT",
    ],
    "train --dry-run": ["--text", "TEXT", "--steps", "1", "--dry-run"],
}
DOCUMENTS = ("config.json", "compression.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json")


def changed_folders_are_loaded(place: Place, case: tuple[str, str, str, list[draw.Edit], list[draw.Damage]]) -> str:
    """A verb on a folder of which a document was changed."""
    name, command, file, edits, damages = case
    folder = Path(shutil.copytree(place.given / name, place.fresh() / name))
    path = folder / file
    if not path.exists():
        path = folder / "config.json"
    document = draw.edited(json.loads(path.read_text()), edits)
    path.write_bytes(draw.damaged(json.dumps(document).encode(), damages))
    return _verb(place, folder, command)


def damaged_weights_are_loaded(place: Place, case: tuple[str, str, list[draw.Damage]]) -> str:
    """A verb on a folder with damaged weights."""
    name, command, damages = case
    folder = Path(shutil.copytree(place.given / name, place.fresh() / name))
    path = folder / "model.safetensors"
    path.write_bytes(draw.damaged(path.read_bytes(), damages))
    return _verb(place, folder, command)


def _verb(place: Place, folder: Path, command: str) -> str:
    verb = command.split()[0]
    words = {"OUT": str(place.work / "out"), "TEXT": place.text}
    code = told([verb, str(folder), *(words.get(word, word) for word in COMMANDS[command]), "-q"])
    place.untouched()
    _whole_or_nothing(place.work, code)
    return f"exit code {code}"


def _whole_or_nothing(work: Path, code: int) -> None:
    """After an error no output is there but of a run that failed on its way, which says so."""
    output = work / "out"
    if code == 0 or not output.exists():
        return
    record = output / "run.json"
    assert code == 1, list(output.iterdir())
    assert record.exists(), list(output.iterdir())
    assert not json.loads(record.read_text())["finished"]
    assert not list(output.glob("*.safetensors"))


def runs_are_resumed(place: Place, case: tuple[str, list[draw.Edit], list[draw.Damage]]) -> str:
    """A run is resumed of which one file was changed."""
    file, edits, damages = case
    output = Path(shutil.copytree(place.given / "begun", place.fresh() / "out"))
    path = next(output.rglob(file))
    data = path.read_bytes()
    if path.suffix == ".json":
        data = json.dumps(draw.edited(json.loads(data), edits)).encode()
    path.write_bytes(draw.damaged(data, damages))
    code = told(["train", "--resume", "-o", str(output), "--device", "cpu", "-q"])
    place.untouched()
    assert (output / "model.safetensors").exists() == (code == 0)
    return f"exit code {code}"


RESUMED: tuple[str, ...] = ("run.json", "checkpoint.json", "optimizer.json", "schedule.json", "random.json")
RESUMED += ("trainer_state.json", "shard-*.safetensors", "tokenizer.json", "log.jsonl")


def results_are_reported(place: Place, case: tuple[str, list[draw.Edit], list[draw.Damage]]) -> str:
    """A report of results of which one file was changed."""
    file, edits, damages = case
    place.fresh()
    folder = place.work / "results"
    for name in RESULTS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(place.given / name, folder / name)
    path = folder / file
    data = path.read_bytes()
    if path.suffix == ".json":
        data = json.dumps(draw.edited(json.loads(data), edits)).encode()
    path.write_bytes(draw.damaged(data, damages))
    code = told(["report", str(folder), "-q", "-o", str(place.work / "page.html")])
    place.untouched()
    assert (place.work / "page.html").exists() == (code == 0)
    return f"exit code {code}"


RESULTS: tuple[str, ...] = ("dense/run.json", "dense/log.jsonl", "factors/compression.json", "eval.json")
RESULTS += ("factors/compression.jsonl", "spectra/spectra.json")


def command_lines_are_answered(place: Place, case: tuple[str, list[str]]) -> str:
    """Any words after a verb. What would take minutes is given an output that it refuses."""
    verb, words = case
    place.fresh()
    (place.work / "taken").write_text("")
    (place.work / "out of place").mkdir()
    names = {"MODEL": "dense", "SMALL": "factors", "TEXT": "pages.jsonl", "RESULT": "eval.json"}
    for word, name in {**names, "CONFIG": "config.json"}.items():
        words = [one.replace(word, str(place.given / name)) for one in words]
    words = [one.replace("OUT", str(place.work / "out")) for one in words]
    given = {"MODEL": str(place.given / "dense"), "CONFIG": str(place.given / "config.json"), "TEXT": place.text}
    first = [given.get(word, word) for word in LINES.get(verb, [])]
    last = ["-o", str(place.work / "taken" / "below")] if verb in SLOW else []
    with contextlib.chdir(place.work):  # some words are names of files to be
        code = told([*verb.split(), *first, *words, *last, "-q"])
    place.untouched()
    _whole_or_nothing(place.work, code)
    return f"exit code {code}"


SLOW = ("quickstart", "scale check", "scale sweep")
# What a verb is given before the words that are drawn, so that it has little to do where these let it begin.
LINES = {
    "train": ["--model-config", "CONFIG", "--vocab-size", "280", "--steps", "1", "--batch-size", "2", *_TEXT],
    "compress": ["MODEL", "--keep", "0.5", "--objective", "plain", "--max-bytes", "20000", *_TEXT],
    "eval": ["MODEL", "--blocks", "1", *_TEXT],
    "bench": ["MODEL", *_BENCH],
    "analyze": ["MODEL"],
    "scale table": ["--base", "CONFIG", "--target", "CONFIG"],
}
PLACES = ["MODEL", "SMALL", "TEXT", "CONFIG", "RESULT", "OUT", "MODEL/none", "CONFIG/below", "/dev/null", "/proc/none"]


@dataclass(frozen=True)
class Fuzz:
    """One property, and the cases that it is to hold for.

    Args:
        check: called with the place and a case; says in a word what became of it.
        cases: what is drawn.
        few: how many cases the tests try.
        many: how many of 10,000 the script tries.
    """

    check: Callable[[Place, Any], str]
    cases: st.SearchStrategy[Any]
    few: int
    many: int


_MAYBE_EDITS, _MAYBE_DAMAGES = (st.one_of(st.just([]), some) for some in (draw.EDITS, draw.DAMAGES))
_VERBS = st.sampled_from(sorted(SETTINGS))
FUZZES = {
    "settings": Fuzz(
        settings_are_read,
        _VERBS.flatmap(lambda verb: st.tuples(st.just(verb), draw.settings_of(SETTINGS[verb]))),
        few=30,
        many=1600,
    ),
    "settings files": Fuzz(
        files_of_settings_are_read, st.tuples(_VERBS, st.sampled_from([".yaml", ".json"]), draw.YAML), few=40, many=1200
    ),
    "shards": Fuzz(shards_are_read, draw.SHARDS, few=50, many=2800),
    "damaged shards": Fuzz(damaged_shards_are_read, draw.DAMAGES, few=40, many=1500),
    "indices": Fuzz(indices_are_read, st.tuples(_MAYBE_EDITS, _MAYBE_DAMAGES), few=30, many=800),
    "texts": Fuzz(
        texts_are_read,
        st.tuples(
            st.sampled_from([".jsonl", ".parquet", ".txt"]),
            st.sampled_from(["", ".xz", ".gz"]),
            _MAYBE_EDITS,
            _MAYBE_DAMAGES,
        ),
        few=30,
        many=800,
    ),
    "documents of a folder": Fuzz(
        changed_folders_are_loaded,
        st.tuples(
            st.sampled_from(FOLDERS),
            st.sampled_from(sorted(COMMANDS)),
            st.sampled_from(DOCUMENTS),
            draw.EDITS,
            st.one_of(st.just([]), st.just([]), draw.DAMAGES),
        ),
        few=6,
        many=400,
    ),
    "weights of a folder": Fuzz(
        damaged_weights_are_loaded,
        st.tuples(st.sampled_from(FOLDERS), st.sampled_from(sorted(COMMANDS)), draw.DAMAGES),
        few=4,
        many=200,
    ),
    "results": Fuzz(
        results_are_reported, st.tuples(st.sampled_from(RESULTS), draw.EDITS, _MAYBE_DAMAGES), few=1, many=60
    ),
    "resumed runs": Fuzz(
        runs_are_resumed, st.tuples(st.sampled_from(RESUMED), _MAYBE_EDITS, _MAYBE_DAMAGES), few=4, many=200
    ),
    "command lines": Fuzz(command_lines_are_answered, draw.command_lines(PLACES), few=8, many=440),
}
assert math.isclose(sum(fuzz.many for fuzz in FUZZES.values()), 10_000)
