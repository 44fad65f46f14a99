"""The plan: ranks within the budget, every byte known before any work, and a reason where a matrix stays dense."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.stacks import StoredStack
from lowrank_kit.checkpoint.writer import shard_bytes
from lowrank_kit.compression.allocation import ALLOCATIONS, Evidence
from lowrank_kit.compression.forms import FORMS
from lowrank_kit.compression.ladder import ladder, stack_ladder
from lowrank_kit.compression.plan import Plan, evidence_needed, make_plan, output_name
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.errors import DoesNotFitError, UsageError
from tests.families import build, token_ids

FAMILIES = ["llama", "gpt2", "gemma", "mixtral", "opt"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plan_of(folder: Path, **given: object) -> Plan:
    return make_plan(Checkpoint.open(folder), CompressSettings(**({"objective": "plain"} | given)))  # type: ignore[arg-type]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    family=st.sampled_from(FAMILIES),
    dtype=st.sampled_from(DTYPES),
    keep=st.floats(0.9, 1.0) | st.floats(0.1, 1.0),
    most=st.sampled_from([1, 3_000, 30_000, 10**9]),
    form=st.sampled_from(list(FORMS)),
)
def test_bytes_written_are_the_bytes_planned(
    dense: Callable[..., Path], family: str, dtype: torch.dtype, keep: float, most: int, form: str
) -> None:
    source = dense(family, dtype)
    plan = plan_of(source, keep=keep, max_shard_bytes=most, form=form)
    with TemporaryDirectory() as parent:
        output = Path(parent, "out")
        report = compress(source, output, plan.settings)
        files = {path.name: path.stat().st_size for path in output.glob("*.safetensors")}
        shapes = [tensor.numel() for file in files for tensor in load_file(output / file).values()]
    assert files == {shard.file: shard.nbytes for shard in plan.shards}
    totals = plan.totals()
    assert report["totals"] == totals
    assert totals["bytes_after"] == sum(files.values())
    assert totals["bytes_before"] == sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert totals["model_numbers_after"] == sum(shapes)


def random_evidence(source: Checkpoint, seed: int) -> dict[str, Evidence]:
    generator = torch.Generator().manual_seed(seed)
    evidence = {}
    for stored in source.units():
        values = torch.rand(min(stored.matrix.shape), generator=generator).sort(descending=True).values
        evidence[stored.matrix.name] = Evidence(values, values, values)
    return evidence


def amount_spent(plan: Plan, budget: str, scope: str) -> int:
    """What is in the files of the plan: bytes of the files, or numbers or bytes of tensors, by their headers alone."""
    if (budget, scope) == ("size", "model"):
        return sum(shard_bytes(shard.headers) for shard in plan.shards)
    outside = set()
    if scope == "matrices":
        matrices = {name: m for m in plan.matrices for name in m.stored.tensors}
        outside = {name for name in plan.checkpoint.headers if name not in matrices} | {
            output_name(name, matrices) for name in plan.checkpoint.headers if name not in matrices
        }
    headers = [header for shard in plan.shards for header in shard.headers if header.name not in outside]
    return sum(h.nbytes if budget == "size" else math.prod(h.shape) for h in headers)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    family=st.sampled_from(FAMILIES),
    dtype=st.sampled_from(DTYPES),
    allocation=st.sampled_from(sorted(ALLOCATIONS)),
    form=st.sampled_from(sorted(FORMS)),
    budget=st.sampled_from(["keep", "params", "size"]),
    scope=st.sampled_from(["matrices", "model"]),
    share=st.floats(0, 1),
    most=st.sampled_from([1, 3_000, 30_000, 10**9]),
    align=st.sampled_from([None, 1, 4]),
    seed=st.integers(0, 5),
)
def test_no_budget_is_exceeded(
    dense: Callable[..., Path],
    family: str,
    dtype: torch.dtype,
    allocation: str,
    form: str,
    budget: str,
    scope: str,
    share: float,
    most: int,
    align: int | None,
    seed: int,
) -> None:
    source = Checkpoint.open(dense(family, dtype))
    asked = {"allocation": allocation, "form": form, "scope": scope, "max_shard_bytes": most, "align": align}
    whole = plan_of(source.path, **{budget: 1 if budget == "keep" else 10**12}, **asked)
    most_spent = amount_spent(whole, budget, scope)
    assert all(planned.rank is None for planned in whole.matrices)
    least = smallest_possible(source.path, budget, asked)
    amount = least + share * ((1 if budget == "keep" else most_spent) - least)
    plan = make_plan(
        source,
        CompressSettings(**asked | {budget: amount if budget == "keep" else int(amount)}),  # type: ignore[arg-type]
        random_evidence(source, seed),
    )
    limit = Fraction(str(amount)) * most_spent if budget == "keep" else int(amount)
    assert plan.spent == amount_spent(plan, budget, scope) <= limit
    if (budget, scope) != ("size", "model"):
        assert not affordable(plan, int(limit) - plan.spent)


def smallest_possible(folder: Path, budget: str, asked: dict[str, object]) -> float | int:
    """As the error tells it."""
    with pytest.raises(DoesNotFitError) as raised:
        plan_of(folder, **{budget: 1e-9 if budget == "keep" else 1}, **asked)
    told = re.search(rf"--{budget} (\S+), or more", str(raised.value))
    assert told is not None
    return float(told[1]) if budget == "keep" else int(told[1])


def affordable(plan: Plan, left: int) -> list[str]:
    """Matrices whose next rank, or which dense, would have fitted."""
    found = []
    for planned in plan.matrices:
        if planned.rank is None:
            continue
        dtype = planned.dtype if plan.settings.budget == "size" else None
        one = (
            stack_ladder(planned.stored, dtype, plan.settings.align)
            if isinstance(planned.stored, StoredStack)
            else ladder(planned.stored.matrix.shape, planned.form, dtype, plan.settings.align)
        )
        step = one.ranks.tolist().index(planned.rank)
        if one.costs[step + 1] - one.costs[step] <= left:
            found.append(planned.stored.matrix.name)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("most", [3_000, 10**9])
def test_the_files_hold_to_the_size(dense: Callable[..., Path], family: str, most: int, tmp_path: Path) -> None:
    source = dense(family, torch.bfloat16)
    asked: dict[str, object] = {"max_shard_bytes": most}
    least = int(smallest_possible(source, "size", asked))
    whole = sum(shard.nbytes for shard in plan_of(source, keep=1, **asked).shards)
    for size in (least, least + 1, (least + whole) // 2, whole - 1, whole):
        output = tmp_path / str(size)
        compress(source, output, plan_of(source, size=size, **asked).settings)
        written = sum(path.stat().st_size for path in output.glob("*.safetensors"))
        # No step here costs more than 2 KiB, and digits in a header a few bytes each.
        assert size - 2_100 <= written <= size
    assert written == size == whole
    with pytest.raises(
        DoesNotFitError, match=rf"^the budget is {least - 1:,} bytes of the model's files, and the smal"
    ):
        plan_of(source, size=least - 1, **asked)


@pytest.mark.parametrize("budget", ["keep", "params"])
@pytest.mark.parametrize("scope", ["matrices", "model"])
def test_the_smallest_possible_is_possible(dense: Callable[..., Path], budget: str, scope: str) -> None:
    asked: dict[str, object] = {"scope": scope}
    for family, told in (
        ("mixtral", "24 of 24 matrices at rank 1, everything else"),
        ("gpt_oss", "8 of 24 matrices at rank 1, 16 of 24 matrices dense (experts stored transposed)"),
    ):
        least = smallest_possible(dense(family), budget, asked)
        plan = plan_of(dense(family), **{budget: least}, **asked)
        assert {planned.rank for planned in plan.matrices if not planned.reason} == {1}
        less = least * 0.999 if budget == "keep" else least - 1
        with pytest.raises(DoesNotFitError) as raised:
            plan_of(dense(family), **{budget: less}, **asked)
        assert raised.value.exit_code == 3
        assert told in raised.value.message


def test_evidence_is_asked_for(dense: Callable[..., Path]) -> None:
    source = Checkpoint.open(dense("llama"))
    for allocation, needs in {"uniform": "nothing", "erank": "weights", "lagrange": "inputs", "loss": "loss"}.items():
        settings = CompressSettings(keep=0.5, allocation=allocation)
        assert evidence_needed(source, settings) == needs
        assert evidence_needed(source, CompressSettings(keep=1, allocation=allocation)) == "nothing"
        if needs != "nothing":
            with pytest.raises(ValueError, match=f"allocation {allocation} needs evidence"):
                make_plan(source, settings)
    with pytest.raises(DoesNotFitError):
        evidence_needed(source, CompressSettings(params=1, allocation="loss"))


def test_totals_add_up(dense: Callable[..., Path]) -> None:
    plan = plan_of(dense("llama"), keep=0.5)
    totals = plan.totals()
    model = build("llama")
    assert totals["model_numbers_before"] == sum(parameter.numel() for parameter in model.parameters())
    outside = model.get_input_embeddings().weight.numel() + model.lm_head.weight.numel()
    norms = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    assert totals["matrix_numbers_before"] == totals["model_numbers_before"] - outside - norms
    assert totals["matrix_keep"] == totals["matrix_numbers_after"] / totals["matrix_numbers_before"]
    assert 0.49 < totals["matrix_keep"] <= 0.5
    assert (totals["factorized"], totals["matrices"]) == (14, 14)


def test_a_matrix_that_would_not_get_smaller_stays_dense(
    tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM]
) -> None:
    # q, k, v and o are 2 x 2: rank 1 takes four numbers and the sentinel.
    model = tiny_llama(hidden_size=2, intermediate_size=40, num_attention_heads=1, num_key_value_heads=1)
    model.save_pretrained(tmp_path / "dense")
    plan = plan_of(tmp_path / "dense", keep=0.6)
    notes = {
        row["role"]: (row["form"], row["rank"], row["kept"], row["note"]) for row in (p.row() for p in plan.matrices)
    }
    for role in "qkvo":
        assert notes[role] == ("dense", None, 1.0, "rank 1 saves nothing")
    for role in ("gate", "up", "down"):
        assert notes[role] == ("factors", 1, 43 / 80, "")  # rank 2 would take 85
    assert set(plan.quantization_config()) == {
        f"model.layers.{block}.mlp.{role}_proj" for block in (0, 1) for role in ("gate", "up", "down")
    }
    compress(tmp_path / "dense", tmp_path / "out", plan.settings)
    loaded, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values())
    assert loaded(input_ids=token_ids()).logits.isfinite().all()


def test_experts_that_cannot_be_factorized_stay_dense_and_say_so(dense: Callable[..., Path]) -> None:
    plan = plan_of(dense("gpt_oss"), keep=0.95)
    experts = [planned for planned in plan.matrices if isinstance(planned.stored, StoredStack)]
    assert [planned.row()["experts"] for planned in experts] == [4] * 4
    for planned in plan.matrices:
        expected = (None, "experts stored transposed") if planned in experts else (planned.rank, "")
        assert (planned.rank, planned.reason) == expected
    assert all(planned.rank for planned in plan.matrices if planned not in experts)


def test_keep_1_keeps_everything(dense: Callable[..., Path]) -> None:
    plan = plan_of(dense("gpt2"), keep=1)
    assert {(planned.rank, planned.reason) for planned in plan.matrices} == {(None, "the dense model fits")}
    assert plan.quantization_config() == {}
    assert plan.totals()["model_keep"] == 1


def test_embeddings_and_head_are_left_alone(dense: Callable[..., Path]) -> None:
    for family, names in {
        "llama": ["lm_head.weight", "model.embed_tokens.weight"],
        "gpt2": ["transformer.wte.weight", "transformer.wpe.weight"],
    }.items():
        source = Checkpoint.open(dense(family))
        plan = plan_of(dense(family), keep=0.3)
        after = {header.name: header.shape for shard in plan.shards for header in shard.headers}
        assert {name: after[name] for name in names} == {name: source.headers[name].shape for name in names}


def test_compressed_already(dense: Callable[..., Path], tmp_path: Path) -> None:
    compress(dense("llama"), tmp_path / "out", CompressSettings(keep=0.5, objective="plain"))
    with pytest.raises(UsageError, match=r"out is compressed already \(.* lowrank\)\nhint: compress the dense model"):
        plan_of(tmp_path / "out", keep=0.5)


def test_an_architecture_without_matrices(tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    tiny_llama(num_hidden_layers=0).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="no matrix found in LlamaForCausalLM"):
        plan_of(tmp_path, keep=0.5)


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.0001, 1.5, float("nan"), float("inf")])
def test_keep_outside_0_to_1(keep: float) -> None:
    with pytest.raises(UsageError, match=rf"keep must be in \(0, 1\], got {keep:g}.*\nhint: --keep 0.6"):
        CompressSettings(keep=keep)


def test_bought_dense(dense: Callable[..., Path]) -> None:
    plan = plan_of(dense("llama"), keep=0.999)
    reasons = {(planned.rank is None, planned.reason) for planned in plan.matrices}
    assert reasons == {(True, "its share buys it whole"), (False, "")}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "no budget: a compression has exactly one budget, keep, params or size\nhint: --keep 0.6 keeps 60 %"),
        ({"keep": 0.5, "size": 10}, "keep and size: a compression has exactly one budget"),
        ({"keep": 0.5, "params": 9, "size": 10}, "keep and params and size: a compression has exactly one budget"),
        ({"params": 0}, "params must be at least 1, got 0\nhint: --params 100M"),
        ({"size": -5}, "size must be at least 1, got -5\nhint: --size 100M"),
        ({"keep": 0.5, "scope": "modle"}, 'unknown scope "modle"\nhint: did you mean "model"?'),
    ],
)
def test_budgets_that_make_no_sense(given: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        CompressSettings(**given)  # type: ignore[arg-type]
    assert str(raised.value).startswith(message)


def test_keep_is_taken_as_it_is_written() -> None:
    assert [CompressSettings(keep=keep).limit(100) for keep in (0.29, 0.57, 0.07, 1)] == [29, 57, 7, 100]
    assert CompressSettings(keep=0.3333333333333333).limit(3 * 10**15) == 999_999_999_999_999
    assert CompressSettings(params=7).limit(100) == CompressSettings(size=7).limit(100) == 7


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"keep": 0.5}, "0.5 of the numbers of the matrices"),
        ({"keep": 0.5, "scope": "model"}, "0.5 of the numbers of the model"),
        ({"params": 1500}, "1,500 numbers of the model"),
        ({"params": 1500, "scope": "matrices"}, "1,500 numbers of the matrices"),
        ({"size": 1500}, "1,500 bytes of the model's files"),
        ({"size": 1500, "scope": "matrices"}, "1,500 bytes of the matrices"),
    ],
)
def test_a_budget_in_words(given: dict[str, object], words: str) -> None:
    assert CompressSettings(**given).budget_words == words  # type: ignore[arg-type]


CHOICES = "anchored, anchored-two-sided, auto, plain, scaled, two-sided, whiten"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"objective": "whitten"}, 'unknown objective "whitten"\nhint: did you mean "whiten"?'),
        ({"objective": "x"}, 'unknown objective "x"\nhint: choose from: ' + CHOICES),
        ({"allocation": "unifrom"}, 'unknown allocation "unifrom"\nhint: did you mean "uniform"?'),
        ({"form": "pivot"}, 'unknown form "pivot"\nhint: did you mean "pivoted"?'),
        ({"align": 0}, "align must be at least 1, got 0\nhint: --align 16"),
        ({"calibration_blocks": 0}, "calibration_blocks must be at least 1, got 0\nhint: --calibration-blocks 128"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0\nhint: --batch-size 8"),
        ({"max_shard_bytes": 0}, "max_shard_bytes must be at least 1, got 0\nhint: --max-shard-bytes 5000000000"),
        ({"block_tokens": 1}, "block_tokens must be at least 2, got 1\nhint: --block-tokens 256"),
    ],
)
def test_settings_that_make_no_sense(given: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        CompressSettings(keep=0.5, **given)  # type: ignore[arg-type]
    assert str(raised.value) == message
