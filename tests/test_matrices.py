"""Which tensors of a model are matrices, proven by running it: shapes, orientation, shared inputs, branch ends."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig, Lfm2Config, LlamaConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowrank_kit.errors import UsageError
from lowrank_kit.matrices import Matrix, block_of, find_matrices, role_of
from tests.families import BLOCKS, FAMILIES, GROUPED, build, decoder_blocks, token_ids

Roles = dict[str, tuple[int, int, int]]

# Written by hand from the architectures: role -> (how many in a block, out, in). Hidden 32, inner 48, experts 4.
SPLIT: Roles = {"q": (1, 32, 32), "k": (1, 16, 32), "v": (1, 16, 32), "o": (1, 32, 32)}
# Heads of size 12 instead of 32 / 4.
SPLIT_HEADS_12: Roles = {"q": (1, 48, 32), "k": (1, 24, 32), "v": (1, 24, 32), "o": (1, 32, 48)}
GATED: Roles = {"gate": (1, 48, 32), "up": (1, 48, 32), "down": (1, 32, 48)}
IN_BLOCK: dict[str, Roles] = {
    "llama": SPLIT | GATED,
    "llama_tied": SPLIT | GATED,
    "mistral": SPLIT | GATED,
    "qwen2": SPLIT | GATED,
    "qwen2_tied": SPLIT | GATED,
    "qwen3": SPLIT_HEADS_12 | GATED,
    "gpt2": {"qkv": (1, 96, 32), "o": (1, 32, 32), "up": (1, 128, 32), "down": (1, 32, 128)},
    "gpt_neox": {"qkv": (1, 96, 32), "o": (1, 32, 32), "up": (1, 48, 32), "down": (1, 32, 48)},
    "phi3": {"qkv": (1, 64, 32), "o": (1, 32, 32), "gate_up": (1, 96, 32), "down": (1, 32, 48)},
    "gemma": SPLIT_HEADS_12 | GATED,
    "gemma2": SPLIT_HEADS_12 | GATED,
    "gemma3": SPLIT_HEADS_12 | GATED,
    "mixtral": SPLIT | {"gate_up": (4, 96, 32), "down": (4, 32, 48)},
    "qwen3_moe": SPLIT_HEADS_12 | {"gate_up": (4, 48, 32), "down": (4, 32, 24)},
    "opt": dict.fromkeys("qkvo", (1, 32, 32)) | {"up": (1, 48, 32), "down": (1, 32, 48)},
    "opt_projected": dict.fromkeys("qkvo", (1, 32, 32)) | {"up": (1, 48, 32), "down": (1, 32, 48)},
    "granite": SPLIT | GATED,
    "gpt_oss": SPLIT_HEADS_12 | {"gate_up": (4, 96, 32), "down": (4, 32, 48)},
}
OUTSIDE: dict[str, Roles] = {"opt_projected": {"project_in": (1, 32, 16), "project_out": (1, 16, 32)}}
# Parameters of two or more dimensions that are no matrices; in a block, by their name in it.
NO_MATRICES: dict[str, set[str]] = {
    "llama_tied": {"model.embed_tokens.weight"},
    "qwen2_tied": {"model.embed_tokens.weight"},
    "gpt2": {"transformer.wte.weight", "transformer.wpe.weight"},
    "gpt_neox": {"gpt_neox.embed_in.weight", "lm_head.weight"},
    "gemma": {"model.embed_tokens.weight"},
    "gemma2": {"model.embed_tokens.weight"},
    "gemma3": {"model.embed_tokens.weight"},
    "mixtral": {"model.embed_tokens.weight", "lm_head.weight", "mlp.gate.weight"},
    "qwen3_moe": {"model.embed_tokens.weight", "lm_head.weight", "mlp.gate.weight"},
    "opt": {"model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"},
    "opt_projected": {"model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"},
    "gpt_oss": {
        "model.embed_tokens.weight",
        "lm_head.weight",
        "mlp.router.weight",
        "mlp.experts.gate_up_proj_bias",
        "mlp.experts.down_proj_bias",
    },
}
WITH_EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")

families = pytest.mark.parametrize("family", FAMILIES)


def plain_matrices(model: nn.Module) -> list[Matrix]:
    return [matrix for matrix in find_matrices(model) if matrix.expert is None]


def weight(model: nn.Module, matrix: Matrix) -> Tensor:
    """W as [out, in]: what every user of `Matrix` makes of `parameter`, `expert` and `transposed`."""
    stored = model.get_parameter(matrix.parameter).detach()
    W = stored if matrix.expert is None else stored[matrix.expert]
    return W.mT if matrix.transposed else W


def record(model: PreTrainedModel, names: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and outputs of modules in one forward pass, by name. They stay alive, so that no address is used twice."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs[name] = args[0] if args else kwargs["hidden_states"]
            outputs[name] = output if isinstance(output, Tensor) else output[0]

        return hook

    handles = [model.get_submodule(name).register_forward_hook(recorder(name), with_kwargs=True) for name in names]
    with torch.no_grad():
        model(token_ids(), use_cache=False)
    for handle in handles:
        handle.remove()
    return inputs, outputs


@families
def test_roles_and_shapes(family: str) -> None:
    found: dict[int | None, dict[str, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    for matrix in find_matrices(build(family)):
        found[matrix.block][matrix.role].append(matrix.shape)
    expected = dict.fromkeys(range(BLOCKS), IN_BLOCK[family]) | ({None: OUTSIDE[family]} if family in OUTSIDE else {})
    assert found == {
        block: {role: [(out, into)] * count for role, (count, out, into) in roles.items()}
        for block, roles in expected.items()
    }


@families
def test_everything_else_is_known_to_be_no_matrix(family: str) -> None:
    model = build(family)
    matrices = {matrix.parameter for matrix in find_matrices(model)}
    rest = {name for name, p in model.named_parameters() if p.ndim >= 2 and name not in matrices}
    rest = {re.sub(r"^.*\.\d+\.", "", name) for name in rest}
    assert rest == NO_MATRICES.get(family, {"model.embed_tokens.weight", "lm_head.weight"})


@families
def test_names_lead_to_parameters_and_are_unique(family: str) -> None:
    model = build(family)
    matrices = find_matrices(model)
    parameters = dict(model.named_parameters())
    for matrix in matrices:
        expected = tuple(parameters[matrix.parameter].shape[-2:])
        assert expected == (matrix.shape[::-1] if matrix.transposed else matrix.shape)
        assert matrix.name == (
            matrix.parameter.removesuffix(".weight")
            if matrix.expert is None
            else f"{matrix.parameter}[{matrix.expert}]"
        )
    assert len({matrix.name for matrix in matrices}) == len(matrices)
    assert len({(matrix.parameter, matrix.expert) for matrix in matrices}) == len(matrices)


@families
def test_embeddings_and_head_are_never_matrices(family: str) -> None:
    model = build(family)
    ends = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    assert ends.isdisjoint(id(model.get_parameter(matrix.parameter)) for matrix in find_matrices(model))


@families
def test_a_matrix_maps_its_input_to_its_output(family: str) -> None:
    """y = W x + b on real activations: the orientation is right also where W is square."""
    model = build(family)
    matrices = plain_matrices(model)
    inputs, outputs = record(model, [matrix.name for matrix in matrices])
    for matrix in matrices:
        x, y = inputs[matrix.name], outputs[matrix.name]
        assert (y.shape[-1], x.shape[-1]) == matrix.shape, matrix.name
        bias = getattr(model.get_submodule(matrix.name), "bias", None)
        expected = x @ weight(model, matrix).mT + (0 if bias is None else bias.detach())
        # Another order of summation over at most 128 float32 products of order one.
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5, msg=matrix.name)


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_experts_by_their_matrices_give_the_forward_of_the_fused_module(family: str) -> None:
    model = build(family)
    by_place = {(m.block, m.role, m.expert): m for m in find_matrices(model) if m.expert is not None}
    experts: Any = model.get_submodule("model.layers.1.mlp.experts")
    x = torch.randn(5, 32)
    chosen = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2]])
    shares = torch.rand(5, 2)

    def bias(leaf: str, expert: int) -> Tensor | int:
        return getattr(experts, f"{leaf}_bias")[expert] if hasattr(experts, f"{leaf}_bias") else 0

    expected = torch.zeros(5, 32)
    for token in range(5):
        for slot in range(2):
            expert = int(chosen[token, slot])
            inner = weight(model, by_place[1, "gate_up", expert]) @ x[token] + bias("gate_up_proj", expert)
            inner = experts._apply_gate(inner)
            y = weight(model, by_place[1, "down", expert]) @ inner + bias("down_proj", expert)
            expected[token] += shares[token, slot] * y
    torch.testing.assert_close(experts(x, chosen, shares), expected, atol=1e-5, rtol=1e-5)


def test_transposed_storage() -> None:
    assert all(matrix.transposed for matrix in find_matrices(build("gpt2")))
    assert {m.role for m in find_matrices(build("gpt_oss")) if m.transposed} == {"gate_up", "down"}
    for family in FAMILIES.keys() - {"gpt2", "gpt_oss"}:
        assert not any(matrix.transposed for matrix in find_matrices(build(family))), family


def test_square_experts_are_transposed_when_the_module_says_so() -> None:
    """gpt-oss has as many inner as hidden units, so the shapes do not tell."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GptOssConfig(**GROUPED | {"intermediate_size": 32}))
    down = next(matrix for matrix in find_matrices(model) if matrix.role == "down")
    assert down.transposed
    assert down.shape == (32, 32)


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_experts_that_do_not_say_how_they_lie_are_read_by_the_hidden_size(family: str) -> None:
    model = build(family)
    told = find_matrices(model)
    for block in range(BLOCKS):
        del model.get_submodule(f"model.layers.{block}.mlp.experts").is_transposed
    assert find_matrices(model) == told


@families
def test_shares_input_is_what_a_forward_pass_shows(family: str) -> None:
    """Same key: the same tensor. Another key: another tensor."""
    model = build(family)
    matrices = plain_matrices(model)
    inputs, _ = record(model, [matrix.name for matrix in matrices])
    address_of_key: dict[str, set[int]] = defaultdict(set)
    for matrix in matrices:
        address_of_key[matrix.shares_input].add(inputs[matrix.name].data_ptr())
    assert all(len(addresses) == 1 for addresses in address_of_key.values()), address_of_key
    assert len(set.union(*address_of_key.values())) == len(address_of_key)


@pytest.mark.parametrize(("family", "keys"), [("llama", 4), ("gpt2", 4), ("phi3", 4), ("opt", 4), ("mixtral", 2 + 8)])
def test_number_of_inputs_of_a_block(family: str, keys: int) -> None:
    """Attention in, o, MLP in, down; each expert has an input and a down of its own."""
    in_block = [matrix for matrix in find_matrices(build(family)) if matrix.block == 0]
    assert len({matrix.shares_input for matrix in in_block}) == keys


def test_attention_and_mlp_read_their_own_inputs_also_side_by_side_in_one_module() -> None:
    block = nn.ModuleDict({leaf: nn.Linear(4, 6) for leaf in ("q_proj", "k_proj", "gate_proj", "up_proj")})
    q, k, gate, up = (matrix.shares_input for matrix in find_matrices(block))
    assert q == k != gate == up


def silence(model: nn.Module, matrices: Iterable[Matrix]) -> None:
    """Set matrices and their biases to zero."""
    for matrix in matrices:
        weight(model, matrix).zero_()
        if matrix.expert is None:
            bias = getattr(model.get_submodule(matrix.name), "bias", None)
        else:
            bias = dict(model.named_parameters()).get(f"{matrix.parameter}_bias")
            bias = None if bias is None else bias.detach()[matrix.expert]
        if bias is not None:
            bias.detach().zero_()


def blocks_that_are_identities(model: PreTrainedModel) -> list[bool]:
    blocks = decoder_blocks(model)
    names = [name for name, module in model.named_modules() if any(module is block for block in blocks)]
    inputs, outputs = record(model, names)
    return [torch.equal(inputs[name], outputs[name]) for name in names]


@families
def test_without_the_matrices_that_end_branches_every_block_is_an_identity(family: str) -> None:
    model = build(family)
    silence(model, [matrix for matrix in find_matrices(model) if matrix.ends_branch])
    assert blocks_that_are_identities(model) == [True] * BLOCKS


@families
def test_every_end_of_a_branch_is_needed_for_that_and_nothing_else_does_it(family: str) -> None:
    roles = {matrix.role for matrix in find_matrices(build(family)) if matrix.block is not None}
    ends = {matrix.role for matrix in find_matrices(build(family)) if matrix.ends_branch}
    assert ends == {"o", "down"}
    for silent in [ends - {end} for end in ends] + [{role} for role in roles - ends]:
        model = build(family)
        silence(model, [matrix for matrix in find_matrices(model) if matrix.role in silent])
        assert blocks_that_are_identities(model) == [False] * BLOCKS, silent


@families
def test_the_meta_device_gives_the_same_answer(family: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES[family]())
    assert find_matrices(model) == find_matrices(build(family))


def test_a_model_without_matrices_is_refused() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**GROUPED | {"num_hidden_layers": 0}))
    with pytest.raises(UsageError, match="no matrix found in LlamaForCausalLM") as caught:
        find_matrices(model)
    assert caught.value.hint


def test_a_tied_linear_layer_is_no_matrix() -> None:
    """Tied by the tensor, whatever the model's getters say."""
    model = nn.Module()
    model.embedding = nn.Embedding(10, 4)
    model.get_input_embeddings = lambda: model.embedding  # type: ignore[assignment]
    model.reader = nn.Linear(4, 10, bias=False)
    model.reader.weight = model.embedding.weight
    model.up_proj = nn.Linear(4, 8)
    assert [matrix.name for matrix in find_matrices(model)] == ["up_proj"]


@pytest.mark.parametrize(("leaf", "stack"), [("wg", "up_proj"), ("layer", "weight")])
def test_a_router_in_a_module_of_its_own_is_no_matrix(leaf: str, stack: str) -> None:
    """As of Hunyuan and JetMoE; a weight of a depthwise convolution stands for no experts."""
    mlp = nn.Module()
    mlp.gate = nn.ModuleDict({leaf: nn.Linear(8, 3, bias=False)})
    mlp.conv = nn.Conv1d(3, 3, 2, groups=3)
    assert [matrix.name for matrix in find_matrices(mlp)] == [f"gate.{leaf}"]
    mlp.other = nn.Linear(8, 4)
    mlp.experts = nn.Module()
    mlp.experts.is_transposed = False  # type: ignore[assignment]
    mlp.experts.register_parameter(stack, nn.Parameter(torch.randn(3, 6, 8)))
    assert f"gate.{leaf}" not in {matrix.name for matrix in find_matrices(mlp)}


def test_keys_and_values_without_queries_share_no_input() -> None:
    """As of RWKV, which mixes the input of each by itself."""
    mixer = nn.ModuleDict({leaf: nn.Linear(8, 8) for leaf in ("receptance", "key", "value")})
    assert len({matrix.shares_input for matrix in find_matrices(mixer)}) == 3
    mixer["query"] = nn.Linear(8, 8)
    assert len({matrix.shares_input for matrix in find_matrices(mixer)}) == 2


def test_the_step_of_a_state_space_is_no_matrix() -> None:
    """Its weight is multiplied with, and the module is not called."""
    mixer = nn.ModuleDict({"x_proj": nn.Linear(16, 4), "dt_proj": nn.Linear(2, 16)})
    assert [matrix.name for matrix in find_matrices(mixer)] == ["x_proj"]


def test_a_linear_router_and_a_row_are_no_matrices() -> None:
    """Routers of models with experts in a list, and a gate with one output."""
    mlp = nn.Module()
    mlp.gate = nn.Linear(8, 3, bias=False)
    mlp.shared_expert_gate = nn.Linear(8, 1, bias=False)
    mlp.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(8, 3), "w2": nn.Linear(3, 8)}) for _ in range(3))
    found = {(matrix.name, matrix.role) for matrix in find_matrices(mlp)}
    assert found == {(f"experts.{i}.{leaf}", role) for i in range(3) for leaf, role in (("w1", "gate"), ("w2", "down"))}


def test_a_matrix_beside_a_convolution_of_its_width_is_no_router() -> None:
    config = Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"])
    with torch.device("meta"):
        matrices = find_matrices(AutoModelForCausalLM.from_config(config))
    assert [m.name for m in matrices if ".conv." in m.name] == [
        "model.layers.0.conv.in_proj",
        "model.layers.0.conv.out_proj",
    ]


@pytest.mark.parametrize(
    ("leaf", "siblings", "role"),
    [
        ("q_proj", (), "q"),
        ("c_proj", ("c_attn", "c_proj"), "o"),
        ("c_proj", ("c_fc", "c_proj"), "down"),
        ("dense", ("query_key_value", "dense"), "o"),
        ("dense", ("q_proj", "k_proj", "v_proj", "dense"), "o"),
        ("dense", (), "down"),
        ("kv_a_proj_with_mqa", (), "kv_a_proj_with_mqa"),
    ],
)
def test_role_of(leaf: str, siblings: tuple[str, ...], role: str) -> None:
    assert role_of(leaf, siblings) == role


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("model.layers.11.self_attn.q_proj", 11),
        ("h.0", 0),
        ("3.weight", 3),
        ("model.layers.1.mlp.experts.7.w1", 1),
        ("model.experts2.w1", None),
        ("lm_head", None),
    ],
)
def test_block_of(path: str, block: int | None) -> None:
    assert block_of(path) == block


def test_a_conv1d_is_out_by_in() -> None:
    model = nn.Module()
    model.c_fc = Conv1D(12, 5)  # (out, in)
    (matrix,) = find_matrices(model)
    assert (matrix.shape, matrix.transposed) == ((12, 5), True)
