"""Folding block after block: the statistics are those of the model compressed so far, whatever the family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.compression.fold import Folded
from lowrank_kit.compression.objectives import OBJECTIVES, Options
from lowrank_kit.compression.piece import Piece
from lowrank_kit.compression.plan import Plan, make_plan
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import REFINES
from tests.compression.folds import fold, folded, settings_of
from tests.families import BLOCKS, build, token_ids

# Family -> path of the blocks, what is outside of them, and the leaves of one in the order in which they read.
Order = tuple[str, list[str], list[list[str]]]
GATED = [["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
ATTENTION = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
OPT = [[*ATTENTION[0]], ["self_attn.out_proj"], ["fc1"], ["fc2"]]
ORDERS: dict[str, Order] = {
    "llama": ("model.layers", [], ATTENTION + GATED),
    "gpt2": ("transformer.h", [], [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]]),
    "phi3": (
        "model.layers",
        [],
        [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]],
    ),
    # In parallel: both branches read what the block reads.
    "gpt_neox": (
        "gpt_neox.layers",
        [],
        [["attention.query_key_value"], ["attention.dense"], ["mlp.dense_h_to_4h"], ["mlp.dense_4h_to_h"]],
    ),
    "opt_projected": ("model.decoder.layers", ["model.decoder.project_in", "model.decoder.project_out"], OPT),
    "qwen3_moe": ("model.layers", [], ATTENTION),
}
KEEP = {"gpt_oss": 0.95}
EXPERTS = ["mixtral", "qwen3_moe"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`dense(family, rank=None)`: a folder, made once; `rank` is that of all its matrices."""
    root = tmp_path_factory.mktemp("dense")

    def folder(family: str, rank: int | None = None) -> Path:
        path = root / f"{family}-{rank}"
        if not path.exists():
            model = build(family)
            if rank is not None:
                model.save_pretrained(path)
                for stored in Checkpoint.open(path).units():
                    if stored.reason == "":
                        W = model.get_parameter(stored.matrix.parameter)
                        U, s, V = torch.linalg.svd(W.detach(), full_matrices=False)
                        W.data = (U[..., :rank] * s[..., None, :rank]) @ V[..., :rank, :]
            model.save_pretrained(path)
        return path

    return folder


def load(folder: Path, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def precision(family: str) -> torch.dtype:
    """Fused experts are run in float32 at most."""
    return torch.float32 if family in EXPERTS else torch.float64


def weight(model: PreTrainedModel, name: str) -> Tensor:
    """A view, [out, in]."""
    W = model.get_parameter(f"{name}.weight").data
    return W.mT if isinstance(model.get_submodule(name), Conv1D) else W


def inputs(model: PreTrainedModel, name: str, ids: Tensor) -> Tensor:
    """What a module reads, [in, tokens], by running all of the model."""
    read: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: read.append(args[0].flatten(0, -2))
    )
    with torch.no_grad():
        model(input_ids=ids.long(), use_cache=False)
    handle.remove()
    return torch.cat(read).mT


def output(model: PreTrainedModel, name: str, ids: Tensor) -> Tensor:
    """What a block gives, by running all of the model."""
    given: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: given.append(output))
    with torch.no_grad():
        model(input_ids=ids.long(), use_cache=False)
    handle.remove()
    return given[0]


def best(W: Tensor, X: Tensor, Y: Tensor, rank: int, blend: float, ridge: float = Options.ridge) -> Tensor:
    """Of all W' of a rank, the one with the least |W ((1 - b) Y + b X) - W' Y|, with the ridge toward W."""
    W, X, Y = W.double(), X.double(), Y.double()
    added = ridge * Y.square().sum(1).mean() * torch.eye(len(Y), dtype=Y.dtype)
    wanted = W @ (((1 - blend) * Y + blend * X) @ Y.mT + added)
    values, Q = torch.linalg.eigh(Y @ Y.mT + added)
    inverse = Q / values.sqrt()
    U, s, V = torch.linalg.svd(wanted @ inverse, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ V[:rank] @ inverse.mT


def by_hand(family: str, plan: Plan, ids: Tensor, blend: float) -> dict[str, Tensor]:
    """Name -> W', by whole runs of the dense model and of the one compressed so far."""
    path, outside, leaves = ORDERS[family]
    experts = [f"mlp.experts.{projection}_proj" for projection in ("gate_up", "down")] * (family in EXPERTS)
    ranks = {m.stored.matrix.name: m.rank for m in plan.matrices if m.rank is not None}
    before, after = (load(plan.checkpoint.path, precision(family)) for _ in range(2))
    made: dict[str, Tensor] = {}

    def put(name: str, W: Tensor) -> None:
        made[name] = W
        # As it is stored.
        weight(after, name).copy_(W.float())

    for name in outside:
        X = inputs(before, name, ids)
        put(name, best(weight(before, name), X, X, ranks[name], 1.0, ridge=0.0))
    for block in range(BLOCKS):
        for group in leaves:
            names = [f"{path}.{block}.{leaf}" for leaf in group]
            X, Y = inputs(before, names[0], ids), inputs(after, names[0], ids)
            for name in names:
                if name in ranks:
                    put(name, best(weight(before, name), X, Y, ranks[name], blend))
        for leaf in experts:
            name = f"{path}.{block}.{leaf}"
            made[name] = experts_by_hand(before, after, name, ids, ranks[name], blend)
            after.get_parameter(name).data.copy_(made[name].float())
    return made


def experts_by_hand(
    before: PreTrainedModel, after: PreTrainedModel, name: str, ids: Tensor, rank: int, blend: float
) -> Tensor:
    """W' of every expert, for the tokens that come to it in the compressed model."""
    path = name.rpartition(".")[0]
    (dense, x, _), (changed, y, chosen) = (called(model, path, ids) for model in (before, after))
    made = []
    for expert, W in enumerate(before.get_parameter(name).data):
        tokens = (chosen == expert).any(1)
        X, Y = x[tokens], y[tokens]
        if name.endswith("down_proj"):
            X, Y = (e._apply_gate(z @ e.gate_up_proj[expert].mT) for e, z in ((dense, X), (changed, Y)))
        made.append(best(W, X.mT, Y.mT, rank, blend))
    return torch.stack(made)


def called(model: PreTrainedModel, path: str, ids: Tensor) -> tuple[Any, Tensor, Tensor]:
    """Experts, what they read and who of them reads it, by running all of the model."""
    seen: list[tuple[Tensor, ...]] = []
    experts = model.get_submodule(path)
    handle = experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        model(input_ids=ids.long(), use_cache=False)
    handle.remove()
    return experts, seen[0][0], seen[0][1]


def off(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative difference."""
    assert found.keys() == wanted.keys()
    return max(((found[name] - W).norm() / W.norm()).item() for name, W in wanted.items())


@pytest.mark.parametrize(("family", "blend"), [*((family, 1.0) for family in ORDERS), ("llama", 0.3)])
def test_each_matrix_is_made_for_the_model_compressed_so_far(
    family: str, blend: float, dense: Callable[..., Path]
) -> None:
    given: dict[str, Any] = {"objective": "anchored", "blend": blend, "keep": KEEP.get(family, 0.5)}
    plan, calibration, made = folded(dense(family), precision(family), **given)
    found = {name: piece.dense() for name, piece in made.pieces.items()}
    wanted = by_hand(family, plan, calibration.texts.calibration.ids, blend)
    # Stored in float32; where it is run in float32 too, the order of sums shows.
    assert off(found, wanted) < (1e-4 if precision(family) == torch.float64 else 1e-3)
    # The comparison says something: by the dense model alone it is another model.
    _, _, other = folded(dense(family), precision(family), **(given | {"objective": "whiten"}))
    assert off({name: piece.dense() for name, piece in other.pieces.items()}, wanted) > 0.03


def model_of(folder: Path, made: Folded) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder)
    for piece in made.pieces.values():
        piece.install(model)
    return model


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=token_ids(), use_cache=False).logits


@pytest.mark.parametrize("form", ["factors", "pivoted"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt_projected", "gemma2", *EXPERTS, "gpt_oss"])
def test_matrices_of_low_rank_lose_nothing(family: str, form: str, dense: Callable[..., Path]) -> None:
    folder = dense(family, rank=6)
    plan, _, made = folded(folder, torch.float32, objective="anchored", form=form, keep=KEEP.get(family, 0.7))
    assert set(made.pieces) == {m.stored.matrix.name for m in plan.matrices if m.rank is not None}
    assert len(made.pieces) >= 4 * BLOCKS
    assert all(piece.kept_energy > 1 - 1e-6 for piece in made.pieces.values())
    torch.testing.assert_close(logits(model_of(folder, made)), logits(load(folder, torch.float32)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("refine", REFINES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_with_every_refinement(objective: str, refine: str, dense: Callable[..., Path]) -> None:
    given: dict[str, Any] = {"objective": objective, "refine": refine, "block_epochs": 1, "e2e_epochs": 1}
    plan, _, made = folded(dense("llama"), **given)
    stages = [f"model.layers.{block}" for block in range(BLOCKS)] * (refine in ("block", "both"))
    assert list(made.refined) == stages + ["end to end"] * (refine in ("e2e", "both"))
    assert all(stage.after <= stage.before for stage in made.refined.values())
    assert set(made.pieces) == {m.stored.matrix.name for m in plan.matrices}
    norms = {name for name, p in build("llama").named_parameters() if p.ndim == 1}
    if refine == "block":
        norms.remove("model.norm.weight")
    assert set(made.others) == (norms if refine != "none" else set())
    assert all(isinstance(piece, Piece) and piece.dense().isfinite().all() for piece in made.pieces.values())


def test_refinement_by_block_sees_the_compressed_blocks_before(dense: Callable[..., Path]) -> None:
    """The error before refinement is that of the compressed block on the compressed model's inputs."""
    folder = dense("llama")
    _, calibration, made = folded(folder, torch.float32, objective="whiten", refine="block", block_epochs=1)
    model, whole = load(folder), load(folder)
    _, _, unrefined = folded(folder, torch.float32, objective="whiten")
    for index in range(BLOCKS):
        path = f"model.layers.{index}"
        for name, piece in unrefined.pieces.items():
            if name.startswith(path):
                piece.install(model)
        changed, target = (output(one, path, calibration.texts.check.ids) for one in (model, whole))
        stage = made.refined[path]
        assert stage.before == pytest.approx(((changed - target).square().sum() / target.square().sum()).item(), 1e-4)
        # The next block reads what the refined one gives.
        for name, piece in made.pieces.items():
            if name.startswith(path):
                layer = model.get_submodule(name)
                layer.load_state_dict({**layer.state_dict(), **piece.tensors})
        for name, tensor in made.others.items():
            if name.startswith(path):
                model.get_parameter(name).data.copy_(tensor)


def test_a_dense_plan_folds_nothing(dense: Callable[..., Path], tmp_path: Path) -> None:
    for objective in ("whiten", "anchored", "plain"):
        settings = settings_of(keep=1.0, objective=objective, refine="both")
        plan = make_plan(Checkpoint.open(dense("llama")), settings)
        assert fold(plan, None) == Folded()
        compress(dense("llama"), tmp_path / objective, settings)
        before, after = (load_file(p / "model.safetensors") for p in (dense("llama"), tmp_path / objective))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
