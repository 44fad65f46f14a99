from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lowrank_kit.data.blocks import TokenBlocks, token_blocks
from lowrank_kit.data.sources import Document
from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.evaluation.divergence import divergence

Build = Callable[..., LlamaForCausalLM]


@pytest.fixture(scope="module")
def blocks(tiny_texts: list[str], tiny_tokenizer: PreTrainedTokenizerFast) -> TokenBlocks:
    return token_blocks([Document("", text) for text in tiny_texts], tiny_tokenizer, 32, max_blocks=7)


def sharpened(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Random weights give nearly uniform distributions; these differ by whole nats."""
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def test_against_numpy_in_float64(tiny_llama: Build, blocks: TokenBlocks) -> None:
    model, reference = sharpened(tiny_llama(seed=1)), sharpened(tiny_llama(seed=2))
    with torch.no_grad():
        logits, reference_logits = (
            one(blocks.ids.long()).logits[:, :-1].double().numpy() for one in (model, reference)
        )
    p, q = (np.exp(one) / np.exp(one).sum(-1, keepdims=True) for one in (reference_logits, logits))
    nats = (p * np.log(p / q)).sum(-1)
    score = divergence(model, reference, blocks, batch_size=3)
    assert score.kl_nats > 1
    # Log-probabilities near -10 in float32 have errors near 1e-6.
    assert score.kl_nats == pytest.approx(nats.mean(), rel=1e-5)
    assert score.kl_nats_p99 == pytest.approx(np.quantile(nats, 0.99), rel=1e-5)
    assert score.top1_agreement == (logits.argmax(-1) == reference_logits.argmax(-1)).mean()
    assert score.num_tokens == 7 * 31
    assert divergence(reference, model, blocks).kl_nats != pytest.approx(score.kl_nats, rel=1e-3)


def test_a_model_does_not_diverge_from_itself(tiny_llama: Build, blocks: TokenBlocks) -> None:
    score = divergence(tiny_llama(), tiny_llama(), blocks)
    assert (score.kl_nats, score.kl_nats_p99, score.top1_agreement) == (0, 0, 1)


def test_both_models_get_their_training_flags_back(tiny_llama: Build, blocks: TokenBlocks) -> None:
    model, reference = tiny_llama(attention_dropout=0.5).train(), tiny_llama(attention_dropout=0.5)
    assert divergence(model, reference, blocks).kl_nats == 0
    assert model.training
    assert not reference.training


def test_vocabularies_of_two_sizes_are_refused(tiny_llama: Build, blocks: TokenBlocks) -> None:
    with pytest.raises(UsageError, match=r"has 384 tokens and the reference .* 400"):
        divergence(tiny_llama(), tiny_llama(vocab_size=400), blocks)


def test_a_non_finite_divergence_names_the_block(tiny_llama: Build) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[300] = math.nan
    ids = torch.zeros(5, 8, dtype=torch.int32)
    ids[3, 2] = 300
    with pytest.raises(LowRankError, match="not finite on block 3 of 5"):
        divergence(model, tiny_llama(), TokenBlocks(ids, 1.0), batch_size=2)


def test_blocks_that_do_not_suit_are_refused(tiny_llama: Build) -> None:
    long = TokenBlocks(torch.zeros(1, 129, dtype=torch.int32), 1.0)
    with pytest.raises(UsageError, match="longer than the context"):
        divergence(tiny_llama(max_position_embeddings=256), tiny_llama(), long)
