"""One matrix cut to its rank: what is stored is what is planned, and the layer in the model is what is stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.compression.forms import FORMS
from lowrank_kit.compression.piece import TORCH_DTYPES, Piece, cut
from lowrank_kit.compression.plan import PlannedMatrix, make_plan
from lowrank_kit.compression.run import compress
from lowrank_kit.layers import LAYERS
from lowrank_kit.linalg.factor import truncated_svd, weighted_error, whitened_svd
from tests.compression.folds import settings_of
from tests.families import build, token_ids

both_forms = pytest.mark.parametrize("form", FORMS)


def cut_all(folder: Path, form: str, **given: object) -> dict[str, Piece]:
    plan = make_plan(Checkpoint.open(folder), settings_of(objective="plain", form=form, **given))
    tensors = dict(plan.checkpoint.tensors())
    return {
        m.stored.matrix.name: cut(m, truncated_svd(m.stored.weight(tensors[m.stored.tensors[0]])), None, form=form)
        for m in plan.matrices
    }


@both_forms
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_what_is_stored_is_what_was_planned(family: str, dtype: str, form: str, dense: Callable[..., Path]) -> None:
    kinds = TORCH_DTYPES | {"I32": torch.int32}
    for piece in cut_all(dense(family, TORCH_DTYPES[dtype]), form).values():
        planned = {name: (kinds[kind], shape) for name, kind, shape in piece.planned.tensors()}
        assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in piece.named().items()} == planned
        assert all(tensor.is_contiguous() for tensor in piece.tensors.values())
        assert list(piece.tensors)[-1] == "weight"
        assert sum(tensor.numel() for tensor in piece.tensors.values()) == piece.planned.numbers_after
        assert sum(tensor.nbytes for tensor in piece.tensors.values()) == piece.planned.bytes_after


@both_forms
def test_it_is_the_best_of_its_rank_and_says_what_it_keeps(form: str, dense: Callable[..., Path]) -> None:
    model = build("gpt2")
    for name, piece in cut_all(dense("gpt2"), form).items():
        W = model.get_submodule(name).weight.detach().mT.double()
        values = torch.linalg.svdvals(W)
        lost = values[piece.planned.rank :].square().sum()
        torch.testing.assert_close((W - piece.dense()).square().sum(), lost, rtol=1e-5, atol=0)
        assert piece.kept_energy == pytest.approx(1 - (lost / values.square().sum()).item(), rel=1e-9)


@both_forms
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_in_the_model_and_back(family: str, form: str, dense: Callable[..., Path]) -> None:
    model, expected = build(family), build(family)
    pieces = cut_all(dense(family), form)
    for name, piece in pieces.items():
        old = expected.get_submodule(name)
        old.weight.data = (piece.dense().mT if isinstance(old, Conv1D) else piece.dense()).float().contiguous()
        frozen = model.get_submodule(name).bias
        if frozen is not None:
            frozen.requires_grad_(False)
        piece.install(model)
        layer = model.get_submodule(name)
        assert type(layer) is LAYERS[form]
        bias = layer.state_dict().get("B.bias" if form == "factors" else "bias")
        assert (bias is None) == (old.bias is None)
        assert bias is None or torch.equal(bias, old.bias)
        # Frozen or not, as it was.
        biases = [p for leaf, p in layer.named_parameters() if leaf.endswith("bias")]
        assert not any(p.requires_grad for p in biases)
        back = piece.read_back(model)
        assert back.planned == piece.planned
        assert back.tensors.keys() == piece.tensors.keys()
        assert all(torch.equal(back.tensors[leaf], tensor) for leaf, tensor in piece.tensors.items())
    with torch.no_grad():
        found, wanted = (one(input_ids=token_ids()).logits for one in (model, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=3e-5)


@both_forms
def test_what_was_trained_is_read_back_in_the_dtype_on_disk(form: str, dense: Callable[..., Path]) -> None:
    # Loaded in float32 from 16 bits, as refinement does.
    model = AutoModelForCausalLM.from_pretrained(dense("llama", torch.bfloat16), dtype=torch.float32)
    name, piece = next(iter(cut_all(dense("llama", torch.bfloat16), form).items()))
    piece.install(model)
    layer = model.get_submodule(name)
    assert layer.A.weight.dtype == torch.float32
    assert torch.equal(layer.A.weight, piece.tensors["A.weight"].float())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.03)
    back = piece.read_back(model)
    assert {leaf: t.dtype for leaf, t in back.tensors.items()} == {leaf: t.dtype for leaf, t in piece.tensors.items()}
    assert torch.equal(back.tensors["A.weight"], layer.A.weight.bfloat16())
    assert not torch.equal(back.tensors["A.weight"], piece.tensors["A.weight"])
    # What it was is left alone.
    assert torch.equal(piece.tensors["A.weight"].float() * 1.03, layer.A.weight)


# Form "auto"


def planned_as(dtype: str, shape: tuple[int, int], rank: int, folder: Path) -> PlannedMatrix:
    """A pivoted matrix of any shape."""
    one = make_plan(Checkpoint.open(folder), settings_of(objective="plain", form="pivoted")).matrices[0]
    stored = replace(one.stored, matrix=replace(one.stored.matrix, shape=shape))
    return replace(one, stored=stored, dtype=dtype, rank=rank)


def decaying(num_out: int, num_in: int, power: float) -> Tensor:
    side = min(num_out, num_in)
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, side, generator=generator).double()).Q for n in (num_out, num_in))
    return U * torch.arange(1, side + 1).double() ** -power @ V.mT


# A spectrum that falls off leaves nothing for more rank to gain, and in 16 bits the coefficients round worse.
@pytest.mark.parametrize(
    ("dtype", "power", "form"), [("BF16", 3.0, "factors"), ("F32", 3.0, "pivoted"), ("BF16", 0.3, "pivoted")]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_auto_is_what_stores_less_error(
    dtype: str, power: float, form: str, weighted: bool, dense: Callable[..., Path]
) -> None:
    W = decaying(64, 48, power)
    X = torch.randn(48, 200, dtype=torch.float64) * torch.linspace(1, 2, 48, dtype=torch.float64)[:, None]
    gram = X @ X.mT if weighted else None
    factors = whitened_svd(W, gram) if gram is not None else truncated_svd(W)
    planned = planned_as(dtype, (64, 48), 24, dense("llama"))
    auto, pivoted = (cut(planned, factors, gram, form=one) for one in ("auto", "pivoted"))
    assert auto.planned.form == form
    assert pivoted.planned == planned
    found, other = (weighted_error(W, piece.dense(), gram) for piece in (auto, pivoted))
    assert (found < other) == (form == "factors")
    if form == "pivoted":
        assert auto.planned == planned


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("align", [None, 1, 4, 16])
def test_auto_never_takes_more_than_was_planned(align: int | None, dtype: str, dense: Callable[..., Path]) -> None:
    compared = 0
    for shape in [(64, 48), (48, 64), (40, 40), (300, 20), (20, 300)]:
        factors = truncated_svd(decaying(*shape, 4.0))
        for rank in range(1, min(shape), 3):
            if rank >= shape[0]:
                continue
            planned = planned_as(dtype, shape, rank, dense("llama"))
            made = cut(planned, factors, None, form="auto", align=align).planned
            assert made.numbers_after <= planned.numbers_after
            assert made.bytes_after <= planned.bytes_after
            if made.form == "factors":
                compared += 1
                assert made.rank is not None
                bigger = replace(made, rank=made.rank + (align or 1))
                assert bigger.numbers_after > planned.numbers_after or bigger.bytes_after > planned.bytes_after
                # A multiple, or a power of two below the first.
                assert made.rank % (align or 1) == 0 or made.rank in (1, 2, 4, 8)
    assert compared or dtype == "F32"


def test_factors_of_no_rank_are_not_taken(dense: Callable[..., Path]) -> None:
    # Of 3 rows the pivoted form of rank 1 takes 1 x 200 + 2 + 3 + 1 numbers in all, two factors 1 x 203 + 1.
    planned = planned_as("BF16", (3, 200), 1, dense("llama"))
    W = torch.randn(3, 200, dtype=torch.float64)
    assert cut(planned, truncated_svd(W), None, form="auto").planned.rank == 1


def test_the_files_are_those_of_the_forms_chosen(tmp_path: Path) -> None:
    """Decays of both kinds in 16 bits: some matrices pivoted, some factors, and all totals agree."""
    model = build("opt")
    steep = [stored for stored in model.state_dict() if "fc" in stored and stored.endswith("weight")]
    for name in steep:
        W = model.get_parameter(name)
        W.data = decaying(W.shape[0], W.shape[1], 4.0).float()
    model.bfloat16().save_pretrained(tmp_path / "dense")
    settings = settings_of(keep=0.7, objective="plain", form="auto", max_shard_bytes=20_000)
    planned = make_plan(Checkpoint.open(tmp_path / "dense"), settings)
    report = compress(tmp_path / "dense", tmp_path / "out", settings)
    files = list((tmp_path / "out").glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    forms = {row["matrix"]: row["form"] for row in report["matrices"]}
    assert set(forms.values()) == {"factors", "pivoted"}
    assert {m.form for m in planned.matrices} == {"pivoted"}
    config = Checkpoint.open(tmp_path / "out").config["quantization_config"]
    assert {name: entry["form"] for name, entry in config["matrices"].items()} == forms
    totals = report["totals"]
    assert totals["bytes_after"] == sum(file.stat().st_size for file in files) <= planned.totals()["bytes_after"]
    assert totals["model_numbers_after"] == sum(tensor.numel() for tensor in tensors.values())
    assert totals["model_numbers_after"] <= planned.totals()["model_numbers_after"]
    for name, form in forms.items():
        assert (f"{name}.B.bias" in tensors, f"{name}.bias" in tensors) == (form == "factors", form == "pivoted")
    found, missing = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(missing.values())
    assert found(input_ids=token_ids()).logits.isfinite().all()
