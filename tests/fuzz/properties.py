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
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from safetensors import safe_open

from lowrank_kit.checkpoint.headers import read_shards
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.config import from_dict, load_settings, to_dict
from lowrank_kit.data.corpus import load_corpus
from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.training.settings import TrainSettings
from tests.fuzz import strategies as draw
from tests.fuzz.place import Place, in_time, told

SETTINGS: dict[str, type[Any]] = {"train": TrainSettings, "compress": CompressSettings}


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
    "bench": [*_BENCH, "--device", "cpu"],
    "compress": ["--keep", "0.5", "--objective", "plain", "--align", "1", "--device", "cpu", "-o", "OUT"],
    "compress --dry-run": ["--keep", "0.7", "--objective", "plain", "--dry-run"],
    "train": [*_TEXT, "--steps", "1", "--batch-size", "2", "--device", "cpu", "-o", "OUT"],
    "train --dry-run": ["--text", "TEXT", "--steps", "1", "--dry-run"],
    "export --to dense": ["--to", "dense", "-o", "OUT"],
    "export --to int8": ["--to", "int8", "-o", "OUT"],
    "export --to lora": ["--to", "lora", "--base", "MODEL", "-o", "OUT"],
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
    words = {"OUT": str(place.work / "out"), "TEXT": place.text, "MODEL": str(place.given / "dense")}
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
    "export": ["SMALL", "--to", "dense"],
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
