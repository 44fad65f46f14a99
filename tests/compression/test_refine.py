"""Refinement: never worse than before, nothing else is touched, and what is on disk is what was refined."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowrank_kit.compression.calibration import Calibration
from lowrank_kit.compression.chain import Chain
from lowrank_kit.compression.refine import PATIENCE, Refined, refine_block, refine_end_to_end, trainable
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.streams import Stream, new_stream
from lowrank_kit.errors import LowRankError
from lowrank_kit.matrices import find_matrices
from tests.compression.folds import calibration_of, folded, settings_of
from tests.families import build, token_ids

FORMS = ["factors", "pivoted"]
both_forms = pytest.mark.parametrize("form", FORMS)
both_stages = pytest.mark.parametrize("stage", ["block", "e2e"])
BLOCK = "model.layers.1"
# Of 20 sequences in batches of 4, five in an epoch.
EPOCHS, BATCH, SEQUENCES, LENGTH = 6, 4, 20, 16


def decayed(family: str) -> PreTrainedModel:
    """A model whose matrices have spectra that fall off, as trained ones have."""
    model = build(family)
    for matrix in find_matrices(model):
        W = model.get_parameter(matrix.parameter)
        U, s, V = torch.linalg.svd(W.detach(), full_matrices=False)
        W.data = 2 * (U * s / torch.arange(1, len(s) + 1) ** 0.7) @ V
    return model


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`dense(family, dtype)`: a folder, made once."""
    root = tmp_path_factory.mktemp("dense")

    def folder(family: str, dtype: torch.dtype = torch.float32) -> Path:
        path = root / f"{family}-{dtype}"
        if not path.exists():
            decayed(family).to(dtype).save_pretrained(path)
        return path

    return folder


@pytest.fixture
def make(dense: Callable[..., Path]) -> Callable[..., PreTrainedModel]:
    """`make(form)`: the tiny Llama cut to half."""

    def compressed(form: str = "factors") -> PreTrainedModel:
        model = decayed("llama")
        for piece in folded(dense("llama"), torch.float32, objective="whiten", form=form)[2].pieces.values():
            piece.install(model)
        return model

    return compressed


def refine(model: PreTrainedModel, stage: str, *, rate: float = 0.003, seed: int = 0, **given: Any) -> Refined:
    """One block on random hidden states, or all of the model on random tokens."""
    text, check, dense = token_ids(SEQUENCES, LENGTH, 7), token_ids(8, LENGTH, 8), decayed("llama")
    given = {"epochs": EPOCHS, "rate": rate, "seed": seed} | given
    if stage == "e2e":
        return refine_end_to_end(model, dense, text, check, batch_size=BATCH, **given)
    chain = Chain(model, [f"model.layers.{index}" for index in range(2)], text, batch_size=BATCH)

    def through(ids: Tensor, *blocks: nn.Module) -> Stream:
        stream = new_stream(None, "", chain.enter(ids), len(ids))
        for index, block in enumerate(blocks):
            stream = chain.run_all(index, block, stream)
        return stream

    with torch.no_grad():
        inputs = [through(ids, model.model.layers[0]) for ids in (text, check)]
        targets = [through(ids, *dense.model.layers[:2]) for ids in (text, check)]
    pairs = list(zip(inputs, targets, strict=True))
    return refine_block(chain, 1, model.get_submodule(BLOCK), *pairs, batch_size=BATCH, **given)


def changed_by(stage: str, model: nn.Module) -> set[str]:
    part = "" if stage == "e2e" else f"{BLOCK}."
    return {part + name for name in trainable(model.get_submodule(part.rstrip(".")))}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def divergence(dense: PreTrainedModel, model: PreTrainedModel, ids: Tensor) -> float:
    """KL(p_dense || p), nats per token, in float64."""
    with torch.no_grad():
        log_p, log_q = (one(input_ids=ids.long()).logits.double().log_softmax(-1) for one in (dense, model))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


@both_forms
@both_stages
def test_it_gains_and_says_how_much(stage: str, form: str, make: Callable[..., PreTrainedModel]) -> None:
    model = make(form)
    check = token_ids(8, LENGTH, 8)
    before = divergence(decayed("llama"), model, check)
    found = refine(model, stage)
    assert found.after < (0.99 if stage == "block" else 0.97) * found.before
    if stage == "e2e":
        assert found.before == pytest.approx(before, rel=1e-4)
        assert found.after == pytest.approx(divergence(decayed("llama"), model, check), rel=1e-4)
    assert found.steps <= EPOCHS * SEQUENCES // BATCH
    assert found.tokens == found.steps * BATCH * LENGTH


@both_forms
@both_stages
def test_only_factors_norms_and_biases_change(stage: str, form: str, make: Callable[..., PreTrainedModel]) -> None:
    model = make(form).train()
    model.model.norm.requires_grad_(False)
    model.model.layers[1].mlp.eval()
    flags = [(module.training, [p.requires_grad for p in module.parameters()]) for module in model.modules()]
    before = state(model)
    refine(model, stage)
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == changed_by(stage, model)
    leaves = {"A.weight", "B.weight"} if form == "factors" else {"A.weight", "C.weight"}
    wanted = {leaf for name in moved if "proj" in name for leaf in [name.split("proj.")[1]]}
    assert wanted == leaves
    assert {name for name in moved if "proj" not in name} == {
        name for name in before if name.endswith("norm.weight") and (stage == "e2e" or name.startswith(BLOCK))
    }
    assert flags == [(module.training, [p.requires_grad for p in module.parameters()]) for module in model.modules()]
    assert all(p.grad is None for p in model.parameters())


@both_forms
@both_stages
def test_never_worse_than_before(stage: str, form: str, make: Callable[..., PreTrainedModel]) -> None:
    model = make(form)
    before = state(model)
    found = refine(model, stage, rate=3.0)
    assert found.after == found.before
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # Ten looks in thirty steps, and three without a gain are enough.
    assert found.steps == PATIENCE * 3


@both_stages
def test_the_best_state_stays_though_a_later_one_is_worse(stage: str, make: Callable[..., PreTrainedModel]) -> None:
    model = make()
    # More epochs of one text than are good: the check text gets worse in the end.
    found = refine(model, stage, rate=0.01, epochs=20)
    again = refine(model, stage, rate=1e-9, epochs=1)
    assert again.before == pytest.approx(found.after, rel=1e-6)
    assert found.after < found.before


@both_stages
def test_the_seed_decides(stage: str, make: Callable[..., PreTrainedModel]) -> None:
    models = [make() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        # Nothing else is random.
        torch.manual_seed(len(str(model)) + seed + id(model) % 1000)
        refine(model, stage, seed=seed)
    one, again, other = (model.state_dict() for model in models)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@both_stages
@pytest.mark.parametrize("broken", ["rate", "weights"])
def test_a_loss_that_is_not_finite(stage: str, broken: str, make: Callable[..., PreTrainedModel]) -> None:
    model = make()
    if broken == "weights":
        model.model.layers[1].mlp.down_proj.B.weight.data[0, 0] = math.nan
    what = "refine block 1" if stage == "block" else "refine end to end"
    where = r"text, at step \d+" if broken == "rate" else "check text, before any step"
    with pytest.raises(
        LowRankError, match=rf"{what}: the loss is (nan|inf) on the {where}\nhint: a lower --block-rate"
    ):
        refine(model, stage, rate=1e20 if broken == "rate" else 0.003)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@both_forms
@both_stages
def test_states_are_judged_as_they_are_stored(stage: str, form: str, make: Callable[..., PreTrainedModel]) -> None:
    model = make(form)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    before = state(model)
    found = refine(model, stage, stored=torch.bfloat16)
    assert found.after < found.before
    for name in changed_by(stage, model):
        tensor = model.get_parameter(name)
        assert torch.equal(tensor, tensor.bfloat16().float())
        assert not torch.equal(tensor, before[name])
    if stage == "e2e":
        found_again = divergence(decayed("llama"), model.bfloat16().float(), token_ids(8, LENGTH, 8))
        assert found.after == pytest.approx(found_again, rel=1e-4)


@both_stages
def test_steps_too_small_for_the_dtype_on_disk_change_nothing(stage: str, make: Callable[..., PreTrainedModel]) -> None:
    model = make()
    before = state(model)
    found = refine(model, stage, rate=1e-5, epochs=1, stored=torch.float16)
    # In float32 it would have gained, but stored it is the rounding of what was there, or a state that is better.
    assert found.after <= found.before
    assert found.after < found.before or all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


# On disk


def refined_folder(source: Path, output: Path, **given: Any) -> tuple[dict[str, Any], Calibration]:
    short = {"block_epochs": 3, "block_rate": 0.003, "e2e_epochs": 3, "e2e_rate": 0.003}
    settings = settings_of(**({"objective": "whiten", "refine": "both"} | short | given))
    calibration = calibration_of(source, settings)
    return compress(source, output, settings, calibration=calibration), calibration


def on_disk(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def load(folder: Path) -> PreTrainedModel:
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(found.values())
    return model


@both_forms
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt_projected", "gemma", "gpt_neox"])
def test_the_folder_is_the_refined_model(family: str, form: str, dense: Callable[..., Path], tmp_path: Path) -> None:
    report, calibration = refined_folder(dense(family), tmp_path / "out", form=form)
    last = report["refined"]["end to end"]
    before, after = load(dense(family)), load(tmp_path / "out")
    # Of the model on disk; without one norm or bias that was trained it is another.
    assert divergence(before, after, calibration.texts.check.ids) == pytest.approx(last["after"], rel=1e-4)
    old, new = on_disk(dense(family)), on_disk(tmp_path / "out")
    moved = {name for name in old if name in new and old[name].shape == new[name].shape != (1,)}
    moved = {name for name in moved if not torch.equal(old[name], new[name])}
    assert {old[name].ndim for name in moved} == {1}
    assert len(moved) >= 4
    tied = before.get_output_embeddings().weight is before.get_input_embeddings().weight
    assert tied == (after.get_output_embeddings().weight is after.get_input_embeddings().weight)
    assert tied == (family != "gpt_neox" and "lm_head.weight" not in new)


@both_forms
def test_names_on_disk_without_the_base_prefix(form: str, dense: Callable[..., Path], tmp_path: Path) -> None:
    """The hub's gpt2 has names such as h.0.ln_1.weight."""
    (tmp_path / "bare").mkdir()
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in on_disk(dense("gpt2")).items()}
    save_file(tensors, tmp_path / "bare" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "bare" / "config.json").write_text((dense("gpt2") / "config.json").read_text())
    refined_folder(tmp_path / "bare", tmp_path / "out", form=form)
    refined_folder(dense("gpt2"), tmp_path / "other", form=form)
    found, other = on_disk(tmp_path / "out"), on_disk(tmp_path / "other")
    assert not any(name.startswith("transformer.") for name in found)
    bias = "h.0.attn.c_attn.B.bias" if form == "factors" else "h.0.attn.c_attn.bias"
    assert not torch.equal(found[bias], tensors["h.0.attn.c_attn.bias"])
    assert {name: tensor.shape for name, tensor in other.items()} == {
        name if name == "lm_head.weight" else f"transformer.{name}": tensor.shape for name, tensor in found.items()
    }
    assert all(torch.equal(other[f"transformer.{name}"], tensor) for name, tensor in found.items())


@both_forms
def test_bfloat16_stays_on_disk(form: str, dense: Callable[..., Path], tmp_path: Path) -> None:
    report, calibration = refined_folder(dense("llama", torch.bfloat16), tmp_path / "out", form=form)
    kinds = {name.rpartition(".")[2] == "index": tensor.dtype for name, tensor in on_disk(tmp_path / "out").items()}
    assert kinds == {False: torch.bfloat16} | ({True: torch.int32} if form == "pivoted" else {})
    last = report["refined"]["end to end"]
    assert last["after"] < last["before"]
    # Not what the factors were before they were rounded.
    found = divergence(load(dense("llama", torch.bfloat16)), load(tmp_path / "out"), calibration.texts.check.ids)
    assert found == pytest.approx(last["after"], rel=1e-4)


def test_of_two_stages_the_second_begins_where_the_first_ends(dense: Callable[..., Path], tmp_path: Path) -> None:
    report, calibration = refined_folder(dense("llama"), tmp_path / "both")
    refined_folder(dense("llama"), tmp_path / "block", refine="block")
    found = divergence(load(dense("llama")), load(tmp_path / "block"), calibration.texts.check.ids)
    assert report["refined"]["end to end"]["before"] == pytest.approx(found, rel=1e-4)


def test_a_failure_in_the_middle_leaves_what_was_finished(dense: Callable[..., Path], tmp_path: Path) -> None:
    for stage, left in (("block", []), ("e2e", ["e2e.partial"])):
        with pytest.raises(LowRankError, match="the loss is"):
            refined_folder(dense("llama"), tmp_path / stage, **{"refine": stage, f"{stage}_rate": 1e20})
        assert [path.name for path in tmp_path.iterdir()] == left
