"""Grams of gradients are those of the loss of tokens drawn from the model, and tell what a change costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from lowrank_kit.compression.statistics import input_grams, input_grams_and_loss, mean_loss, output_grams
from lowrank_kit.data.blocks import TokenBlocks
from lowrank_kit.errors import LowRankError
from lowrank_kit.matrices import Matrix, find_matrices
from tests.families import FAMILIES, VOCAB_SIZE, build, token_ids

IDS = token_ids(batch=5, length=12)
BLOCKS = TokenBlocks(IDS.int(), bytes_per_token=1.0)
BATCH = 2


def plain_matrices(model: nn.Module) -> list[Matrix]:
    return [matrix for matrix in find_matrices(model) if matrix.expert is None]


def drawn(model: PreTrainedModel, seed: int) -> Tensor:
    """The tokens that `output_grams` draws, [N, T]: those of a sequence by its number, whatever the batches."""
    generator = torch.Generator()
    with torch.no_grad():
        p_NTV = model(input_ids=IDS, use_cache=False).logits.log_softmax(-1).exp()
    parts = []
    for number, p_TV in enumerate(p_NTV):
        generator.manual_seed(seed + 1_000_003 * number)
        parts.append(torch.multinomial(p_TV, 1, generator=generator).flatten())
    return torch.stack(parts)


def gradients(model: PreTrainedModel, names: list[str], targets: Tensor) -> dict[str, Tensor]:
    """Gradient of the summed loss by what each module gives, all of IDS at once: [tokens, out] float64."""
    outputs: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: outputs.__setitem__(name, output)
        )
        for name in names
    ]
    logits = model(input_ids=IDS, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    found = torch.autograd.grad(loss, [outputs[name] for name in names])
    for handle in handles:
        handle.remove()
    return {name: g.double().flatten(0, -2) for name, g in zip(names, found, strict=True)}


@pytest.mark.parametrize("family", FAMILIES)
def test_grams_of_the_gradient_of_every_output(family: str) -> None:
    model = build(family)
    names = [matrix.name for matrix in plain_matrices(model)]
    grams = output_grams(model, plain_matrices(model), BLOCKS, batch_size=BATCH, seed=3)
    assert set(grams) == set(names)
    expected = gradients(model, names, drawn(model, seed=3))
    for name in names:
        g = expected[name]
        assert grams[name].dtype == torch.float64
        assert len(g) == IDS.numel()
        # Another batch size and another way through autograd, in float32.
        torch.testing.assert_close(grams[name], g.mT @ g, rtol=0, atol=1e-4 * (g.mT @ g).abs().max().item())


def test_seeds() -> None:
    model = build("llama")
    first, again, other = (output_grams(model, plain_matrices(model), BLOCKS, seed=seed) for seed in (1, 1, 2))
    for name, gram in first.items():
        assert torch.equal(gram, again[name])
        assert not torch.allclose(gram, other[name], rtol=0.01)


def test_the_global_random_state_is_left_alone() -> None:
    model = build("llama")
    before = torch.get_rng_state()
    output_grams(model, plain_matrices(model), BLOCKS)
    assert torch.equal(torch.get_rng_state(), before)


def state(model: nn.Module) -> list[object]:
    """What a measurement may not leave changed."""
    hooks = [
        len(hooks) for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)
    ]
    flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    return [hooks, flags, [module.training for module in model.modules()]]


def partly_frozen() -> PreTrainedModel:
    model = build("llama").train()
    model.model.layers[1].eval()
    model.model.layers[0].requires_grad_(False)
    return model


def test_the_model_is_left_as_it_was() -> None:
    model = partly_frozen()
    before = state(model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    output_grams(model, plain_matrices(model), BLOCKS)
    assert state(model) == before
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_named(value: float) -> None:
    """No activation of a matrix shows a broken head."""
    model = partly_frozen()
    with torch.no_grad():
        model.lm_head.weight[VOCAB_SIZE - 1, 0] = value
    before = state(model)
    with pytest.raises(LowRankError, match="NaN or Inf in the logits of LlamaForCausalLM"):
        output_grams(model, plain_matrices(model), BLOCKS)
    assert state(model) == before


def test_a_gradient_that_overflows_is_named_and_the_model_left_as_it_was() -> None:
    model = partly_frozen()

    def magnify(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(lambda g: 1e30 * g)

    model.model.norm.register_forward_hook(magnify)
    before = state(model)
    with pytest.raises(
        LowRankError, match=r"NaN or Inf in the gradient of model.layers.1.mlp.down_proj: 0 of 1920 .*e\+"
    ):
        output_grams(model, plain_matrices(model), BLOCKS)
    assert state(model) == before


def test_matrices_that_no_gradient_reaches_are_named() -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=100, n_positions=16, add_cross_attention=True)
    model = GPT2LMHeadModel(config)  # without an encoder, cross-attention never runs
    with pytest.raises(LowRankError, match=r"reached 4 of 7 outputs, not transformer.h.0.crossattention"):
        output_grams(model, plain_matrices(model), BLOCKS)


def divergence(model: PreTrainedModel, other: PreTrainedModel, ids: Tensor) -> float:
    """KL(p || p') per token, in float64."""
    with torch.no_grad():
        log_p, log_q = (m.double()(input_ids=ids, use_cache=False).logits.log_softmax(-1) for m in (model, other))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.up_proj"])
def test_the_second_order_forecast_of_a_small_change(name: str) -> None:
    """1/2 tr(G dW H dW^T) / N^2 is the divergence of the predictions, errors of tokens taken to be independent."""
    ids = token_ids(batch=64, length=16, seed=1)
    blocks = TokenBlocks(ids.int(), bytes_per_token=1.0)
    model = build("llama")
    (matrix,) = [m for m in plain_matrices(model) if m.name == name]
    G = output_grams(model, [matrix], blocks, seed=0)[name]
    H = input_grams(model, [matrix], blocks)[matrix.shares_input]
    ratios = []
    for seed in range(4):
        other = build("llama")
        weight = other.get_submodule(name).weight
        change = 1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            weight.add_(change)
        change = change.double()
        forecast = 0.5 * (G @ change @ H * change).sum().item() / ids.numel() ** 2
        ratios.append(divergence(build("llama"), other, ids) / forecast)
    # 0.78 and 0.97, of four changes each between 0.68 and 1.03.
    assert 0.6 < sum(ratios) / len(ratios) < 1.5


def test_the_loss_is_that_of_the_next_token() -> None:
    model = build("llama").train()
    loss = mean_loss(model, BLOCKS, batch_size=BATCH)
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS, labels=IDS, use_cache=False).loss.item()
    assert loss == pytest.approx(expected, rel=1e-5)


def test_grams_and_loss_in_one_pass_are_those_of_two() -> None:
    model = build("llama").train()
    before = state(model)
    grams, loss = input_grams_and_loss(model, plain_matrices(model), BLOCKS, batch_size=BATCH)
    assert state(model) == before
    expected = input_grams(model, plain_matrices(model), BLOCKS, batch_size=BATCH)
    assert grams.keys() == expected.keys()
    assert all(torch.equal(gram, expected[key]) for key, gram in grams.items())
    assert loss == mean_loss(model, BLOCKS, batch_size=BATCH)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[VOCAB_SIZE - 1, 0] = torch.nan
    with pytest.raises(LowRankError, match="loss of LlamaForCausalLM on the check text is nan"):
        mean_loss(model, BLOCKS)
