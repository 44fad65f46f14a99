"""Which rule steps which parameter, on every family."""

from __future__ import annotations

from collections import Counter

import pytest
from torch import nn

from lowrank_kit.matrices import find_matrices
from lowrank_kit.optim import NuMuon, parameter_groups
from tests.families import FAMILIES, build

families = pytest.mark.parametrize("family", FAMILIES)


def names_of_groups(model: nn.Module, groups: list[dict]) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


@families
def test_every_parameter_is_in_one_group_once(family: str) -> None:
    model = build(family)
    groups = parameter_groups(model, rule="muon", lr=1e-3)
    counted = Counter(id(parameter) for group in groups for parameter in group["params"])
    assert counted == Counter(id(parameter) for parameter in model.parameters())
    NuMuon(groups)


@families
def test_matrices_and_nothing_else_follow_the_matrix_rule(family: str) -> None:
    model = build(family)
    groups = names_of_groups(model, parameter_groups(model, rule="muon", lr=1e-3))
    assert groups["matrices"] == {matrix.parameter for matrix in find_matrices(model)}
    ends = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(end)] for end in ends} <= groups["embeddings"]
    assert {name for name, p in model.named_parameters() if p.ndim == 1} <= groups["vectors"]


@pytest.mark.parametrize(
    ("family", "embeddings", "vectors"),
    [
        ("gpt2", {"transformer.wte.weight", "transformer.wpe.weight"}, "transformer.h.0.attn.c_attn.bias"),
        (
            "mixtral",
            {"model.embed_tokens.weight", "lm_head.weight"}
            | {f"model.layers.{block}.mlp.gate.weight" for block in range(2)},
            "model.norm.weight",
        ),
        (
            "gpt_oss",
            {"model.embed_tokens.weight", "lm_head.weight"}
            | {f"model.layers.{block}.mlp.router.weight" for block in range(2)},
            "model.layers.1.mlp.experts.gate_up_proj_bias",
        ),
    ],
)
def test_routers_go_with_the_embeddings_and_stacked_biases_with_the_vectors(
    family: str, embeddings: set[str], vectors: str
) -> None:
    model = build(family)
    groups = names_of_groups(model, parameter_groups(model, rule="muon", lr=1e-3))
    assert groups["embeddings"] == embeddings
    assert vectors in groups["vectors"]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_fused_experts_are_stepped_whole(family: str) -> None:
    model = build(family)
    groups = names_of_groups(model, parameter_groups(model, rule="numuon", lr=1e-3))
    assert "model.layers.1.mlp.experts.gate_up_proj" in groups["matrices"]


def test_options_and_weight_decay_go_where_they_belong() -> None:
    matrices, embeddings, vectors = parameter_groups(
        build("llama"), rule="numuon", lr=3e-3, weight_decay=0.1, rank_schedule="fixed:0.5", momentum=0.9
    )
    assert [group["rule"] for group in (matrices, embeddings, vectors)] == ["numuon", "adamw", "adamw"]
    assert [group["weight_decay"] for group in (matrices, embeddings, vectors)] == [0.1, 0.1, 0.0]
    assert [group["lr"] for group in (matrices, embeddings, vectors)] == [3e-3] * 3
    apart = parameter_groups(build("llama"), rule="muon", lr=3e-3, adamw_lr=1e-3)
    assert [group["lr"] for group in apart] == [3e-3, 1e-3, 1e-3]
    assert (matrices["rank_schedule"], matrices["momentum"]) == ("fixed:0.5", 0.9)
    assert "rank_schedule" not in embeddings


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    model = build("llama").requires_grad_(False)
    model.get_submodule("model.layers.0.mlp.up_proj").requires_grad_(True)
    (group,) = parameter_groups(model, rule="muon", lr=1e-3)
    assert names_of_groups(model, [group]) == {"matrices": {"model.layers.0.mlp.up_proj.weight"}}
