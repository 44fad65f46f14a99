"""What a fuzz test draws: documents and files, nearly right and damaged, and command lines."""

from __future__ import annotations

import copy
import json
import string
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, get_type_hints

import click
from hypothesis import strategies as st

from cli.main import lowrank

# An edit of a JSON document: the number of a place in it, what is done there, and with which value.
Edit = tuple[int, str, Any]
# Damage of bytes: where, as a share of the length; what is done there; and with how many or which.
Damage = tuple[float, str, int]

WORDS = st.one_of(
    st.sampled_from(["", " ", "a/b", "..", "-", "nan", "None", "true", "1e-4", "é", "\x00", "x" * 300, "\u202e", "{}"]),
    st.text(string.printable, max_size=8),
)
NUMBERS = st.one_of(
    st.sampled_from([-1, 0, 1, 2, 3, 7, 64, 1000, 10**6, 2**31, 2**63, -(2**63) - 1]),
    st.sampled_from([0.0, -0.5, 0.5, 1.0, 1e-300, 1e300, float("nan"), float("inf"), float("-inf")]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=4,
)
EDITS = st.lists(
    st.tuples(st.integers(0, 10**6), st.sampled_from(["set", "set", "drop", "rename", "add", "near"]), VALUES),
    min_size=1,
    max_size=3,
)
DAMAGES = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.sampled_from(["flip", "cut", "drop", "double", "zero", "insert"]),
        st.one_of(st.integers(0, 255), st.sampled_from([1, 8, 4096])),
    ),
    min_size=1,
    max_size=3,
)


def edited(document: Any, edits: list[Edit]) -> Any:
    """A copy of a JSON document with the edits made, one after the other."""
    top = {"": copy.deepcopy(document)}
    for number, how, new in edits:
        value = copy.deepcopy(new)
        places = list(_places(top))
        owner, key = places[number % len(places)]
        if how == "drop" and owner is not top:
            del owner[key]
        elif how == "rename" and isinstance(owner, dict) and owner is not top:
            owner[f"{key}_"] = owner.pop(key)
        elif how == "add" and isinstance(owner[key], dict):
            owner[key][f"key {number}"] = value
        elif how == "near" and isinstance(owner[key], int | float):
            owner[key] += 1 if number % 2 else -1
        else:
            owner[key] = value
    return top[""]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield value, key
        yield from _places(item)


def damaged(data: bytes, damages: list[Damage]) -> bytes:
    """A file's bytes with the damages done, one after the other."""
    for share, how, number in damages:
        at = int(share * len(data))
        match how:
            case "flip" if at < len(data):
                data = data[:at] + bytes([data[at] ^ (number % 255 + 1)]) + data[at + 1 :]
            case "cut":
                data = data[:at]
            case "drop":
                data = data[:at] + data[at + number :]
            case "double":
                data = data[:at] + data[at : at + number] + data[at:]
            case "zero":
                data = data[:at] + b"\0" * len(data[at : at + number]) + data[at + number :]
            case "insert":
                data = data[:at] + bytes([number % 256]) * 8 + data[at:]
    return data


# Settings


def settings_of(cls: type[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Documents with keys of a settings class and others, and values of any kind."""
    names = [field.name for field in fields(cls)]
    known = {
        "model_config": st.just("1m"),
        "keep": st.floats(0, 1),
        "steps": st.integers(-1, 3),
        "objective": st.sampled_from(["plain", "whiten", "whitten", "auto"]),
        "keeps": st.lists(st.dictionaries(st.sampled_from(["role", "block", "blocks", "match", "keep"]), SCALARS)),
        "overrides": st.lists(st.sampled_from(["*.o_proj.*=adamw", "x=rank_schedule=fixed:2", "=", "a=b=c"])),
        "rank": st.sampled_from(["fixed:0.5", "cosine:1:0.25", "fixed:", "piecewise:1@0,2@1", "fixed:1e999"]),
    }
    of = get_type_hints(cls)
    near = [st.tuples(st.just(name), known.get(name, _like(of[name]))) for name in names]
    wild = st.lists(st.tuples(st.sampled_from(names) | WORDS, VALUES), max_size=6).map(dict)
    base = {"model_config": "1m", "steps": 2} if "steps" in names else {"keep": 0.5}
    return st.one_of(wild, st.lists(st.one_of(*near), max_size=4).map(lambda found: base | dict(found)))


def _like(annotation: Any) -> st.SearchStrategy[Any]:
    """Values that a field may hold, and others near them."""
    kinds = str(annotation)
    if "bool" in kinds:
        return st.booleans()
    if "float" in kinds:
        return st.floats(-1, 2) | st.none()
    return st.integers(-1, 600) | st.none() if "int" in kinds else st.none() | WORDS


_LINES = ["keep: 0.5", "keep: .5", "&a [*a]", "a: &x {b: *x}", "&a {b: 1}", "steps: 0x1F", "steps: 1:30", "? [a]\n: b"]
_LINES += ["<<: {keep: 1}", "!!python/name:os.system ''", "keep: !!float 1", "- a", "text: 2026-01-01", "---", "\ufeff"]
YAML = st.one_of(
    st.text(max_size=40),
    st.text(string.ascii_lowercase + ":-[]{}&*!|>'\"%@#,?. \n\t0123456789", max_size=60),
    st.lists(st.sampled_from(_LINES), max_size=4).map("\n".join),
    st.integers(1, 5000).map(lambda depth: "[" * depth),
)

# Shards


DTYPES = ("F32", "BF16", "F16", "F8_E4M3", "I8", "BOOL", "F4", "I64", "F99", "")
_SIDES = st.one_of(
    st.integers(0, 5), st.sampled_from([-1, 2**31, 2**62, 2**63, 2**70]), st.sampled_from([1.5, "2", None])
)
TENSORS = st.fixed_dictionaries(
    {"dtype": st.one_of(st.just("F32"), st.sampled_from(DTYPES)), "shape": st.lists(_SIDES, max_size=3)}
)
SHARDS = st.fixed_dictionaries(
    {
        "tensors": st.dictionaries(st.sampled_from(["a", "b", "c", "d", "__metadata__", ""]), TENSORS, max_size=4),
        "shifts": st.lists(st.tuples(st.integers(0, 7), st.integers(-9, 9)), max_size=2),
        "longer": st.one_of(st.just(0), st.sampled_from([-1, 1, 8, 10**9, 2**63 - 1])),
        "extra": st.one_of(st.just(0), st.integers(-4, 4)),
        "spaces": st.integers(0, 3),
        "edits": st.one_of(st.just([]), EDITS),
    }
)


def shard_bytes(drawn: dict[str, Any]) -> bytes:
    """A file as safetensors writes it, but for what was drawn."""
    table: dict[str, Any] = {}
    end = 0
    for name, entry in drawn["tensors"].items():
        numbers = [side for side in entry["shape"] if isinstance(side, int)]
        size = {"F32": 4, "I64": 8, "BF16": 2, "F16": 2}.get(entry["dtype"], 1)
        for side in numbers:
            size *= side
        table[name] = {**entry, "data_offsets": [end, end + size]}
        end += size
    for number, shift in drawn["shifts"]:
        if table:
            offsets = list(table.values())[number % len(table)]["data_offsets"]
            offsets[number % 2] += shift
    header = json.dumps(edited(table, drawn["edits"])).encode() + b" " * drawn["spaces"]
    length = max(0, len(header) + drawn["longer"])
    return length.to_bytes(8, "little") + header + bytes(min(max(0, end + drawn["extra"]), 10_000))


# Command lines

_WORDS_OF_OPTIONS = ["", "0", "1", "2", "-1", "0.5", "1e999", "nan", "1,2", ",", "x", "cpu", "é", "1:2", "a=b"]


def _options(command: click.Command) -> list[click.Option]:
    """All but the one that asks for a traceback."""
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    return [option for option in options if "--debug" not in option.opts]


def _option(option: click.Option, paths: list[str]) -> st.SearchStrategy[list[str]]:
    """An option as it might be written: with a value, another one, or none."""
    named = st.sampled_from([*option.opts, *option.secondary_opts])
    if option.is_flag or option.count:
        return named.map(lambda name: [name])
    words = [*_WORDS_OF_OPTIONS, *(["OUT", "OUT/below"] if "--output" in option.opts else paths)]
    if isinstance(option.type, click.Choice):
        words += [str(choice) for choice in option.type.choices]
    return st.one_of(
        st.tuples(named, st.sampled_from(words)).map(list),
        st.tuples(named, st.sampled_from(words)).map(lambda pair: [f"{pair[0]}={pair[1]}"]),
        named.map(lambda name: [name]),
    )


def command_lines(paths: list[str]) -> st.SearchStrategy[tuple[str, list[str]]]:
    """A verb, and options and arguments of it and others.

    Args:
        paths: names of places to use as values.
    """
    context = click.Context(lowrank)
    verbs: dict[str, click.Command] = {}
    for name in lowrank.list_commands(context):
        command = lowrank.get_command(context, name)
        assert command is not None
        inner = getattr(command, "commands", None)
        verbs |= {f"{name} {word}": sub for word, sub in inner.items()} if inner else {name: command}
    every = [option for command in verbs.values() for option in _options(command)]

    def of(verb: str) -> st.SearchStrategy[tuple[str, list[str]]]:
        own = st.one_of(*(_option(option, paths) for option in _options(verbs[verb])))
        other = st.sampled_from(every).flatmap(lambda option: _option(option, paths))
        word = st.sampled_from([*_WORDS_OF_OPTIONS, *paths, "--", "-x", "--no-such"]).map(lambda word: [word])
        pieces = st.lists(st.one_of(own, own, own, other, word), max_size=4)
        return pieces.map(lambda found: (verb, [part for piece in found for part in piece]))

    return st.sampled_from(sorted(verbs)).flatmap(of)
