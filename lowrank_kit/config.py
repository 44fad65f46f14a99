"""Settings: frozen dataclasses, read strictly from YAML or JSON and from the command line.

A settings class is a frozen dataclass whose fields are annotated with int, float, bool, str, Path, None, Literal, list,
tuple, another such dataclass, or a union of these. Nothing is guessed: an unknown key, a key written twice, a missing
key and a value of the wrong type are errors, and all of them are told at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from lowrank_kit.errors import UsageError, did_you_mean

Settings = TypeVar("Settings")


class _Problem(NamedTuple):
    text: str
    fix: str | None = None


class _ProblemsError(Exception):
    """A value with keys of its own has problems; each text says where in it."""

    def __init__(self, problems: list[_Problem]) -> None:
        super().__init__(problems)
        self.problems = problems


class _MismatchError(Exception):
    """A value does not have the annotated type; `fix` says what to write instead."""

    def __init__(self, expected: str, fix: str | None = None) -> None:
        super().__init__(expected)
        self.expected = expected
        self.fix = fix


def load_settings(
    cls: type[Settings], file: Path | None, overrides: Mapping[str, Any], *, one_of: Sequence[str] = ()
) -> Settings:
    """Settings from a file, with the command line's values over it and the class's defaults under it.

    Args:
        cls: a frozen dataclass.
        file: a .yaml, .yml or .json file, or None for the command line alone.
        overrides: field name -> value given on the command line. A value of None means "not given".
        one_of: fields of which one is wanted: one on the command line stands for all of them.

    Returns:
        An instance of `cls`.

    Raises:
        UsageError: the file cannot be read, or any key or value is wrong; the message lists every problem.
    """
    mapping, problems = ({}, []) if file is None else _read_mapping(file)
    given = {name: value for name, value in overrides.items() if value is not None}
    if given.keys() & set(one_of):
        mapping = {name: value for name, value in mapping.items() if name not in one_of}
    values, wrong = _typed_values(cls, mapping)
    problems += wrong
    given_values, wrong = _typed_values(cls, given)
    problems += wrong if file is None else [_Problem(f"on the command line: {text}", fix) for text, fix in wrong]
    problems += _missing_keys(cls, mapping.keys() | given.keys())
    if problems:
        _refuse("command line" if file is None else str(file), problems)
    return cls(**{**values, **given_values})


def from_dict(cls: type[Settings], mapping: Mapping[str, Any], where: str) -> Settings:
    """Settings from plain values, as `to_dict` or a parsed JSON file gives them.

    Args:
        cls: a frozen dataclass.
        mapping: key -> plain value.
        where: names the origin in an error message, e.g. the file that held it.

    Raises:
        UsageError: any key or value is wrong; the message lists every problem.
    """
    values, problems = _typed_values(cls, mapping)
    problems += _missing_keys(cls, mapping.keys())
    if problems:
        _refuse(where, problems)
    return cls(**values)


def to_dict(settings: Any) -> dict[str, Any]:
    """Field name -> plain value (numbers, text, lists, None) of a settings object, in field order.

    `from_dict(type(settings), to_dict(settings), where)` equals `settings`.
    """
    return {field.name: _plain(getattr(settings, field.name)) for field in dataclasses.fields(settings)}


def settings_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two `to_dict` results, one line per key, e.g. `keep: 0.8 -> 0.7`; empty when they agree."""
    names = [*new, *(name for name in old if name not in new)]
    lines = []
    for name in names:
        if name in old and name in new and _plain(old[name]) == _plain(new[name]):
            continue
        before = _shown(old[name]) if name in old else "absent"
        after = _shown(new[name]) if name in new else "absent"
        lines.append(f"{name}: {before} -> {after}")
    return lines


def _refuse(where: str, problems: Sequence[_Problem]) -> NoReturn:
    """One problem as message and hint; several as a list, each with its fix beside it."""
    if len(problems) == 1:
        raise UsageError(f"{where}: {problems[0].text}", hint=problems[0].fix)
    lines = [f"  - {text} ({fix})" if fix else f"  - {text}" for text, fix in problems]
    raise UsageError("\n".join([f"{where}: {len(problems)} problems", *lines]))


# Fields and types


def _typed_values(cls: type[Any], mapping: Mapping[Any, Any]) -> tuple[dict[str, Any], list[_Problem]]:
    """The values of `mapping` converted to the fields' types, and the problems found on the way."""
    annotations = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    values: dict[str, Any] = {}
    problems = []
    for key, value in mapping.items():
        if key not in names:
            problems.append(_Problem(f'unknown key "{key}"', did_you_mean(str(key), names)))
            continue
        try:
            values[key] = _convert(value, annotations[key])
        except _MismatchError as mismatch:
            problems.append(_Problem(f"{key} must be {mismatch.expected}, not {_shown(value)}", mismatch.fix))
        except _ProblemsError as inner:
            problems += [_Problem(f"{key}{text}", fix) for text, fix in inner.problems]
    return values, problems


def _missing_keys(cls: type[Any], present: Iterable[str]) -> list[_Problem]:
    annotations = get_type_hints(cls)
    present = set(present)
    return [
        _Problem(f'required key "{field.name}" is missing', f"add it: {_described(annotations[field.name])}")
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.name not in present
    ]


def _convert(value: Any, annotation: Any) -> Any:
    """`value` as `annotation` wants it; the only conversions are int to float, str to Path and list to tuple."""
    origin = get_origin(annotation)
    if isinstance(value, str) and "\0" in value:  # no name of a file holds it
        raise _MismatchError("text without NUL")
    if origin in (Union, types.UnionType):
        return _convert_union(value, annotation)
    if origin is Literal:
        return _convert_literal(value, annotation)
    if origin in (list, tuple):
        return _convert_sequence(value, annotation)
    if dataclasses.is_dataclass(annotation):
        return _convert_keys(value, annotation)
    if annotation is float and type(value) in (int, float):
        return _finite_float(value)
    if annotation is Path and isinstance(value, (str, Path)):
        return Path(value)
    if annotation not in _DESCRIPTIONS:
        raise TypeError(f"settings cannot hold a field of type {annotation}")
    if type(value) is not annotation:  # not isinstance: True is an instance of int
        raise _MismatchError(_described(annotation), _fix_for(value, annotation))
    return value


def _convert_union(value: Any, annotation: Any) -> Any:
    members = get_args(annotation)
    if type(value) in members and type(value) is not float:  # floats still have to pass as finite
        return value
    fixes = []
    for member in members:
        try:
            return _convert(value, member)
        except _MismatchError as mismatch:
            fixes.append(mismatch.fix)
    raise _MismatchError(_described(annotation), next((fix for fix in fixes if fix), None))


def _convert_literal(value: Any, annotation: Any) -> Any:
    choices = get_args(annotation)
    if any(type(value) is type(choice) and value == choice for choice in choices):
        return value
    raise _MismatchError(_described(annotation), did_you_mean(str(value), [str(choice) for choice in choices]))


def _convert_sequence(value: Any, annotation: Any) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if not isinstance(value, (list, tuple)):
        raise _MismatchError(_described(annotation), f"write it as a list: [{_shown(value)}]")
    if origin is list or arguments[-1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(value) != len(arguments):
        raise _MismatchError(_described(annotation), f"it has {len(value)} entries")
    items, problems = [], []
    for number, (item, argument) in enumerate(zip(value, arguments, strict=True), start=1):
        try:
            items.append(_convert(item, argument))
        except _MismatchError as mismatch:
            raise _MismatchError(_described(annotation), mismatch.fix) from None
        except _ProblemsError as inner:
            problems += [_Problem(f", entry {number}{text}", fix) for text, fix in inner.problems]
    if problems:
        raise _ProblemsError(problems)
    return origin(items)


def _convert_keys(value: Any, cls: Any) -> Any:
    """A value with keys of its own, which are those of a dataclass."""
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise _MismatchError(_described(cls))
    values, problems = _typed_values(cls, value)
    problems += _missing_keys(cls, value.keys())
    if not problems:
        try:
            return cls(**values)
        except UsageError as error:
            problems = [_Problem(error.message, error.hint)]
    raise _ProblemsError([_Problem(f": {text}", fix) for text, fix in problems])


def _finite_float(value: float) -> float:
    try:
        number = float(value)
    except OverflowError:  # an int of more than about 1.8e308
        number = math.inf
    if not math.isfinite(number):
        raise _MismatchError("a finite number")
    return number


_DESCRIPTIONS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    types.NoneType: "null",
}


def _described(annotation: Any) -> str:
    """An annotation in words, e.g. `a list of text` or `a number or null`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_described(member) for member in arguments)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        return f"a list (each {_described(arguments[0])})"
    if dataclasses.is_dataclass(annotation):
        return "keys and values with " + ", ".join(field.name for field in dataclasses.fields(annotation))
    if origin is tuple:
        return "a list of " + ", ".join(_described(argument) for argument in arguments)
    return _DESCRIPTIONS[annotation]


def _fix_for(value: Any, annotation: Any) -> str | None:
    """What to write instead, where the mistake has a usual cause."""
    if isinstance(value, str) and annotation in (int, float, bool):
        return "numbers, true and false are written without quotes"
    if isinstance(value, (int, float)) and annotation in (str, Path):
        return f'put it in quotes: "{_shown(value)}"'
    if isinstance(value, float) and annotation is int and value.is_integer():
        return f"write {int(value)}"
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return value


def _shown(value: Any) -> str:
    """A value as one would write it in the file: text in quotes, true, null."""
    return json.dumps(_plain(value), default=str, ensure_ascii=False)


# Files


def _read_mapping(file: Path) -> tuple[dict[Any, Any], list[_Problem]]:
    """The top-level mapping of a YAML or JSON file, and one problem for each key that is written twice.

    Raises:
        UsageError: no such file, a format we do not read, a syntax error, or no mapping at the top.
    """
    parse = {".yaml": _parse_yaml, ".yml": _parse_yaml, ".json": _parse_json}.get(file.suffix.lower())
    if parse is None:
        raise UsageError(f"settings file {file} is neither YAML nor JSON", hint="name it .yaml, .yml or .json")
    try:
        document, problems = parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"no such settings file: {file}", hint="check the path, from the current folder") from None
    except OSError as error:
        raise UsageError(f"settings file {file} cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        position = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UsageError(f"{file} is not valid YAML: {position}{error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # bad JSON, not UTF-8, 5000 digits or brackets
        raise UsageError(f"{file} cannot be parsed: {error}") from error
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise UsageError(
            f"{file} must hold keys and values, not {_shown(document)}", hint="write lines of `key: value`"
        )
    return document, problems


def _parse_yaml(text: str) -> tuple[Any, list[_Problem]]:
    loader = _StrictYaml(text)
    try:
        return loader.get_single_data(), loader.problems
    finally:
        loader.dispose()


def _parse_json(text: str) -> tuple[Any, list[_Problem]]:
    problems: list[_Problem] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        problems.extend(_written_twice(name) for name in dict.fromkeys(names) if names.count(name) > 1)
        return dict(pairs)

    return json.loads(text, object_pairs_hook=unique), problems


def _written_twice(key: Any, line: int | None = None) -> _Problem:
    again = "" if line is None else f", again on line {line}"
    return _Problem(f'key "{key}" is written twice{again}', "keep one of them")


class _StrictYaml(yaml.SafeLoader):
    """YAML with the scalars of YAML 1.2: `1e-4` is a number, `no` and `1:30` are text; keys written twice are kept
    in `problems`. (PyYAML's own rules are those of 1.1: `1e-4` is text, `no` is false, `1:30` is 90, the last of
    two equal keys wins.)"""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own name and form)

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.problems: list[_Problem] = []

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # a value that holds itself would have no end
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(None, None, "aliases are not read, write the value again", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in seen:
                self.problems.append(_written_twice(key_node.value, key_node.start_mark.line + 1))
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


_SCALARS = {
    "null": (r"~|null|Null|NULL|", [*"~nN", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": (r"[-+]?(0|[1-9][0-9_]*)", [*"-+0123456789"]),
    "float": (
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|nan)",
        [*"-+.0123456789"],
    ),
}
for _name, (_pattern, _first_characters) in _SCALARS.items():
    _StrictYaml.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first_characters)
