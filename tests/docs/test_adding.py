"""The pages on adding a method: their code, put where they say, goes through the contract tests as it stands."""

from __future__ import annotations

import inspect
import itertools
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cli.main import run
from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.compression import objectives
from lowrank_kit.optim import groups as optimizer_groups
from lowrank_kit.optim import numuon, rules
from lowrank_kit.training import settings as train_settings
from tests.compression import test_objectives
from tests.docs.blocks import ROOT, blocks
from tests.optim import test_groups, test_layout, test_numuon, test_spectral_decay, test_state
from tests.pages import write_pages
from tests.process import same_process

Call = tuple[Any, dict[str, Any]]


def code(page: str) -> list[str]:
    """The blocks of Python of a page: a file, what registers it, and its row if that is code."""
    return [block.text for block in blocks(ROOT / "docs" / page) if block.language == "python"]


def as_module(name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of a block, as if its file were there."""
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(source, name, "exec"), module.__dict__)
    return module


def contract(modules: list[ModuleType], parameter: str, names: tuple[str, ...], name: str) -> Iterator[Call]:
    """The calls of all tests over some names, for one more name.

    Args:
        modules: of tests.
        parameter: argument that the tests have for the name.
        names: that they are run over; a table among them has the new one already.
        name: the new one.
    """
    for module in modules:
        for test in vars(module).values():
            axes = [mark.args for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
            own = [values for words, values, *_ in axes if words == parameter]
            if not own or set(own[0]) - {name} != set(names):
                continue
            others = [(words, list(values)) for words, values, *_ in axes if words != parameter]
            for chosen in itertools.product(*(values for _, values in others)):
                given: dict[str, Any] = {parameter: name}
                for (words, _), value in zip(others, chosen, strict=True):
                    split = words if isinstance(words, tuple) else tuple(words.split(","))
                    given |= dict(zip((w.strip() for w in split), value if len(split) > 1 else (value,), strict=True))
                yield test, given


def run_contract(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Call all, each with a monkeypatch of its own where it asks for one; names of the tests."""
    for test, given in calls:
        with monkeypatch.context() as inner:
            fixtures = {"monkeypatch": inner} if "monkeypatch" in inspect.signature(test).parameters else {}
            test(**given, **fixtures)
    return {test.__name__ for test, _ in calls}


def test_the_objective_of_the_page(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, line, row = code("adding-an-objective.md")
    known = tuple(objectives.OBJECTIVES)
    module = as_module("lowrank_kit.compression.objectives.rows", file, monkeypatch)
    for table in (objectives.OBJECTIVES, test_objectives.DEFINITIONS):
        monkeypatch.setitem(table, "rows", None)  # what the page puts there is taken away again
    exec(line, {"OBJECTIVES": objectives.OBJECTIVES, "ROWS": module.ROWS})
    exec(row, vars(test_objectives))
    ran = run_contract(list(contract([test_objectives], "name", known, "rows")), monkeypatch)
    assert {"test_contract", "test_closed_forms_are_the_optimum", "test_needs_are_what_is_read"} <= ran

    text = str(write_pages(tmp_path / "pages.jsonl", num_pages=20))
    command = ["compress", str(tiny_llama_folder), "--keep", "0.5", "--objective", "rows", "--text", text]
    with same_process():
        assert run([*command, "--calibration-blocks", "4", "--check-blocks", "2", "-o", str(tmp_path / "out")]) == 0
    assert "wrote" in capsys.readouterr().out
    assert any(matrix.compressed for matrix in Checkpoint.open(tmp_path / "out").matrices())


def test_the_rule_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    file, lines = code("adding-an-optimizer-rule.md")
    known = tuple(rules.RULES)
    module = as_module("lowrank_kit.optim.lion", file, monkeypatch)
    for table in (rules.RULES, train_settings.RECIPES):
        monkeypatch.setitem(table, "lion", None)
    exec(lines, {"RULES": rules.RULES, "RECIPES": train_settings.RECIPES, "lion_step": module.lion_step})
    assert rules.RULES is optimizer_groups.RULES is numuon.RULES
    tests = [test_numuon, test_groups, test_state, test_layout, test_spectral_decay]
    ran = run_contract(list(contract(tests, "rule", known, "lion")), monkeypatch)
    assert {"test_training_lowers_the_loss", "test_weight_decay_is_decoupled"} <= ran

    monkeypatch.setattr(train_settings, "OPTIMIZERS", tuple(rules.RULES))
    chosen = train_settings.TrainSettings(model_config="1m", steps=1, optimizer="lion")
    assert chosen.peak_lr == 3e-4
