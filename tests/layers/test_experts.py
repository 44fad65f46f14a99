"""Experts of low rank take the place of a family's fused ones, projection by projection."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from lowrank_kit.errors import LowRankError
from lowrank_kit.layers import LowRankExperts, LowRankStack, exchange_experts
from lowrank_kit.layers.experts import run_experts, why_dense
from lowrank_kit.matrices import find_matrices
from tests.families import build, token_ids

PATH = "model.layers.1.mlp.experts"
EXPERTS = ["mixtral", "qwen3_moe"]
both = pytest.mark.parametrize("family", EXPERTS)


def fill(stack: LowRankStack, weight: torch.Tensor) -> None:
    """The whole of the weight."""
    U, s, V = torch.linalg.svd(weight.detach(), full_matrices=False)
    with torch.no_grad():
        stack.A.copy_(s[..., None] * V)
        stack.B.copy_(U)


@both
@pytest.mark.parametrize("projections", [["gate_up_proj"], ["down_proj"], ["down_proj", "gate_up_proj"]])
def test_factors_of_full_rank_give_the_dense_logits(family: str, projections: list[str]) -> None:
    model = build(family)
    with torch.no_grad():
        expected = model(input_ids=token_ids()).logits
    for projection in projections:
        weight = model.get_parameter(f"{PATH}.{projection}")
        fill(exchange_experts(model, f"{PATH}.{projection}", min(weight.shape[1:])), weight)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=token_ids()).logits, expected, rtol=0, atol=1e-5)
    left = {"gate_up_proj", "down_proj"}.difference(projections)
    assert {name for name, _ in model.get_submodule(PATH).named_parameters(recurse=False)} == left


@both
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_dense_experts_run_one_by_one_give_the_same(family: str, implementation: str) -> None:
    model = build(family)
    model.set_experts_implementation(implementation)
    experts: Any = model.get_submodule(PATH)
    x, weights = torch.randn(7, 32), torch.rand(7, 2)
    index = torch.tensor([[0, 1], [1, 3], [3, 0], [1, 0], [0, 3], [3, 1], [1, 0]])  # nobody goes to 2
    with torch.no_grad():
        one_by_one = run_experts(
            experts, x, index, weights, lambda name, e, inputs: nn.functional.linear(inputs, getattr(experts, name)[e])
        )
        torch.testing.assert_close(one_by_one, experts(x, index, weights), rtol=0, atol=1e-5)


def test_experts_without_a_gate() -> None:
    config = NemotronHConfig(
        hidden_size=16, n_routed_experts=3, moe_intermediate_size=12, moe_latent_size=None, mlp_hidden_act="relu2"
    )
    config._experts_implementation = "eager"
    model: Any = nn.Module()
    model.experts = NemotronHExperts(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x, index, weights = torch.randn(5, 16), torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0]]), torch.rand(5, 2)
    with torch.no_grad():
        expected = model.experts(x, index, weights)
        for projection in ("up_proj", "down_proj"):
            weight = model.experts.get_parameter(projection)
            fill(exchange_experts(model, f"experts.{projection}", 12), weight)
        torch.testing.assert_close(model.experts(x, index, weights), expected, rtol=1e-5, atol=1e-4)
    assert {name for name, _ in model.experts.named_parameters()} == {"up.A", "up.B", "down.A", "down.B"}


def test_what_is_no_number_of_an_expert_is_left_out() -> None:
    """As tokens of other processes are marked."""
    experts: Any = LowRankExperts(build("mixtral").get_submodule(PATH))
    x, weights = torch.randn(3, 32), torch.rand(3, 2)
    whole = experts(x, torch.tensor([[0, 4], [4, 4], [2, 0]]), weights)
    assert torch.equal(whole[1], torch.zeros(32))
    torch.testing.assert_close(whole[:1], experts(x[:1], torch.tensor([[0]]), weights[:1, :1]), rtol=0, atol=1e-6)


def test_gradients_reach_the_factors_in_bfloat16() -> None:
    model = build("qwen3_moe").bfloat16()
    for projection in ("gate_up_proj", "down_proj"):
        weight = model.get_parameter(f"{PATH}.{projection}").float()
        fill(exchange_experts(model, f"{PATH}.{projection}", min(weight.shape[1:])), weight)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    for stack in (m for m in model.modules() if isinstance(m, LowRankStack)):
        for factor in (stack.A, stack.B):
            assert factor.dtype == torch.bfloat16
            assert factor.grad is not None
            assert (factor.grad.flatten(1).abs().amax(1) > 0).all()


def test_names_and_shapes_on_disk() -> None:
    model = build("mixtral")
    exchange_experts(model, f"{PATH}.gate_up_proj", 5)
    experts = model.get_submodule(PATH)
    assert {name: tuple(tensor.shape) for name, tensor in experts.state_dict().items()} == {
        "down_proj": (4, 32, 48),
        "gate_up_proj": (1, 4, 2),
        "gate_up.A": (4, 5, 32),
        "gate_up.B": (4, 96, 5),
    }
    # The sentinel is no parameter: no optimizer decays it, no count of parameters has it.
    assert {name for name, _ in experts.named_parameters()} == {"down_proj", "gate_up.A", "gate_up.B"}
    assert "experts=4, in_features=32, out_features=96, rank=5" in repr(experts)


def test_factors_are_matrices_of_each_expert_and_routers_none() -> None:
    model = build("mixtral")
    before = {matrix.name for matrix in find_matrices(model)}
    experts: Any = model.get_submodule(PATH)
    for projection in ("gate_up_proj", "down_proj"):
        exchange_experts(model, f"{PATH}.{projection}", 5)
    model.get_submodule(PATH.removesuffix(".experts")).router = nn.Linear(32, experts.num_experts)
    found = {matrix.name: matrix for matrix in find_matrices(model)}
    new = {f"{PATH}.{role}.{factor}[{e}]" for role in ("gate_up", "down") for factor in "AB" for e in range(4)}
    assert found.keys() == {name for name in before if not name.startswith(PATH)} | new
    assert found[f"{PATH}.gate_up.B[2]"].shape == (96, 5)
    assert found[f"{PATH}.down.A[2]"].shape == (5, 48)


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("gpt_oss", f"{PATH}.down_proj", "stays dense: experts stored transposed"),
        ("mixtral", "model.layers.1.mlp.gate.weight", "no fused weight of experts"),
        ("mixtral", "model.layers.1.mlp.other.down_proj", "has no module"),
        ("llama", "model.layers.1.mlp.down_proj", "no fused weight of experts"),
    ],
)
def test_what_cannot_be_exchanged_is_refused(family: str, name: str, message: str) -> None:
    with pytest.raises(LowRankError, match=message):
        exchange_experts(build(family), name, 2)


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("is_transposed", True, "experts stored transposed"),
        ("has_bias", True, "experts with biases"),
        ("is_concatenated", False, "experts with gate and up interleaved"),
        ("has_post_expert_norm", True, "experts with a norm"),
        ("other", nn.Parameter(torch.zeros(1)), "experts with other weights than"),
    ],
)
def test_why_experts_stay_dense(attribute: str, value: object, reason: str) -> None:
    experts = build("mixtral").get_submodule(PATH)
    assert why_dense(experts) == ""
    setattr(experts, attribute, value)
    assert why_dense(experts).startswith(reason)
    assert why_dense(nn.Linear(2, 2)) == "experts with a forward of their own"
