"""A calibration knows the dense model on its text, and says what it does not know."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.compression.calibration import (
    Calibration,
    calibrate,
    dense_objective,
    foldable,
    inputs_evidence,
    loss_evidence,
)
from lowrank_kit.compression.objectives import OBJECTIVES, Options
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.compression.statistics import output_grams
from lowrank_kit.errors import LowRankError, UsageError
from tests.families import build

NUM_BLOCKS, BLOCK_TOKENS = 11, 32


def settings_for(text: str, **given: Any) -> CompressSettings:
    settings: dict[str, Any] = {"keep": 0.5, "text": text, "objective": "whiten", "batch_size": 4}
    settings |= {"check_blocks": 3, "refine_blocks": 150}
    return CompressSettings(**settings | {"calibration_blocks": NUM_BLOCKS, "block_tokens": BLOCK_TOKENS} | given)


@pytest.fixture(scope="module")
def checkpoint(tiny_llama_folder: Path) -> Checkpoint:
    return Checkpoint.open(tiny_llama_folder)


@pytest.fixture(scope="module")
def plain(checkpoint: Checkpoint, text_file: str) -> Calibration:
    """Without gradients."""
    return calibrate(checkpoint, settings_for(text_file), device="cpu")


@pytest.fixture(scope="module")
def curved(checkpoint: Checkpoint, text_file: str) -> Calibration:
    """With gradients."""
    return calibrate(checkpoint, settings_for(text_file, seed=5), curvature=True, device="cpu")


@pytest.fixture(scope="module")
def model(tiny_llama_folder: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder).double()


def input_gram(model: LlamaForCausalLM, name: str, ids: Tensor) -> Tensor:
    """X^T X of what a module reads, by a run in float64."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].flatten(0, 1))
    )
    with torch.no_grad():
        model(input_ids=ids.long(), use_cache=False)
    handle.remove()
    return seen[0].mT @ seen[0]


def test_statistics_are_those_of_the_dense_model(plain: Calibration, model: LlamaForCausalLM) -> None:
    ids = plain.texts.calibration.ids
    assert ids.shape == (NUM_BLOCKS, BLOCK_TOKENS)
    linear = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
    assert set(plain.statistics) == linear
    for name, found in plain.statistics.items():
        expected = input_gram(model, name, ids)
        assert found.tokens == NUM_BLOCKS * BLOCK_TOKENS
        assert found.gram is not None
        torch.testing.assert_close(found.gram, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        assert (found.output_gram, found.changed_gram, found.cross) == (None, None, None)
    assert set(plain.seconds) == {"text", "calibration", "check"}


def test_the_check_is_of_the_check_text(plain: Calibration, checkpoint: Checkpoint, model: LlamaForCausalLM) -> None:
    ids = plain.texts.check.ids.long()
    assert ids.shape == (3, BLOCK_TOKENS)
    assert set(plain.check_grams) == {stored.matrix.shares_input for stored in foldable(checkpoint)}
    for stored in foldable(checkpoint):
        expected = input_gram(model, stored.matrix.name, ids)
        torch.testing.assert_close(
            plain.check_grams[stored.matrix.shares_input], expected, rtol=0, atol=1e-5 * expected.abs().max().item()
        )
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss.item()
    assert plain.check_loss == pytest.approx(loss, rel=1e-6)


def test_curvature_is_of_the_same_text_and_the_seed(
    curved: Calibration, checkpoint: Checkpoint, tiny_llama_folder: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    matrices = [stored.matrix for stored in foldable(checkpoint)]
    expected = output_grams(model, matrices, curved.texts.calibration, batch_size=4, seed=5)
    for name, found in curved.statistics.items():
        assert found.output_gram is not None
        assert torch.equal(found.output_gram, expected[name])
    assert "curvature" in curved.seconds


@pytest.mark.parametrize(
    ("given", "curvature", "expected"),
    [
        ({"objective": "whiten"}, None, False),
        ({"objective": "whiten"}, True, True),
        ({"objective": "two-sided"}, None, True),
        ({"objective": "two-sided"}, False, False),
        ({"objective": "anchored-two-sided"}, None, True),
        ({"objective": "whiten", "allocation": "loss"}, None, True),
        ({"objective": "auto"}, None, True),
    ],
)
def test_curvature_only_when_it_is_asked_for(
    checkpoint: Checkpoint, text_file: str, given: dict[str, Any], curvature: bool | None, expected: bool
) -> None:
    calibration = calibrate(checkpoint, settings_for(text_file, **given), curvature=curvature, device="cpu")
    assert all((found.output_gram is not None) == expected for found in calibration.statistics.values())
    assert ("curvature" in calibration.seconds) == expected


@pytest.mark.parametrize(
    ("objective", "refine", "drawn"),
    [("whiten", None, False), ("whiten", "none", False), ("whiten", "e2e", True), ("auto", None, True)],
)
def test_text_to_refine_on_only_when_it_is_asked_for(
    checkpoint: Checkpoint, text_file: str, objective: str, refine: str | None, drawn: bool
) -> None:
    """It would leave less for the calibration where the text is short."""
    settings = settings_for(text_file, objective=objective, refine=refine)
    texts = calibrate(checkpoint, settings, curvature=False, device="cpu").texts
    assert (texts.refinement is not None) == drawn
    assert (len(texts.calibration) == NUM_BLOCKS) == (not drawn)


def test_factors_are_those_of_the_objective_and_made_once(curved: Calibration, checkpoint: Checkpoint) -> None:
    weights = {s.matrix.name: s.weight(t) for s in foldable(checkpoint) for _, t in checkpoint.tensors([s.tensors[0]])}
    for objective in ("plain", "scaled", "whiten", "two-sided"):
        options = Options(damping=0.3)
        factors = curved.factors(checkpoint, objective, options)
        assert factors.keys() == weights.keys()
        assert curved.factors(checkpoint, objective, Options(damping=0.3)) is factors
        for name, full in factors.items():
            expected = OBJECTIVES[objective].factorize(weights[name], curved.statistics[name], options)
            assert full.A.dtype == full.B.dtype == torch.float32
            torch.testing.assert_close(full.dense(), expected.dense().float(), atol=1e-5, rtol=0)
            torch.testing.assert_close(full.singular_values, expected.singular_values)
    other = curved.factors(checkpoint, "two-sided", Options(damping=0.9))
    assert other is not curved.factors(checkpoint, "two-sided", Options(damping=0.3))


def test_loss_evidence_is_the_second_order_increase(curved: Calibration, checkpoint: Checkpoint) -> None:
    """For factors made for these weights, and for others."""
    for objective in ("two-sided", "whiten"):
        factors = curved.factors(checkpoint, objective, Options())
        for name, evidence in loss_evidence(curved, checkpoint, objective, Options()).items():
            full, known = factors[name], curved.statistics[name]
            assert evidence.loss_scores is not None
            assert known.gram is not None
            assert known.output_gram is not None
            for rank in (1, 8, 15):
                lost = (full.dense() - full.truncate(rank).dense()).double()
                increase = (known.output_gram @ lost @ known.gram * lost).sum().item() / (2 * known.tokens**2)
                assert evidence.loss_scores[rank:].sum().item() == pytest.approx(increase, rel=1e-3)


def test_inputs_evidence_is_the_spectrum_of_the_outputs(plain: Calibration, checkpoint: Checkpoint) -> None:
    evidence = inputs_evidence(plain, checkpoint)
    for stored in foldable(checkpoint):
        ((_, tensor),) = checkpoint.tensors([stored.tensors[0]])
        W, gram = stored.weight(tensor).double(), plain.statistics[stored.matrix.name].gram
        assert gram is not None
        energies = torch.linalg.eigvalsh(W @ gram @ W.mT).flip(0)
        values = evidence[stored.matrix.name].weighted_values
        assert values is not None
        torch.testing.assert_close(values.square(), energies[: len(values)], rtol=0, atol=1e-9 * energies[0].item())


@pytest.mark.parametrize(
    ("objective", "dense"),
    [
        *((name, name) for name in ("plain", "scaled", "whiten", "two-sided")),
        ("anchored", "whiten"),
        ("anchored-two-sided", "two-sided"),
    ],
)
def test_dense_objective(objective: str, dense: str) -> None:
    assert dense_objective(objective) == dense


def message_of(error: pytest.ExceptionInfo[LowRankError]) -> str:
    return str(error.value)


def test_what_a_calibration_has_not_is_named(plain: Calibration, curved: Calibration, checkpoint: Checkpoint) -> None:
    with pytest.raises(UsageError) as error:
        plain.factors(checkpoint, "two-sided", Options())
    assert '"two-sided" needs output_gram, which this calibration has not' in message_of(error)
    assert "curvature=True" in message_of(error)
    with pytest.raises(UsageError) as error:
        loss_evidence(plain, checkpoint, "whiten", Options())
    assert 'allocation "loss" needs output_gram' in message_of(error)
    assert "curvature=True" in message_of(error)
    with pytest.raises(UsageError) as error:
        curved.factors(checkpoint, "anchored", Options())
    assert '"anchored" needs changed_gram, cross' in message_of(error)
    assert "block after block" in message_of(error)


def test_few_tokens_are_refused_with_the_number_needed(checkpoint: Checkpoint, text_file: str) -> None:
    """The widest input has 80 numbers: three blocks of 32 tokens, five of 16."""
    with pytest.raises(UsageError) as error:
        calibrate(checkpoint, settings_for(text_file, calibration_blocks=2), device="cpu")
    assert "64 tokens of calibration text for the 80 inputs of model.layers.0.mlp.down_proj" in message_of(error)
    assert "--calibration-blocks 3 or more (the text had 2 of 2 blocks)" in message_of(error)
    calibrate(checkpoint, settings_for(text_file, calibration_blocks=5, block_tokens=16), device="cpu")
    with pytest.raises(UsageError, match=re.escape("--calibration-blocks 5 or more (the text had 4 of 4 blocks)")):
        calibrate(checkpoint, settings_for(text_file, calibration_blocks=4, block_tokens=16), device="cpu")


def test_a_short_text_is_refused_with_what_it_had(
    checkpoint: Checkpoint, tmp_path: Path, tiny_texts: list[str]
) -> None:
    text = tmp_path / "short.txt"
    text.write_text(tiny_texts[0][:160])
    with pytest.raises(
        UsageError, match=r"--calibration-blocks 5 or more \(the text had \d of 11 blocks\), a longer text"
    ):
        calibrate(checkpoint, settings_for(str(text), block_tokens=16, check_blocks=1), device="cpu")


def test_a_text_of_one_token_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    text = tmp_path / "one.txt"
    text.write_text("a" * 5000)
    with pytest.raises(UsageError):
        calibrate(checkpoint, settings_for(str(text)), device="cpu")


def broken(folder: Path, target: Path, name: str, value: float) -> Checkpoint:
    """A copy of a model with one number of a tensor replaced."""
    shutil.copytree(folder, target)
    file = target / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[7] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return Checkpoint.open(target)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        # The first input that it reaches.
        ("model.layers.0.mlp.up_proj.weight", "NaN or Inf in the input of model.layers.0.mlp.down_proj"),
        ("lm_head.weight", "NaN or Inf in the logits|the loss of .* on the check text is nan"),
    ],
)
@pytest.mark.parametrize("curvature", [False, True])
def test_nan_in_the_weights_is_named_by_where_it_shows(
    tiny_llama_folder: Path, text_file: str, tmp_path: Path, name: str, message: str, curvature: bool
) -> None:
    checkpoint = broken(tiny_llama_folder, tmp_path / "broken", name, torch.nan)
    with pytest.raises(LowRankError, match=message):
        calibrate(checkpoint, settings_for(text_file), curvature=curvature, device="cpu")


def test_nan_in_a_matrix_is_named_when_it_is_factorized(
    tiny_llama_folder: Path, tmp_path: Path, plain: Calibration
) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    checkpoint = broken(tiny_llama_folder, tmp_path / "broken", name, torch.inf)
    unused = Calibration(
        checkpoint.path, plain.texts, plain.statistics, plain.check_grams, plain.check_loss, dict(plain.seconds)
    )
    with pytest.raises(LowRankError, match=rf"NaN or Inf in {name}: 1 of 512 numbers"):
        unused.factors(checkpoint, "whiten", Options())
    assert unused.nested == {}


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_weights_stored_the_other_way_round_and_experts(
    family: str, tmp_path: Path, text_file: str, tiny_tokenizer: PreTrainedTokenizerFast, widen: Callable[..., None]
) -> None:
    """GPT-2's [in, out] weights come as [out, in]; fused experts come together."""
    model = build(family)
    widen(model, len(tiny_tokenizer))
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    calibration = calibrate(checkpoint, settings_for(text_file), curvature=True, device="cpu")
    factors = calibration.factors(checkpoint, "two-sided", Options())
    assert len(calibration.statistics) == 8 + 4 * (family == "mixtral")
    for name, full in factors.items():
        weight = model.get_parameter(name if "experts" in name else f"{name}.weight").detach()
        torch.testing.assert_close(full.dense(), weight.mT if family == "gpt2" else weight, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def widen() -> Callable[..., None]:
    return lambda model, size: model.resize_token_embeddings(size, mean_resizing=False)
