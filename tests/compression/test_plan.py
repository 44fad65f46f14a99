"""The plan: ranks within the budget, every byte known before any work, and a reason where a matrix stays dense."""

from __future__ import annotations

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
from lowrank_kit.compression.allocation import factor_numbers, saves, uniform
from lowrank_kit.compression.forms import FORMS
from lowrank_kit.compression.plan import Plan, make_plan
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.errors import UsageError
from lowrank_kit.matrices import Matrix
from tests.families import build, token_ids

SIDES = st.integers(2, 300)
# As people write them, and as computers make them.
KEEPS = st.one_of(st.integers(1, 100).map(lambda percent: percent / 100), st.floats(1e-3, 1.0))


def matrix(m: int, n: int) -> Matrix:
    return Matrix("x", "x.weight", "q", 0, (m, n), False, None, "x", False)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(SIDES, SIDES, KEEPS)
def test_rank_is_the_largest_within_the_budget(m: int, n: int, keep: float) -> None:
    budget = Fraction(str(keep)) * m * n  # exactly the number that is written
    within = [rank for rank in range(1, min(m, n) + 1) if rank * (m + n) <= budget]
    assert uniform([matrix(m, n)], keep) == [max(within, default=1)]


def test_a_budget_that_is_met_exactly() -> None:
    # In floating point 0.09 * 40 * 50 / 90 is below 2.
    assert uniform([matrix(40, 50)], 0.09) == [2]


@settings(deadline=None, derandomize=True)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 12))
def test_saves_counts_what_is_stored(m: int, n: int, rank: int) -> None:
    numbers = sum(t.numel() for t in (torch.empty(rank, n), torch.empty(m, rank), torch.empty(1)))
    assert factor_numbers((m, n), rank) == numbers
    assert saves((m, n), rank) == (numbers < m * n)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], Path]:
    """`dense(family, dtype)`: a folder, made once."""
    root = tmp_path_factory.mktemp("dense")

    def folder(family: str, dtype: torch.dtype = torch.float32) -> Path:
        path = root / f"{family}-{str(dtype).removeprefix('torch.')}"
        if not path.exists():
            build(family).to(dtype).save_pretrained(path)
        return path

    return folder


def plan_of(folder: Path, **given: object) -> Plan:
    return make_plan(Checkpoint.open(folder), CompressSettings(**({"objective": "plain"} | given)))  # type: ignore[arg-type]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    family=st.sampled_from(["llama", "gpt2", "gemma", "mixtral", "opt"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    keep=st.floats(0.01, 1.0),
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


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("keep", [0.01, 0.3, 0.99])
def test_no_matrix_exceeds_the_budget(dense: Callable[..., Path], family: str, keep: float) -> None:
    plan = plan_of(dense(family), keep=keep)
    for planned in plan.matrices:
        if planned.rank is not None:
            m, n = planned.stored.matrix.shape
            assert planned.rank == 1 or planned.rank * (m + n) <= keep * m * n
            assert planned.numbers_after < planned.numbers_before


def test_totals_add_up(dense: Callable[..., Path]) -> None:
    plan = plan_of(dense("llama"), keep=0.5)
    totals = plan.totals()
    model = build("llama")
    assert totals["model_numbers_before"] == sum(parameter.numel() for parameter in model.parameters())
    outside = model.get_input_embeddings().weight.numel() + model.lm_head.weight.numel()
    norms = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    assert totals["matrix_numbers_before"] == totals["model_numbers_before"] - outside - norms
    assert totals["matrix_keep"] == totals["matrix_numbers_after"] / totals["matrix_numbers_before"]
    assert 0.4 < totals["matrix_keep"] <= 0.5 + 14 / totals["matrix_numbers_before"]  # a sentinel each
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
        assert notes[role] == ("dense", None, 1.0, "rank 1 would not save anything")
    for role in ("gate", "up", "down"):
        assert notes[role] == ("factors", 1, 43 / 80, "")
    assert set(plan.quantization_config()) == {
        f"model.layers.{block}.mlp.{role}_proj" for block in (0, 1) for role in ("gate", "up", "down")
    }
    compress(tmp_path / "dense", tmp_path / "out", plan.settings)
    loaded, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values())
    assert loaded(input_ids=token_ids()).logits.isfinite().all()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_fused_experts_stay_dense_and_say_so(dense: Callable[..., Path], family: str) -> None:
    plan = plan_of(dense(family), keep=0.5)
    experts = [planned for planned in plan.matrices if planned.stored.matrix.expert is not None]
    assert experts
    for planned in plan.matrices:
        expected = (None, "a fused expert") if planned in experts else (planned.rank, "")
        assert (planned.rank, planned.reason) == expected
    assert all(planned.rank for planned in plan.matrices if planned not in experts)


def test_keep_1_keeps_everything(dense: Callable[..., Path]) -> None:
    plan = plan_of(dense("gpt2"), keep=1)
    assert {(planned.rank, planned.reason) for planned in plan.matrices} == {(None, "keep is 1")}
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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"objective": "whitten"}, 'unknown objective "whitten"\nhint: did you mean "whiten"?'),
        ({"objective": "x"}, 'unknown objective "x"\nhint: choose from: plain, whiten'),
        ({"allocation": "unifrom"}, 'unknown allocation "unifrom"\nhint: did you mean "uniform"?'),
        ({"form": "pivot"}, 'unknown form "pivot"\nhint: did you mean "pivoted"?'),
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
