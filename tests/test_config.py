"""Settings are read strictly: what is not exactly right is told, all of it at once."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_kit.config import from_dict, load_settings, settings_difference, to_dict
from lowrank_kit.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Example:
    """One field of every kind that settings may have."""

    model: str
    lr: float = 1e-3
    steps: int = 100
    resume: bool = False
    output: Path = Path("out")
    objective: Literal["plain", "whiten"] = "plain"
    limit: int | None = None
    decay: float | None = None
    budget: int | float = 1
    betas: tuple[float, float] = (0.9, 0.95)
    roles: tuple[str, ...] = ()
    texts: list[str] = field(default_factory=list)


def load(text: str, tmp_path: Path, name: str = "train.yaml", **overrides: Any) -> Example:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    return load_settings(Example, file, overrides)


def refused(text: str, tmp_path: Path, name: str = "train.yaml", **overrides: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load(text, tmp_path, name, **overrides)
    return caught.value


numbers = st.floats(allow_nan=False, allow_infinity=False)
# YAML can write neither half of a surrogate pair, so its text stays in the basic plane.
texts = st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"], exclude_characters="\0"))
examples = st.builds(
    Example,
    model=texts,
    lr=numbers,
    steps=st.integers(),
    resume=st.booleans(),
    output=st.sampled_from([Path("a"), Path("a/b"), Path("/")]),
    objective=st.sampled_from(["plain", "whiten"]),
    limit=st.none() | st.integers(),
    decay=st.none() | numbers,
    budget=st.integers() | numbers,
    betas=st.tuples(numbers, numbers),
    roles=st.lists(texts).map(tuple),
    texts=st.lists(texts),
)


@given(examples)
@settings(deadline=None, derandomize=True)
def test_round_trip(example: Example) -> None:
    plain = to_dict(example)
    assert from_dict(Example, plain, "here") == example
    for suffix in (".json", ".yaml"):  # JSON text is YAML
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, f"settings{suffix}")
            file.write_text(json.dumps(plain))
            read = load_settings(Example, file, {})
        assert read == example
        assert type(read.budget) is type(example.budget)
        assert settings_difference(plain, to_dict(read)) == []


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(st.dictionaries(st.sampled_from([*Example.__dataclass_fields__, "stepz", "x"]), ANYTHING))
@settings(deadline=None, derandomize=True)
def test_any_values_are_refused_or_have_their_types(mapping: Mapping[str, Any]) -> None:
    try:
        read = from_dict(Example, mapping, "here")
    except UsageError:
        return
    assert {"stepz", "x"}.isdisjoint(mapping)
    assert type(read.steps) is int
    assert type(read.resume) is bool
    assert math.isfinite(read.lr)
    assert isinstance(read.betas, tuple)


def test_precedence_is_flag_file_default(tmp_path: Path) -> None:
    read = load("model: a\nsteps: 5\nlr: 0.5\n", tmp_path, steps=7, lr=None)
    assert (read.model, read.steps, read.lr, read.betas) == ("a", 7, 0.5, (0.9, 0.95))


def test_no_file(tmp_path: Path) -> None:
    assert load_settings(Example, None, {"model": "a", "output": tmp_path}) == Example(model="a", output=tmp_path)
    with pytest.raises(UsageError, match='command line: required key "model" is missing'):
        load_settings(Example, None, {})


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E5", 1e5), ("2.5e3", 2500.0), (".5", 0.5), ("-1.", -1.0), ("3", 3.0), ("1_000.5", 1000.5)],
)
def test_numbers_yaml_1_1_would_misread(text: str, value: float, tmp_path: Path) -> None:
    read = load(f"model: a\nlr: {text}\n", tmp_path)
    assert read.lr == value
    assert type(read.lr) is float


@pytest.mark.parametrize("text", ["no", "on", "1:30", "010", "2024-01-01", "0x1f", "1.2.3", "=", "e5"])
def test_words_yaml_1_1_would_misread(text: str, tmp_path: Path) -> None:
    assert load(f"model: {text}\n", tmp_path).model == text


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("steps: 1.0", "steps must be a whole number, not 1.0"),
        ("steps: true", "steps must be a whole number, not true"),
        ('steps: "5"', 'steps must be a whole number, not "5"'),
        ("steps: no", 'steps must be a whole number, not "no"'),
        ("lr: true", "lr must be a number, not true"),
        ("lr: .nan", "lr must be a finite number, not NaN"),
        ("lr: .inf", "lr must be a finite number, not Infinity"),
        (f"lr: {10**400}", "lr must be a finite number"),
        ("budget: .inf", "budget must be a whole number or a number, not Infinity"),
        ("resume: 1", "resume must be true or false, not 1"),
        ("resume: yes", 'resume must be true or false, not "yes"'),
        ("model: 3", "model must be text, not 3"),
        ('model: "a\\0"', 'model must be text without NUL, not "a\\u0000"'),
        ("output: 3", "output must be a path, not 3"),
        ("limit: a", 'limit must be a whole number or null, not "a"'),
        ("betas: [0.9]", "betas must be a list of a number, a number, not [0.9]"),
        ("betas: 0.9", "betas must be a list of a number, a number, not 0.9"),
        ("roles: q", 'roles must be a list (each text), not "q"'),
        ("roles: [q, 1]", 'roles must be a list (each text), not ["q", 1]'),
        ("texts: null", "texts must be a list (each text), not null"),
        ("objective: whitn", 'objective must be one of plain, whiten, not "whitn"'),
    ],
)
def test_wrong_types(line: str, told: str, tmp_path: Path) -> None:
    rest = "" if line.startswith("model") else "model: a\n"
    assert told in refused(f"{rest}{line}\n", tmp_path).message


def test_one_problem_is_message_and_hint(tmp_path: Path) -> None:
    error = refused("model: a\nstepz: 5\n", tmp_path)
    assert error.message == f'{tmp_path / "train.yaml"}: unknown key "stepz"'
    assert error.hint == 'did you mean "steps"?'
    assert error.exit_code == 2


def test_all_problems_at_once(tmp_path: Path) -> None:
    text = "stepz: 5\nlr: fast\nobjective: whitn\nresume: true\nresume: false\n3: x\n"
    told = refused(text, tmp_path, steps="7").message.splitlines()
    assert told[0] == f"{tmp_path / 'train.yaml'}: 7 problems"
    for line, part in zip(
        told[1:],
        (
            'key "resume" is written twice, again on line 5',
            'unknown key "stepz" (did you mean "steps"?)',
            'lr must be a number, not "fast"',
            '(did you mean "whiten"?)',
            'unknown key "3" (choose from: betas, ',
            "on the command line: steps must be a whole number",
            'required key "model" is missing',
        ),
        strict=True,
    ):
        assert part in line


def test_key_written_twice_in_json(tmp_path: Path) -> None:
    told = refused('{"model": "a", "lr": 1, "lr": 2}', tmp_path, "train.json").message
    assert told.endswith('key "lr" is written twice')


@pytest.mark.parametrize(
    ("text", "name", "told"),
    [
        ("a: [1\n", "train.yaml", "is not valid YAML: line 2, column 1"),
        ("a: !!python/object:os.system 1", "train.yaml", "is not valid YAML"),
        ("a: &x {b: *x}", "train.yaml", "is not valid YAML: line 1, column 11: aliases are not read"),
        ("? [a]\n: b", "train.yaml", "is not valid YAML: line 1, column 3: found unhashable key"),
        ("[" * 5000, "train.yaml", "cannot be parsed: maximum recursion depth exceeded"),
        ("[" * 100_000, "train.json", "cannot be parsed: maximum recursion depth exceeded"),
        ("a: \x00", "train.yaml", "cannot be parsed"),
        ('{"a": }', "train.json", "cannot be parsed"),
        ("- 1\n", "train.yaml", "must hold keys and values, not [1]"),
        ("3", "train.json", "must hold keys and values, not 3"),
        ("a = 1", "train.toml", "is neither YAML nor JSON"),
    ],
)
def test_files_that_cannot_be_read(text: str, name: str, told: str, tmp_path: Path) -> None:
    assert told in refused(text, tmp_path, name).message


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such settings file"):
        load_settings(Example, tmp_path / "none.yaml", {})
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        load_settings(Example, tmp_path / "folder.yaml", {})
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9\n")
    with pytest.raises(UsageError, match="cannot be parsed"):
        load_settings(Example, tmp_path / "latin.yaml", {})


def test_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load("# nothing\n", tmp_path, model="a") == Example(model="a")


def test_difference() -> None:
    old = {"keep": 0.8, "seed": 0, "objective": "plain", "roles": ["q"], "gone": 1}
    new = {"keep": 0.7, "seed": 0, "objective": "whiten", "roles": ("q",), "limit": None}
    assert settings_difference(old, new) == [
        "keep: 0.8 -> 0.7",
        'objective: "plain" -> "whiten"',
        "limit: absent -> null",
        "gone: 1 -> absent",
    ]


def test_a_field_no_file_can_hold_is_the_programmers_error() -> None:
    @dataclass(frozen=True)
    class Bad:
        table: dict[str, int]

    with pytest.raises(TypeError, match="cannot hold"):
        from_dict(Bad, {"table": {}}, "here")
