"""Keeps of their own: the first rule that takes a matrix, within its keep and the one budget; written and read."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.main import lowrank
from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.compression.allocation import Evidence
from lowrank_kit.compression.forms import FORMS
from lowrank_kit.compression.ladder import ladder
from lowrank_kit.compression.plan import Plan, PlannedMatrix, evidence_needed, make_plan
from lowrank_kit.compression.recipe import KeepRule
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import BUDGETS, CompressSettings
from lowrank_kit.config import from_dict, load_settings, to_dict
from lowrank_kit.errors import DoesNotFitError, UsageError
from tests.compression.test_plan import random_evidence

KEPT_WHOLE = "kept whole by the recipe"


def plan_of(folder: Path, *rules: KeepRule, **given: Any) -> Plan:
    asked: dict[str, Any] = {"objective": "plain", "keep": 0.6, "keeps": rules}
    return make_plan(Checkpoint.open(folder), CompressSettings(**asked | given))


def by_name(plan: Plan) -> dict[str, PlannedMatrix]:
    return {m.stored.matrix.name.removeprefix("model.layers."): m for m in plan.matrices}


def test_the_first_rule_that_takes_a_matrix(dense: Callable[..., Path]) -> None:
    rules = (
        KeepRule(match="*.k_proj", block=1, keep=1.0),
        KeepRule(blocks="1-7", role="k", keep=0.2),  # which the rule before has taken
        KeepRule(role="down", keep=0.4),
        KeepRule(block=0, keep=0.8),
    )
    plan = plan_of(dense("llama"), *rules)
    kept = {name: m.numbers_after / m.numbers_before for name, m in by_name(plan).items()}
    assert by_name(plan)["1.self_attn.k_proj"].reason == KEPT_WHOLE
    assert 0.33 < kept["0.mlp.down_proj"] <= 0.4
    assert 0.33 < kept["1.mlp.down_proj"] <= 0.4
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj"):
        assert 0.7 < kept[f"0.{name}"] <= 0.8
    # The others share what is left, which is less.
    others = [kept[f"1.{name}"] for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")]
    assert max(others) < 0.6
    assert 0.58 < plan.totals()["matrix_keep"] <= 0.6


def plan_or_refusal(source: Checkpoint, asked: CompressSettings, evidence: dict[str, Evidence] | None) -> Plan | str:
    try:
        return make_plan(source, asked, evidence)
    except DoesNotFitError as error:
        return error.message


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    family=st.sampled_from(["llama", "gpt2", "opt"]),
    keep=st.floats(0.01, 1),
    form=st.sampled_from([*FORMS, "auto"]),
    budget=st.sampled_from(BUDGETS),
    share=st.floats(0, 1),
    allocation=st.sampled_from(["uniform", "erank", "loss"]),
    seed=st.integers(0, 3),
)
def test_own_keeps_and_the_one_budget(
    dense: Callable[..., Path],
    family: str,
    keep: float,
    form: str,
    budget: str,
    share: float,
    allocation: str,
    seed: int,
) -> None:
    """An own keep is the largest rank within it, whatever the budget; the budget is not exceeded, and used up."""
    source = Checkpoint.open(dense(family))
    asked: dict[str, Any] = {"form": form, "allocation": allocation}
    everything: dict[str, Any] = {budget: 1 if budget == "keep" else 10**9}
    rules = (KeepRule(role="up", keep=keep), KeepRule(role="o", block=1, keep=1))
    whole = CompressSettings(**asked, **everything, keeps=rules)
    largest = plan_or_refusal(source, whole, None)
    if isinstance(largest, str):
        assert f"the recipe keeps {keep:g} of" in largest
        return
    assert evidence_needed(source, whole) == "nothing"
    dense_spent = make_plan(source, CompressSettings(**asked, **everything)).spent
    amount: Any = (share or 0.1) if budget == "keep" else max(1, int(share * dense_spent))
    tight = CompressSettings(**asked | {budget: amount, "keeps": rules})
    plan = plan_or_refusal(source, tight, random_evidence(source, seed))
    if isinstance(plan, str):
        assert "the smallest possible is" in plan
        assert "the recipe" in plan
        return
    assert plan.spent <= (Fraction(str(amount)) * dense_spent if budget == "keep" else amount)
    for one, other in zip(plan.matrices, largest.matrices, strict=True):
        matrix = one.stored.matrix
        if matrix.role != "up" and (matrix.role, matrix.block) != ("o", 1):
            continue
        assert (one.rank, one.form) == (other.rank, other.form)  # whatever is left for the others
        if matrix.role == "o":
            assert one.reason == KEPT_WHOLE
            continue
        assert one.numbers_after <= Fraction(str(keep)) * one.numbers_before
        if one.rank is not None:
            rungs = ladder(matrix.shape, one.form, None, None)
            above = [r for r in rungs.ranks[:-1].tolist() if r > one.rank]
            assert all(FORMS[one.form].numbers(matrix.shape, r) > keep * math.prod(matrix.shape) for r in above)


def test_everything_else_fits(dense: Callable[..., Path]) -> None:
    plan = plan_of(dense("llama"), KeepRule(role="q", keep=0.5), keep=1.0, allocation="loss")
    assert {m.stored.matrix.role for m in plan.matrices if m.rank is not None} == {"q"}
    assert {m.reason for m in plan.matrices if m.rank is None} == {"the dense model fits"}


def test_too_little_is_left(dense: Callable[..., Path]) -> None:
    rules = (KeepRule(role="gate", keep=0.9), KeepRule(role="up", keep=0.9), KeepRule(role="down", keep=0.9))
    with pytest.raises(DoesNotFitError) as raised:
        plan_of(dense("llama"), *rules, keep=0.5)
    assert "6 of 14 matrices as the recipe keeps them" in raised.value.message
    assert "8 of 14 matrices at rank 1" in raised.value.message
    least = float((raised.value.hint or "").removeprefix("--keep ").removesuffix(", or more"))
    plan = plan_of(dense("llama"), *rules, keep=least)
    assert {m.rank for m in plan.matrices if m.stored.matrix.role in "qkvo"} == {1}
    with pytest.raises(DoesNotFitError):
        plan_of(dense("llama"), *rules, keep=least - 2e-6)


def test_a_keep_below_rank_1(dense: Callable[..., Path]) -> None:
    with pytest.raises(DoesNotFitError) as raised:
        plan_of(dense("llama"), KeepRule(role="q", keep=0.05))
    assert str(raised.value) == (
        "the recipe keeps 0.05 of model.layers.0.self_attn.q_proj, and the smallest possible is 0.063477: "
        "65 of its 1,024 numbers, at rank 1\nhint: keep: 0.063477, or more"
    )
    assert by_name(plan_of(dense("llama"), KeepRule(role="q", keep=0.063477)))["0.self_attn.q_proj"].rank == 1


def test_excluded_stays_dense_whatever_a_rule_says(dense: Callable[..., Path]) -> None:
    plan = plan_of(dense("llama"), KeepRule(role="q", keep=0.3), exclude=("*.0.*.q_proj",))
    assert by_name(plan)["0.self_attn.q_proj"].reason == "excluded"
    assert by_name(plan)["1.self_attn.q_proj"].rank is not None


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"keep": 0.5}, "a keep of which matrices is not said"),
        ({"keep": 0, "role": "q"}, r"keep must be in \(0, 1\], got 0"),
        ({"keep": 1.2, "role": "q"}, r"keep must be in \(0, 1\], got 1.2"),
        ({"keep": 0.5, "block": 1, "blocks": "1-2"}, "block and blocks cannot both be said"),
        ({"keep": 0.5, "blocks": "3"}, 'blocks are said as first-last, got "3"\nhint: blocks: 28-31'),
        ({"keep": 0.5, "blocks": "3-1"}, 'blocks are said as first-last, got "3-1"'),
        ({"keep": 0.5, "role": "dwon"}, '{keep: 0.5, role: dwon} takes none of 14 matrices\nhint: did you mean "down'),
        ({"keep": 0.5, "block": 2}, "{keep: 0.5, block: 2} takes none of 14 matrices\nhint: blocks are 0 to 1"),
        ({"keep": 0.5, "match": "*.k_prj"}, r'the pattern "\*.k_prj" matches none of 14 matrices'),
    ],
)
def test_rules_that_make_no_sense(dense: Callable[..., Path], rule: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("{", r"\{")):
        plan_of(dense("llama"), KeepRule(**rule))


# Files


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_recipe_and_the_command_line_over_it(tmp_path: Path) -> None:
    path = recipe(tmp_path, 'keep: 0.7\nexclude: ["*.o_proj"]\nseed: 3\nkeeps:\n  - {blocks: 2-3, keep: 1}\n')
    found = load_settings(CompressSettings, path, {}, one_of=BUDGETS)
    assert found == CompressSettings(keep=0.7, exclude=("*.o_proj",), seed=3, keeps=(KeepRule(blocks="2-3", keep=1.0),))
    over = load_settings(CompressSettings, path, {"size": 10**6, "exclude": ("*.v_proj",)}, one_of=BUDGETS)
    assert (over.keep, over.size, over.exclude, over.seed) == (None, 10**6, ("*.v_proj",), 3)
    # As a manifest keeps them.
    assert from_dict(CompressSettings, json.loads(json.dumps(to_dict(found))), "manifest") == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keeep: 0.5\n", 'unknown key "keeep"\nhint: did you mean "keep"?'),
        ("keep: 0.5\nkeep: 0.6\n", 'key "keep" is written twice, again on line 2'),
        ("keep: half\n", 'keep must be a number or null, not "half"'),
        ("keep: 0.5\nkeeps: {role: q}\n", "keeps must be a list (each keys and values with keep, match, role, block"),
        ("keep: 0.5\nkeeps: [0.5]\n", "keeps must be a list (each keys and values with"),
        (
            "keep: 0.5\nkeeps: [{role: q, keep: 0.5}, {rolle: q, keep: 1}]\n",
            'keeps, entry 2: unknown key "rolle"\nhint: did you mean "role"?',
        ),
        ("keep: 0.5\nkeeps: [{role: q}]\n", 'keeps, entry 1: required key "keep" is missing'),
        ("keep: 0.5\nkeeps: [{role: q, keep: 2}]\n", "keeps, entry 1: keep must be in (0, 1], got 2"),
        ("keep: 0.5\nkeeps: [{role: q, keep: [1]}]\n", "keeps, entry 1: keep must be a number, not [1]"),
        ("keep: 0.5\nkeeps: [{role: q, keep: 2}, {keep: 1}]\n", "2 problems"),
        ("keep: 0.5\nkeeps: [{role: q, keep: 1}\n", "is not valid YAML: line 3, column 1"),
        ("- keep\n", "must hold keys and values"),
    ],
)
def test_recipes_that_make_no_sense(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        load_settings(CompressSettings, recipe(tmp_path, text), {}, one_of=BUDGETS)
    assert str(tmp_path / "recipe.yaml") in raised.value.message
    assert message in str(raised.value)


def test_the_command_names_the_recipe_that_it_writes(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_process_after: None
) -> None:
    rules = (KeepRule(match="*.q_proj", keep=1 / 3), KeepRule(blocks="0-1", role="v", keep=1.0))
    asked = CompressSettings(keep=0.6, objective="plain", keeps=rules, exclude=("*.0.*.k_proj", "*.1.*.o_proj"))
    report = compress(tiny_llama_folder, tmp_path / "out", asked, device="cpu")
    assert "--exclude '*.0.*.k_proj' --exclude '*.1.*.o_proj'" in report["command"]
    assert report["command"].count(" --recipe recipe.yaml ") == 1
    written = json.loads((tmp_path / "out" / "compression.json").read_text())["settings"]
    assert from_dict(CompressSettings, written, "compression.json").keeps == rules
    monkeypatch.chdir(tmp_path / "out")
    words = shlex.split(report["command"])
    done = CliRunner().invoke(lowrank, [*words[1:-1], str(tmp_path / "again")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    for name in ("model.safetensors", "recipe.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    plain = compress(tiny_llama_folder, tmp_path / "plain", CompressSettings(keep=0.6, objective="plain"), device="cpu")
    assert "--recipe" not in plain["command"]
    assert not (tmp_path / "plain" / "recipe.yaml").exists()
