"""Fused experts: what each one reads is seen, and they are compressed together and loaded by anybody who imports us."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.quantizer import LowRankConfig
from lowrank_kit.checkpoint.stacks import StoredStack
from lowrank_kit.compression.objectives import OBJECTIVES
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.statistics import adder, input_grams, input_grams_and_loss, output_grams, reading
from lowrank_kit.data.blocks import TokenBlocks
from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.layers import LowRankStack, exchange_experts
from lowrank_kit.linalg.gram import mirror_
from lowrank_kit.matrices import Matrix, find_matrices
from tests.compression.folds import calibration_of, settings_of
from tests.families import BLOCKS, build, token_ids

PATH = "model.layers.1.mlp.experts"
EXPERTS = ["mixtral", "qwen3_moe"]
both = pytest.mark.parametrize("family", EXPERTS)
# Enough that every expert has more tokens than it has inputs, but for `DEAD`.
TEXT = TokenBlocks(token_ids(30, 16).int(), 1.0)
DEAD = 3


def experts_of(model: PreTrainedModel) -> list[Matrix]:
    return [matrix for matrix in find_matrices(model) if matrix.parameter.startswith(PATH)]


def kill(model: PreTrainedModel) -> None:
    """No token comes to one expert of the last block: each goes to the next one that it does not go to yet."""

    def instead(module: Any, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, scores, index = output
        return logits, scores, torch.where(index == DEAD, (index.flip(1) + 1) % DEAD, index)

    model.get_submodule(PATH.removesuffix("experts") + "gate").register_forward_hook(instead)


def read_by_hand(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Name of an expert's matrix -> what it reads, [tokens, in] float64."""
    seen: list[tuple[Tensor, ...]] = []
    experts: Any = model.get_submodule(PATH)
    handle = experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        handle.remove()
        ((x, index, _),) = seen
        read = {}
        for expert in range(4):
            mine = x[(index == expert).any(1)]
            read[f"{PATH}.gate_up_proj[{expert}]"] = mine.double()
            gate, up = (mine @ experts.gate_up_proj[expert].mT).chunk(2, dim=1)
            read[f"{PATH}.down_proj[{expert}]"] = (torch.nn.functional.silu(gate) * up).double()
    return read


@both
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_grams_of_what_each_expert_reads(family: str, implementation: str) -> None:
    model = build(family)
    model.set_experts_implementation(implementation)
    read = read_by_hand(model, TEXT.ids.long())
    grams = input_grams(model, find_matrices(model), TEXT, batch_size=7)
    assert min(len(X) for X in read.values()) > 48
    for matrix in experts_of(model):
        X = read[matrix.name]
        torch.testing.assert_close(grams[matrix.shares_input], X.mT @ X, rtol=1e-4, atol=1e-3)
    assert "forward" not in model.get_submodule(PATH).__dict__


def test_a_block_alone_is_read_by_names_inside_it() -> None:
    model = build("mixtral")
    block: Any = model.get_submodule("model.layers.1")
    read = read_by_hand(model, TEXT.ids.long())
    grams: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    names = ("mlp.experts.down_proj[2]", "mlp.experts.gate_up_proj[1]", "self_attn.o_proj")
    hooks = {name: adder(grams, name, name, counts) for name in names}
    with torch.no_grad(), reading(block, hooks), reading(block, {names[0]: adder(grams, "again", "")}):
        model(input_ids=TEXT.ids.long(), use_cache=False)
    assert counts == {name: len(read.get(f"model.layers.1.{name}", TEXT.ids.flatten())) for name in names}
    for name in names[:2]:
        X = read[f"model.layers.1.{name}"]
        torch.testing.assert_close(mirror_(grams[name]), X.mT @ X, rtol=1e-4, atol=1e-3)
    assert torch.equal(grams["again"], grams[names[0]])
    assert "forward" not in block.mlp.experts.__dict__


@both
def test_an_expert_without_tokens_has_those_of_all(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = build(family)
    kill(model)
    read = read_by_hand(model, TEXT.ids.long())
    grams = input_grams(model, experts_of(model), TEXT)
    assert len(caplog.messages) == 2
    inputs = read[f"{PATH}.down_proj[0]"].shape[1]
    assert f"{PATH}.down_proj: 1 of 4 experts have fewer tokens than their {inputs} inputs, the fewest 0" in caplog.text
    for matrix in experts_of(model):
        X = read[matrix.name]
        expected = X.mT @ X
        if matrix.expert == DEAD:
            everyone = torch.cat([read[f"{matrix.parameter}[{expert}]"] for expert in range(4)])
            expected = matrix.shape[1] / len(everyone) * everyone.mT @ everyone
        torch.testing.assert_close(grams[matrix.shares_input], expected, rtol=1e-4, atol=1e-3)
    # On the check text errors count where tokens are.
    really, _ = input_grams_and_loss(model, experts_of(model), TEXT)
    assert all((really[m.shares_input] == 0).all() == (m.expert == DEAD) for m in experts_of(model))


def test_an_expert_with_few_tokens_is_given_what_it_lacks() -> None:
    model = build("mixtral")
    few = TokenBlocks(token_ids(1, 16).int(), 1.0)
    read = read_by_hand(model, few.ids.long())
    grams = input_grams(model, experts_of(model), few)
    everyone = torch.cat([read[f"{PATH}.gate_up_proj[{expert}]"] for expert in range(4)])
    assert len(everyone) == 32
    for expert in range(4):
        X = read[f"{PATH}.gate_up_proj[{expert}]"]
        expected = X.mT @ X + (32 - len(X)) / 32 * everyone.mT @ everyone
        torch.testing.assert_close(grams[f"{PATH}[{expert}]:mlp"], expected, rtol=1e-4, atol=1e-3)


def test_text_that_reaches_no_expert_is_refused() -> None:
    model = build("mixtral")
    model.get_submodule(PATH.removesuffix("experts") + "gate").register_forward_hook(
        lambda module, args, output: (*output[:2], torch.full_like(output[2], 4))
    )
    with pytest.raises(LowRankError, match=rf"reached 0 of 8 inputs, not {PATH}.gate_up_proj\[0\]".replace(".", r"\.")):
        input_grams(model, experts_of(model), TEXT)


@both
def test_grams_of_the_gradients_of_each_expert(family: str) -> None:
    """An expert's output counts by its weight; scaled so that tr(G dW H dW^T) / 2 T^2 is its share of the loss."""
    model = build(family)
    outputs: list[Tensor] = []
    called: list[tuple[Tensor, ...]] = []

    def see(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        called.append(args)
        output.register_hook(lambda gradient: outputs.append(gradient))

    model.get_submodule(PATH).register_forward_hook(see)
    grams = output_grams(model, experts_of(model), TEXT, batch_size=len(TEXT.ids))
    ((_, index, weights),), (gradient,) = called, outputs
    T = TEXT.num_tokens
    for expert in range(4):
        token, slot = torch.where(index == expert)
        g = (gradient[token] * weights[token, slot, None]).double()
        assert len(g) > 48
        torch.testing.assert_close(
            grams[f"{PATH}.down_proj[{expert}]"], T / len(g) * g.mT @ g, rtol=1e-3, atol=1e-3 * T / len(g)
        )
    assert all(parameter.requires_grad for parameter in model.parameters())


@both
def test_the_factors_are_those_of_each_expert(family: str, dense: Callable[..., Path], tmp_path: Path) -> None:
    """By whitening: B A = W S (S^-1) cut by the singular values of W S, S S^T = H."""
    settings = settings_of(keep=0.5, objective="whiten")
    calibration = calibration_of(dense(family), settings, blocks=40)
    report = compress(dense(family), tmp_path / "out", settings, calibration=calibration)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, LowRankStack)}
    assert len(stacks) == 2 * BLOCKS
    whole = AutoModelForCausalLM.from_pretrained(dense(family))
    ranks = {row["matrix"]: row["rank"] for row in report["matrices"]}
    for name, stack in stacks.items():
        gram = calibration.statistics[f"{name}_proj"].gram
        assert gram is not None
        assert stack.rank == ranks[f"{name}_proj"]
        for expert, W in enumerate(whole.get_parameter(f"{name}_proj").detach().double()):
            L = torch.linalg.cholesky(gram[expert])
            U, s, V = torch.linalg.svd(W @ L, full_matrices=False)
            best = (U[:, : stack.rank] * s[: stack.rank]) @ torch.linalg.solve(L.mT, V[: stack.rank].mT).mT
            torch.testing.assert_close(stack.dense_weight()[expert].detach().double(), best, rtol=0, atol=1e-4)


@both
@pytest.mark.parametrize("keep", [0.6, 1.0])
def test_compressed_saved_again_and_generated_from(
    family: str, keep: float, dense: Callable[..., Path], tmp_path: Path
) -> None:
    report = compress(dense(family), tmp_path / "out", settings_of(keep=keep, objective="plain"))
    assert report["totals"]["matrix_keep"] <= keep
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values())
    model.save_pretrained(tmp_path / "again")
    again, found = AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(found.values())
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sum(tensor.nbytes for tensor in first.values()) < report["totals"]["bytes_after"]
    with torch.inference_mode():
        logits = model(input_ids=token_ids()).logits
        assert torch.equal(again(input_ids=token_ids()).logits, logits)
        before = AutoModelForCausalLM.from_pretrained(dense(family))(input_ids=token_ids()).logits
    assert logits.isfinite().all()
    assert torch.equal(logits, before) == (keep == 1)
    # Split over devices they would be half of each expert's factors.
    assert bool([name for name in model.tp_plan if "experts" in name]) == (keep == 1)
    assert model.generate(token_ids(1, 5), max_new_tokens=4, min_new_tokens=4).shape == (1, 9)


@both
def test_the_compressed_folder_has_the_matrices_of_the_dense_one(
    family: str, dense: Callable[..., Path], tmp_path: Path
) -> None:
    compress(dense(family), tmp_path / "out", settings_of(objective="plain", keep=0.4))
    before, after = Checkpoint.open(dense(family)), Checkpoint.open(tmp_path / "out")
    assert [(s.matrix.name, s.matrix.role, s.matrix.shape) for s in after.matrices()] == [
        (s.matrix.name, s.matrix.role, s.matrix.shape) for s in before.matrices()
    ]
    tensors = dict(after.tensors())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    whole = AutoModelForCausalLM.from_pretrained(dense(family))
    for stored in (s for s in after.matrices() if s.matrix.expert is not None):
        assert stored.compressed
        W = stored.weight(*(tensors[name] for name in stored.tensors))
        assert W.shape == stored.matrix.shape
        fused = model.get_submodule(stored.matrix.parameter.removesuffix("_proj")).dense_weight()[stored.matrix.expert]
        rows = {"gate": slice(len(W)), "up": slice(len(W), None)}.get(stored.matrix.role, slice(None))
        torch.testing.assert_close(W.float(), fused[rows].detach(), rtol=0, atol=1e-5)
        original = whole.get_parameter(stored.matrix.parameter)[stored.matrix.expert][rows]
        assert (W - original).norm() < original.norm()
    with pytest.raises(UsageError, match="compressed already"):
        compress(tmp_path / "out", tmp_path / "twice", settings_of(objective="plain"))


def test_without_the_import_loading_fails_loudly(tmp_path: Path) -> None:
    """Where experts alone are factorized, and only some of them."""
    model = build("mixtral")
    exchange_experts(model, f"{PATH}.down_proj", 3)
    model.config.quantization_config = LowRankConfig({f"{PATH}.down_proj": {"rank": 3, "form": "stacked"}})
    model.save_pretrained(tmp_path)
    _, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["format_version"] == 3
    code = f"from transformers import AutoModelForCausalLM as m; m.from_pretrained({str(tmp_path)!r}); print('loaded')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode != 0
    assert done.stdout == ""
    assert "mismatch" in done.stderr.lower()


def test_experts_in_several_number_formats_stay_dense(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    save_file(tensors | {name: tensors[name].half()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    reasons = {unit.matrix.name: unit.reason for unit in Checkpoint.open(tmp_path).units() if unit.reason}
    assert reasons == {f"{PATH}.gate_up_proj": "experts stored in several number formats"}


def test_experts_fused_on_disk_too(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path / "dense", save_original_format=False)
    source = Checkpoint.open(tmp_path / "dense")
    stacks = [unit for unit in source.units() if isinstance(unit, StoredStack)]
    assert {len(stack.tensors) for stack in stacks} == {1}
    report = compress(tmp_path / "dense", tmp_path / "out", settings_of(objective="plain", keep=0.5))
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert written == report["totals"]["bytes_after"]
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values())
    build("mixtral").save_pretrained(tmp_path / "apart")
    compress(tmp_path / "apart", tmp_path / "other", settings_of(objective="plain", keep=0.5))
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "other").state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in model.state_dict().items())
    assert len(Checkpoint.open(tmp_path / "out").matrices()) == 8 + 16


def test_what_is_written_is_what_was_trained(dense: Callable[..., Path], tmp_path: Path) -> None:
    settings = settings_of(objective="whiten", refine="e2e", e2e_epochs=1)
    calibration = calibration_of(dense("mixtral"), settings)
    compress(dense("mixtral"), tmp_path / "trained", settings, calibration=calibration)
    compress(dense("mixtral"), tmp_path / "not", settings_of(objective="whiten"), calibration=calibration)
    trained, untrained = (load_file(tmp_path / name / "model.safetensors") for name in ("trained", "not"))
    factors = [name for name in trained if name.endswith((".gate_up.A", ".gate_up.B", ".down.A", ".down.B"))]
    assert len(factors) == 4 * BLOCKS
    assert not any(torch.equal(trained[name], untrained[name]) for name in factors)


def test_a_forward_that_somebody_else_put_there_is_there_afterwards() -> None:
    model = build("mixtral")
    experts: Any = model.get_submodule(PATH)
    mine = experts.forward = experts.forward
    input_grams(model, experts_of(model), TEXT)
    assert experts.__dict__["forward"] == mine


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_with_training_and_ranks_by_loss(
    objective: str, dense: Callable[..., Path], tmp_path: Path
) -> None:
    settings = settings_of(
        objective=objective, allocation="loss", form="auto", refine="both", block_epochs=1, e2e_epochs=1
    )
    calibration = calibration_of(dense("mixtral"), settings)
    report = compress(dense("mixtral"), tmp_path / "out", settings, calibration=calibration)
    rows = [row for row in report["matrices"] if row["experts"]]
    assert {row["form"] for row in rows} == {"stacked"}
    assert all(stage["after"] < stage["before"] for stage in report["refined"].values())
    assert report["check"]["loss_compressed"] < calibration.check_loss + 1
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert written == report["totals"]["bytes_after"]
