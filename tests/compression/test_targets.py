"""Which matrices are targets: by pattern, the head by its name, and never the embeddings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.compression.plan import Plan, make_plan
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.compression.targets import foldable
from lowrank_kit.errors import DoesNotFitError, UsageError
from tests.families import token_ids


def plan_of(folder: Path, **given: Any) -> Plan:
    asked: dict[str, Any] = {"objective": "plain", "keep": 0.5}
    return make_plan(Checkpoint.open(folder), CompressSettings(**asked | given))


def notes(plan: Plan) -> dict[str, set[str]]:
    """Role -> why its matrices stay dense, "" for those that do not."""
    found: dict[str, set[str]] = {}
    for m in plan.matrices:
        found.setdefault(m.stored.matrix.role, set()).add(m.reason)
    return found


def test_what_is_excluded_stays_dense_and_counts(dense: Callable[..., Path]) -> None:
    plan, all_of_them = plan_of(dense("llama"), exclude=("*.o_proj", "*.0.mlp.up_proj")), plan_of(dense("llama"))
    assert notes(plan) == {role: {""} for role in ("q", "k", "v", "gate", "down")} | {
        "o": {"excluded"},
        "up": {"excluded", ""},
    }
    for scale in (plan, all_of_them):
        assert 0.49 < scale.totals()["matrix_keep"] <= 0.5
    ranks = {m.stored.matrix.name: m.rank or 0 for m in plan.matrices}
    for m in all_of_them.matrices:  # whose share the others pay
        assert m.rank is not None
        name = m.stored.matrix.name
        assert ranks[name] < m.rank if plan.said.dense.get(name) is None else ranks[name] == 0


def test_what_is_not_included_stays_dense(dense: Callable[..., Path]) -> None:
    plan = plan_of(dense("llama"), include=("*.gate_proj", "*.up_proj"), exclude=("*.1.*",), keep=0.9)
    why = {m.stored.matrix.name.removeprefix("model.layers."): m.reason for m in plan.matrices}
    assert [name for name, reason in why.items() if not reason] == ["0.mlp.gate_proj", "0.mlp.up_proj"]
    assert why["0.self_attn.q_proj"] == "not included"
    assert why["1.mlp.up_proj"] == why["1.self_attn.q_proj"] == "excluded"
    assert 0.89 < plan.totals()["matrix_keep"] <= 0.9


def test_a_budget_that_the_targets_cannot_meet(dense: Callable[..., Path]) -> None:
    with pytest.raises(DoesNotFitError) as raised:
        plan_of(dense("llama"), include=("*.k_proj",), keep=0.5)
    assert raised.value.exit_code == 3
    assert "2 of 14 matrices at rank 1" in str(raised.value)
    assert "12 of 14 matrices dense (not included)" in str(raised.value)
    least = float(str(raised.value).partition("--keep ")[2].split(",")[0])
    assert {m.rank for m in plan_of(dense("llama"), include=("*.k_proj",), keep=least).matrices} == {None, 1}


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_only_targets_are_factorized(dense: Callable[..., Path], family: str) -> None:
    settings = CompressSettings(keep=0.5, exclude=("*.0.*",))
    wanted = {stored.matrix.name for stored in foldable(Checkpoint.open(dense(family)), settings)}
    assert wanted == {unit.matrix.name for unit in Checkpoint.open(dense(family)).units() if unit.matrix.block == 1}


@pytest.mark.parametrize(
    ("family", "given", "message"),
    [
        (
            "llama",
            {"exclude": ("*.o_prj",)},
            '"*.o_prj" matches none of 14 matrices\nhint: names are as "model.layers.0.self_attn.o_proj"',
        ),
        ("llama", {"include": ("*.k_proj", "*down")}, 'hint: names are as "model.layers.0.mlp.down_proj"'),
        ("llama", {"include": ("model.embed_tokens",)}, "only the embeddings model.embed_tokens, which stay dense"),
        ("llama", {"exclude": ("*embed*",)}, "only the embeddings model.embed_tokens, which stay dense"),
        ("llama", {"include": ("lm_*",)}, "only the LM head: it is a target by its full name alone"),
        ("llama", {"exclude": ("lm_head",)}, "hint: --include lm_head; it stays dense unless it is included"),
        ("llama", {"exclude": ("*",)}, "nothing is left to factorize: 14 of 14 matrices stay dense"),
        (
            "gpt2",
            {"include": ("lm_head",)},
            "lm_head is tied to transformer.wte: two factors of it would be the "
            "embeddings too, which stay dense\nhint: leave out lm_head",
        ),
        ("gpt2", {"include": ("transformer.wte",)}, "lm_head is tied to transformer.wte"),
    ],
)
def test_patterns_that_make_no_sense(
    dense: Callable[..., Path], family: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as raised:
        plan_of(dense(family), **given)
    assert message in str(raised.value)


def test_a_star_does_not_take_the_head(dense: Callable[..., Path]) -> None:
    assert "head" not in notes(plan_of(dense("llama"), include=("*",)))


@pytest.mark.parametrize(
    "given",
    [
        {"objective": "plain"},
        {"objective": "whiten", "form": "pivoted"},
        {"objective": "anchored-two-sided", "allocation": "loss", "refine": "both", "form": "auto"},
    ],
    ids=["plain", "whiten", "all"],
)
def test_the_head_is_a_target_by_its_name(
    given: dict[str, Any], tiny_llama_folder: Path, text_file: str, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"keep": 0.6, "include": ("*", "lm_head"), "text": text_file, "batch_size": 4}
    asked |= {"calibration_blocks": 12, "check_blocks": 4, "refine_blocks": 4, "block_tokens": 32}
    settings = CompressSettings(**asked | given)
    report = compress(tiny_llama_folder, tmp_path / "out", settings, device="cpu", dtype="float32")
    (head,) = [row for row in report["matrices"] if row["role"] == "head"]
    assert (head["matrix"], head["block"], head["out"], head["in"]) == ("lm_head", None, 384, 32)
    assert head["rank"] is not None
    assert 0 < head["relative_error"] < 1
    assert report["totals"]["matrices"] == 15
    assert 0.58 < report["totals"]["matrix_keep"] <= 0.6
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["matrices"]["lm_head"] == {"rank": head["rank"], "form": head["form"]}
    assert config["tie_word_embeddings"] is False
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values())
    logits = model(input_ids=token_ids()).logits
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert not model.get_input_embeddings().weight.equal(model.lm_head.A.weight)
    hidden = model.base_model(input_ids=token_ids()).last_hidden_state
    if head["form"] == "factors":
        expected = hidden @ stored["lm_head.A.weight"].mT @ stored["lm_head.B.weight"].mT
        torch.testing.assert_close(logits, expected)
    # What it holds can be saved and generated from, and the body loaded by itself.
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again(input_ids=token_ids()).logits.equal(logits)
    assert again.generate(token_ids(1, 4), max_new_tokens=3, do_sample=False).shape == (1, 7)
    body = AutoModel.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(body(input_ids=token_ids()).last_hidden_state, hidden)
    if "loss_compressed" in (report["check"] or {}):
        assert report["check"]["loss_compressed"] < report["check"]["loss_dense"] + 0.5
