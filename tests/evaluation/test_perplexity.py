from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from lowrank_kit.data.blocks import TokenBlocks, token_blocks
from lowrank_kit.data.sources import Document
from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.evaluation.perplexity import perplexity

Build = Callable[..., LlamaForCausalLM]


@pytest.fixture(scope="module")
def blocks(tiny_texts: list[str], tiny_tokenizer: PreTrainedTokenizerFast) -> TokenBlocks:
    return token_blocks([Document("", text) for text in tiny_texts], tiny_tokenizer, 32, max_blocks=7)


def test_it_is_the_loss_that_transformers_computes(tiny_llama: Build, blocks: TokenBlocks) -> None:
    model = tiny_llama()
    with torch.no_grad():
        losses = [model(ids[None], labels=ids[None]).loss.double().item() for ids in blocks.ids.long()]
    expected = sum(losses) / len(losses)  # every block predicts the same number of tokens
    score = perplexity(model, blocks, batch_size=3)
    # Both are float32 losses: a few units in the last of 24 bits.
    assert score.loss_nats == pytest.approx(expected, rel=1e-6)
    assert score.perplexity == math.exp(score.loss_nats)
    assert score.num_tokens == 7 * 31
    assert score.sha256 == blocks.sha256


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity(
    tiny_llama: Build, blocks: TokenBlocks, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    score = perplexity(model, blocks)
    assert score.perplexity == pytest.approx(len(tiny_tokenizer), rel=1e-6)
    assert score.bits_per_byte == pytest.approx(math.log2(len(tiny_tokenizer)) / blocks.bytes_per_token, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_the_batch_size_does_not_matter(tiny_llama: Build, blocks: TokenBlocks, batch_size: int) -> None:
    model = tiny_llama()
    # Matrix products of other shapes round differently, in float32.
    assert perplexity(model, blocks, batch_size=batch_size).loss_nats == pytest.approx(
        perplexity(model, blocks, batch_size=2).loss_nats, rel=1e-6
    )


def test_a_bfloat16_model_is_scored_in_float32(tiny_llama: Build, blocks: TokenBlocks) -> None:
    model = tiny_llama().bfloat16()
    ids = blocks.ids.long()
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    # The same logits, so only the float32 loss differs; a bfloat16 one would be off by 1e-3.
    assert perplexity(model, blocks, batch_size=len(blocks)).loss_nats == pytest.approx(expected, rel=1e-6)


def test_dropout_is_off_and_every_training_flag_is_put_back(tiny_llama: Build, blocks: TokenBlocks) -> None:
    model = tiny_llama(attention_dropout=0.5)
    expected = perplexity(model, blocks)
    assert not model.training
    model.train()
    model.model.layers[1].eval()
    flags = [module.training for module in model.modules()]
    inference: list[bool] = []
    model.register_forward_hook(lambda *_: inference.append(torch.is_inference_mode_enabled()))
    assert perplexity(model, blocks) == expected
    assert inference == [True]
    assert [module.training for module in model.modules()] == flags
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_a_non_finite_loss_names_the_model_and_the_block(tiny_llama: Build) -> None:
    model = tiny_llama().train()
    with torch.no_grad():
        model.model.embed_tokens.weight[300] = math.nan
    ids = torch.zeros(5, 8, dtype=torch.int32)
    ids[3, 2] = 300
    with pytest.raises(LowRankError, match="the loss of LlamaForCausalLM is nan on block 3 of 5") as caught:
        perplexity(model, TokenBlocks(ids, 1.0), batch_size=2)
    assert caught.value.exit_code == 1
    assert model.training


def test_a_finite_loss_can_have_an_infinite_perplexity(tiny_llama: Build, blocks: TokenBlocks) -> None:
    model = tiny_llama()
    torch.nn.init.constant_(model.model.norm.weight, 1e5)
    score = perplexity(model, blocks)
    assert math.isfinite(score.loss_nats)
    assert score.perplexity == math.inf


def test_blocks_of_another_tokenizer_or_too_long_are_refused(tiny_llama: Build) -> None:
    ids = torch.full((2, 8), 400, dtype=torch.int32)
    with pytest.raises(UsageError, match="token id 400, but LlamaForCausalLM knows 384 tokens"):
        perplexity(tiny_llama(), TokenBlocks(ids, 1.0))
    with pytest.raises(UsageError, match=r"blocks of 129 tokens are longer than the context of .*, 128"):
        perplexity(tiny_llama(), TokenBlocks(torch.zeros(1, 129, dtype=torch.int32), 1.0))
    # GPT-2 calls it n_positions, and would fail inside its position embedding.
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=384, n_positions=16, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(UsageError, match="blocks of 17 tokens are longer"):
        perplexity(gpt2, TokenBlocks(torch.zeros(1, 17, dtype=torch.int32), 1.0))
