"""Which rule steps which parameter, on every family; patterns; LoRA adapters; the table of what steps what."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from lowrank_kit.errors import UsageError
from lowrank_kit.matrices import find_matrices
from lowrank_kit.optim import NuMuon, parameter_groups, parse_overrides, routing_table
from lowrank_kit.optim.routing import routing_rows
from tests.families import FAMILIES, build, token_ids

families = pytest.mark.parametrize("family", FAMILIES)
NUMUON: dict[str, Any] = {"rule": "numuon", "lr": 1e-2, "adamw_lr": 1e-3, "rank_schedule": "fixed:0.25"}


def names_of_groups(groups: list[dict[str, Any]]) -> dict[str, set[str]]:
    """Names of the parameters of all groups of one name: layouts part the matrices."""
    found: dict[str, set[str]] = {}
    for group in groups:
        found.setdefault(group["name"], set()).update(group["param_names"])
    return found


def options_of(model: nn.Module, name: str, **options: Any) -> dict[str, Any]:
    """The group that a parameter is in."""
    (group,) = (g for g in parameter_groups(model, **NUMUON | options) if name in g["param_names"])
    return group


@families
def test_every_parameter_is_in_one_group_once_and_under_its_name(family: str) -> None:
    model = build(family)
    groups = parameter_groups(model, rule="muon", lr=1e-3)
    counted = Counter(id(parameter) for group in groups for parameter in group["params"])
    assert counted == Counter(id(parameter) for parameter in model.parameters())
    for group in groups:
        named = [model.get_parameter(name) for name in group["param_names"]]
        assert [id(parameter) for parameter in named] == [id(parameter) for parameter in group["params"]]
    NuMuon(groups)


@families
def test_matrices_and_nothing_else_follow_the_matrix_rule(family: str) -> None:
    model = build(family)
    parameters = parameter_groups(model, rule="muon", lr=1e-3)
    groups = names_of_groups(parameters)
    assert groups["matrices"] == {matrix.parameter for matrix in find_matrices(model)}
    by_rule = {name for group in parameters if group["rule"] == "muon" for name in group["param_names"]}
    assert by_rule == groups["matrices"]
    ends = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(end)] for end in ends} <= groups["embeddings"]
    assert {name for name, p in model.named_parameters() if p.ndim == 1} <= groups["vectors"]


@families
def test_a_group_knows_how_its_matrices_lie(family: str) -> None:
    model = build(family)
    matrices = {matrix.parameter: matrix for matrix in find_matrices(model)}
    for group in parameter_groups(model, rule="muon", lr=1e-3):
        for name in group["param_names"]:
            matrix = matrices.get(name)
            split = matrix.split if matrix else None
            assert group.get("transposed", False) == (matrix is not None and matrix.transposed)
            assert (group.get("split", ()), group.get("split_groups", 1)) == (
                (split.sizes, split.groups) if split else ((), 1)
            )


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
    groups = names_of_groups(parameter_groups(build(family), rule="muon", lr=1e-3))
    assert groups["embeddings"] == embeddings
    assert vectors in groups["vectors"]


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
    groups = parameter_groups(model, rule="muon", lr=1e-3)
    assert names_of_groups(groups) == {"matrices": {"model.layers.0.mlp.up_proj.weight"}}


# Overrides


UP, DOWN = (f"model.layers.0.mlp.{leaf}_proj.weight" for leaf in ("up", "down"))


@pytest.mark.parametrize(
    ("overrides", "name", "expected"),
    [
        ({"*.up_proj.*": "muon"}, UP, {"rule": "muon", "lr": 1e-2, "name": "matrices (*.up_proj.*)"}),
        ({"*.up_proj.*": "muon"}, DOWN, {"rule": "numuon", "name": "matrices"}),
        # What goes to AdamW takes its learning rate, unless one is said.
        ({"*.up_proj.*": "adamw"}, UP, {"rule": "adamw", "lr": 1e-3}),
        ({"*.up_proj.*": {"rule": "sgd", "lr": 0.5}}, UP, {"rule": "sgd", "lr": 0.5}),
        ({"*.up_proj.*": {"rank_schedule": "fixed:0.5"}}, UP, {"rule": "numuon", "rank_schedule": "fixed:0.5"}),
        ({"*norm.weight": {"weight_decay": 0.3}}, "model.norm.weight", {"rule": "adamw", "weight_decay": 0.3}),
        # Later ones win, key by key.
        ({"*.mlp.*": {"lr": 0.5, "topk": "exact"}, "*.up_proj.*": {"lr": 0.25}}, UP, {"lr": 0.25, "topk": "exact"}),
        ({"*.up_proj.*": {"lr": 0.25}, "*.mlp.*": {"lr": 0.5}}, UP, {"lr": 0.5, "name": "matrices (*.mlp.*)"}),
        ({"*.up_proj.*": "adamw", "*.0.mlp.*": "numuon"}, UP, {"rule": "numuon", "lr": 1e-2}),
    ],
)
def test_an_override(overrides: dict[str, Any], name: str, expected: dict[str, Any]) -> None:
    group = options_of(build("llama"), name, overrides=overrides)
    assert {key: group[key] for key in expected} == expected
    NuMuon([group])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"overrides": {"*.o_prj.*": "adamw"}},
            r'the pattern "\*\.o_prj\.\*" matches none of 21 .*\nhint: names are as',
        ),
        ({"overrides": {"*embed_tokens*": "numuon"}}, '"model.embed_tokens.weight" is no matrix: rule numuon'),
        ({"overrides": {"*": {"rule": "muon"}}}, '"model.embed_tokens.weight" is no matrix: rule muon'),
        ({"overrides": {"*norm*": "muon"}}, 'layernorm.weight" is no matrix'),
        ({"overrides": {"lm_head.*": "numuon"}}, '"lm_head.weight" is no matrix'),
        ({"overrides": {"*.up_proj.*": {"rank": 0.5}}}, 'unknown option "rank" of an optimizer group'),
        ({"rank_shedule": "fixed:0.5"}, 'unknown option "rank_shedule" .*\nhint: did you mean "rank_schedule"?'),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parameter_groups(build("llama"), **NUMUON | options)


def test_a_router_is_refused_as_a_matrix() -> None:
    with pytest.raises(UsageError, match=r'"model\.layers\.0\.mlp\.gate\.weight" is no matrix'):
        parameter_groups(build("mixtral"), **NUMUON, overrides={"*.mlp.gate.*": "numuon"})


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], {}),
        (["*.o_proj.*=adamw"], {"*.o_proj.*": {"rule": "adamw"}}),
        (["a=rule=muon", "b=lr=1e-3"], {"a": {"rule": "muon"}, "b": {"lr": 1e-3}}),
        (["a=rank_schedule=cosine:1:0.5:hold=0.1"], {"a": {"rank_schedule": "cosine:1:0.5:hold=0.1"}}),
        (["a=weight_decay=0.1", "a=spectral_decay=0.4"], {"a": {"weight_decay": 0.1, "spectral_decay": 0.4}}),
        (["a=topk=exact", "a=topk=krylov", "a=scale=none"], {"a": {"topk": "krylov", "scale": "none"}}),
    ],
)
def test_parse_overrides(lines: list[str], expected: dict[str, Any]) -> None:
    assert parse_overrides(lines) == expected


@pytest.mark.parametrize("line", ["a=lr=fast", "a=rank=0.5", "a=weight_decay="])
def test_an_override_that_does_not_parse(line: str) -> None:
    with pytest.raises(UsageError, match=f'PATTERN=RULE or PATTERN=KEY=VALUE, got "{line}"\nhint: .*keys: rule, lr,'):
        parse_overrides(["*=adamw", line])


@pytest.mark.parametrize("line", ["adamw", "=adamw", "a=", ""])
def test_an_override_of_half_a_form(line: str) -> None:
    with pytest.raises(UsageError, match=f'got "{line}"'):
        parse_overrides([line])


# LoRA adapters


def adapted(family: str, **config: Any) -> PeftModel:
    """A family with LoRA on its query and MLP, B not zero."""
    leaves = ["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "down_proj"]
    lora = LoraConfig(r=4, target_modules=leaves, fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM", **config)
    model = get_peft_model(build(family), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_are_no_matrices_and_the_base_keeps_its_own(family: str) -> None:
    base, found = find_matrices(build(family)), find_matrices(adapted(family))
    assert [m.name.removeprefix("base_model.model.").replace(".base_layer", "") for m in found] == [
        m.name for m in base
    ]
    for key in ("role", "block", "shape", "transposed", "ends_branch", "split"):
        assert [getattr(m, key) for m in found] == [getattr(m, key) for m in base], key
    assert sum(".base_layer" in m.name for m in found) == 4
    # The query of an adapted attention still shares its input with the keys.
    assert len({m.shares_input for m in found}) == len({m.shares_input for m in base})


def test_a_head_that_peft_saves_is_no_matrix() -> None:
    model = adapted("llama", modules_to_save=["lm_head"])
    assert not [m.name for m in find_matrices(model) if "lm_head" in m.name]
    groups = names_of_groups(parameter_groups(model, **NUMUON))
    assert groups["embeddings"] == {"base_model.model.lm_head.modules_to_save.default.weight"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("overrides", [{}, {"*lora_B*": "numuon"}], ids=["adamw", "numuon"])
def test_adapters_are_trained_and_the_base_is_not(family: str, overrides: dict[str, Any]) -> None:
    model = adapted(family)
    # A schedule with a length: what is sent to numuon takes it from the matrices.
    given = NUMUON | {"rank_schedule": "cosine:1:0.25", "total_steps": 10}
    groups = parameter_groups(model, **given, overrides=overrides)
    rules = {name: (group["rule"], group["lr"]) for group in groups for name in group["param_names"]}
    trained = {name for name, p in model.named_parameters() if "lora_" in name}
    assert rules == {name: ("numuon", 1e-2) if overrides and "lora_B" in name else ("adamw", 1e-3) for name in trained}
    assert {group["name"].split(" ")[0] for group in groups} == {"adapters"}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = NuMuon(groups)
    tokens = token_ids()
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained


# The table


@families
def test_the_table_accounts_for_every_trainable_parameter(family: str) -> None:
    model = build(family)
    model.get_input_embeddings().requires_grad_(False)
    optimizer = NuMuon(parameter_groups(model, **NUMUON))
    rows = routing_rows(model, optimizer)
    matrices = find_matrices(model)
    parts = sum(len(matrix.split.roles) if matrix.split else 1 for matrix in matrices)
    others = {name for name, p in model.named_parameters() if p.requires_grad} - {m.parameter for m in matrices}
    assert sum(row["count"] for row in rows if row["shape"]) == parts
    assert sum(row["count"] for row in rows if not row["shape"]) == len(others)
    assert len({tuple(row[key] for key in ("role", "shape", "rule", "lr", "rank")) for row in rows}) == len(rows)
    assert not {row["role"] for row in rows} & {"qkv", "gate_up"}
    numbers = sum(m.shape[0] * m.shape[1] for m in matrices)
    shapes = [(*map(int, row["shape"].split(" x ")), row["count"]) for row in rows if row["shape"]]
    assert sum(out * into * count for out, into, count in shapes) == numbers


def test_the_table_as_one_reads_it() -> None:
    """Parts of a fused qkv, experts by the piece, first and last rank of the smaller side; rules and rates by row."""
    model = build("gpt_oss")
    groups = parameter_groups(
        model, **NUMUON | {"rank_schedule": "cosine:1:0.25", "total_steps": 10}, overrides={"*.o_proj.weight": "adamw"}
    )
    assert routing_table(model, NuMuon(groups)).splitlines() == [
        "role        count  shape    rule    lr     rank",
        "----------  -----  -------  ------  -----  -------------",
        "q               2  48 x 32  numuon  0.01   32 to 8 of 32",
        "k               2  24 x 32  numuon  0.01   24 to 6 of 24",
        "v               2  24 x 32  numuon  0.01   24 to 6 of 24",
        "o               2  32 x 48  adamw   0.001  -",
        "gate            8  48 x 32  numuon  0.01   32 to 8 of 32",
        "up              8  48 x 32  numuon  0.01   32 to 8 of 32",
        "down            8  32 x 48  numuon  0.01   32 to 8 of 32",
        "embeddings      4  -        adamw   0.001  -",
        "vectors        21  -        adamw   0.001  -",
    ]
