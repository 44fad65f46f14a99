"""Blocks run one by one give what the model gives; a model that is no chain is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import OpenAIGPTConfig, PreTrainedModel

from lowrank_kit.compression.chain import Chain, block_paths, read_input
from lowrank_kit.compression.streams import Held
from lowrank_kit.errors import LowRankError
from lowrank_kit.matrices import block_path, find_matrices
from tests.families import BLOCKS, FAMILIES, GPT2, build, build_from, decoder_blocks, token_ids

# Five sequences: batches of two leave one over. The calls are seen on text of its own.
IDS = token_ids(batch=5, length=12)
SAMPLE = token_ids(batch=3, length=12, seed=7)


def paths_of(model: PreTrainedModel) -> list[str]:
    return block_paths(find_matrices(model))


def chain_of(model: PreTrainedModel, batch_size: int = 2, sample: Tensor = SAMPLE) -> Chain:
    return Chain(model, paths_of(model), sample, batch_size=batch_size)


def states(model: PreTrainedModel) -> list[Tensor]:
    """What enters the first block, and what each block gives, for all of IDS at once."""
    seen: list[Tensor] = []
    blocks = decoder_blocks(model)
    handles = [
        blocks[0].register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    ] + [
        block.register_forward_hook(
            lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
        for block in blocks
    ]
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def enter(chain: Chain) -> Tensor:
    with torch.no_grad():
        return torch.cat(list(chain.enter(IDS)))


def through(chain: Chain, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
    stream = chain.run_all(index, block, Held(hidden.clone()))
    return stream.rows(slice(0, len(stream)))


def hooks_left(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("batch_size", [2, 1, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_one_by_one_give_what_the_model_gives(family: str, batch_size: int) -> None:
    model = build(family)
    expected = states(model)
    chain = chain_of(model, batch_size)
    assert [chain.model.get_submodule(path) for path in chain.paths] == list(decoder_blocks(model))
    hidden = enter(chain)
    for index, path in enumerate(chain.paths):
        torch.testing.assert_close(hidden, expected[index], rtol=0, atol=1e-5)
        hidden = through(chain, index, model.get_submodule(path), hidden)
    torch.testing.assert_close(hidden, expected[BLOCKS], rtol=0, atol=1e-5)
    assert hooks_left(model) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_the_chain_is_all_that_the_model_goes_on_with(family: str) -> None:
    """Given to the model as the output of its last block, in a model with other blocks, it makes the same logits."""
    model = build(family)
    with torch.no_grad():
        logits = model(input_ids=IDS, use_cache=False).logits
    chain = chain_of(model)
    hidden = enter(chain)
    for index, path in enumerate(chain.paths):
        hidden = through(chain, index, model.get_submodule(path), hidden)

    with torch.no_grad():
        left = chain.leave(token_ids(batch=5, length=12, seed=3), hidden)
    torch.testing.assert_close(left, logits, rtol=0, atol=1e-4)
    assert all("forward" not in block.__dict__ for block in decoder_blocks(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_read_input_is_what_the_module_reads(family: str) -> None:
    model = build(family)
    matrices = [m for m in find_matrices(model) if m.expert is None and m.block is not None]
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(m.name).register_forward_pre_hook(
            lambda module, args, name=m.name: seen.__setitem__(name, args[0])
        )
        for m in matrices
    ]
    expected = states(model)
    for handle in handles:
        handle.remove()
    for m in matrices:
        assert m.block is not None
        chain = chain_of(model)  # that has not seen the size of the last batch
        path = chain.paths[m.block]
        block = model.get_submodule(path)
        read = list(read_input(chain, m.block, block, m.name.removeprefix(f"{path}."), Held(expected[m.block])))
        # OPT makes its MLP read tokens without sequences.
        flat = [batch.flatten(0, -2) for batch in read]
        assert [len(batch) for batch in flat] == [24, 24, 12]
        torch.testing.assert_close(torch.cat(flat), seen[m.name].flatten(0, -2), rtol=0, atol=1e-5)
    assert hooks_left(model) == 0


def test_a_block_in_place_of_another_is_run() -> None:
    """Also one that is not in the model, for another number of sequences than any seen before."""
    model = build("llama")
    chain = chain_of(model)
    entered = enter(chain)
    other = copy.deepcopy(model.get_submodule(chain.paths[0]))
    nn.init.zeros_(other.mlp.down_proj.weight)
    nn.init.zeros_(other.self_attn.o_proj.weight)
    assert torch.equal(through(chain, 0, other, entered), entered)
    assert not torch.equal(through(chain, 0, model.get_submodule(chain.paths[0]), entered), entered)


def test_run_trains_and_run_all_does_not() -> None:
    model = build("gpt2").train()
    chain = chain_of(model)
    block = model.get_submodule(chain.paths[0])
    entered = enter(chain)
    assert chain.run(0, block, entered[:2]).requires_grad
    first, again = (through(chain, 0, block, entered) for _ in range(2))
    assert torch.equal(first, again)  # no dropout
    assert not first.requires_grad
    assert all(module.training for module in model.modules())
    assert not torch.equal(chain.run(0, block, entered[:2]), chain.run(0, block, entered[:2]))


def test_a_path_that_is_not_reached_is_named_and_no_hook_left() -> None:
    model = build("gpt2")
    block = decoder_blocks(model)[1]
    block.unused = nn.Linear(32, 32)
    chain = chain_of(model)
    with pytest.raises(LowRankError, match=r"does not reach transformer.h.1.unused"):
        list(read_input(chain, 1, block, "unused", Held(enter(chain))))
    assert hooks_left(model) == 0


class Broken(Exception):
    """Raised in the middle of a forward pass."""


def test_no_hook_and_no_mode_is_left_after_an_exception() -> None:
    model = build("llama").train()
    chain = chain_of(model)
    block = model.get_submodule(chain.paths[1])
    entered = enter(chain)

    def fail(module: nn.Module, args: Any) -> None:
        raise Broken

    handles = [
        block.self_attn.q_proj.register_forward_pre_hook(fail),
        model.model.embed_tokens.register_forward_pre_hook(fail),
    ]
    with pytest.raises(Broken):
        enter(chain)
    with pytest.raises(Broken):
        through(chain, 1, block, entered)
    with pytest.raises(Broken):
        list(read_input(chain, 1, block, "mlp.down_proj", Held(entered)))
    with pytest.raises(Broken):
        chain_of(model)
    for handle in handles:
        handle.remove()
    assert hooks_left(model) == 0
    assert all(module.training for module in model.modules())


def scale_before(block: nn.Module) -> None:
    block.register_forward_pre_hook(lambda module, args: (1.5 * args[0], *args[1:]))


def hand_embeddings(model: PreTrainedModel) -> None:
    """Blocks are called with the token embeddings too, as those of Zamba and Gemma 3n are."""
    now: dict[str, Tensor] = {}
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: now.update(embeddings=output))
    decoder_blocks(model)[1].register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"original": now["embeddings"]}), with_kwargs=True
    )


def test_models_that_are_no_chain_are_refused() -> None:
    model = build("llama")
    scale_before(decoder_blocks(model)[1])
    with pytest.raises(
        LowRankError, match=r"LlamaForCausalLM changes the hidden states before model.layers.1: .* no chain"
    ):
        chain_of(model)
    model = build("llama")
    hand_embeddings(model)
    with pytest.raises(LowRankError, match=r"LlamaForCausalLM calls model.layers.1 with more of the text"):
        chain_of(model)
    model = build("llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(LowRankError, match=r"runs model.layers.0, model.layers.0, not model.layers.0: "):
        chain_of(model)
    assert hooks_left(model) == 0
    model = build("llama")
    decoder_blocks(model)[0].register_forward_pre_hook(lambda module, args: (args[0].unsqueeze(2), *args[1:]))
    with pytest.raises(LowRankError, match=r"runs several streams at once through model.layers.0, \[2, 12, 1, 32\]: "):
        chain_of(model)


def test_blocks_that_give_a_list() -> None:
    model = build_from(OpenAIGPTConfig(**GPT2))
    chain = chain_of(model)
    hidden = enter(chain)
    for index, path in enumerate(chain.paths):
        hidden = through(chain, index, model.get_submodule(path), hidden)
    with torch.no_grad():
        torch.testing.assert_close(chain.leave(IDS, hidden), model(input_ids=IDS).logits, rtol=0, atol=1e-5)


def test_blocks_in_another_order_are_refused() -> None:
    model = build("llama")
    with pytest.raises(
        LowRankError, match=r"runs model.layers.0, model.layers.1, not model.layers.1, model.layers.0: "
    ):
        Chain(model, paths_of(model)[::-1], SAMPLE, batch_size=2)


def test_a_sample_smaller_than_a_batch() -> None:
    model = build("llama")
    chain = chain_of(model, batch_size=8)
    assert chain.batch_size == len(SAMPLE)
    torch.testing.assert_close(enter(chain), states(model)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("model.layers.10.mlp.down_proj", "model.layers.10"),
        ("model.layers.1.mlp.experts.3.w1", "model.layers.1"),
        ("model.layers.1.mlp.experts.down_proj[3]", "model.layers.1"),
        ("transformer.h.0", "transformer.h.0"),
        ("layer2.norm1.0.fc", "layer2.norm1.0"),
        ("0.fc", "0"),
        ("12a.3.fc", "12a.3"),
    ],
)
def test_block_path(path: str, block: str) -> None:
    assert block_path(path) == block


@pytest.mark.parametrize("path", ["lm_head", "model.fc1", "experts.w1[3]", "model.3b.fc"])
def test_a_path_in_no_block(path: str) -> None:
    with pytest.raises(ValueError, match="lies in no block"):
        block_path(path)


def test_block_paths_are_in_the_order_of_the_blocks() -> None:
    for family in FAMILIES:
        model = build(family)
        blocks = list(decoder_blocks(model))
        paths = block_paths(reversed(find_matrices(model)))
        assert [model.get_submodule(path) for path in paths] == blocks
