"""Stacked inputs: the same outputs, one product for all that read the same, and no way to save them by mistake."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from lowrank_kit.errors import LowRankError
from lowrank_kit.layers import PivotedLinear, exchange
from lowrank_kit.layers.fused import StackedInputs, StackedPart, fuse

RANKS = {"q_proj": 5, "k_proj": 3, "v_proj": 7, "gate_proj": 6, "up_proj": 4, "down_proj": 5}
IDS = torch.arange(24).reshape(2, 12)
cat = torch.cat


def compressed(pivoted: tuple[str, ...] = (), *, bias: bool = False) -> PreTrainedModel:
    """Two blocks, all but "o" of low rank, each of another rank."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        attention_bias=bias,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    names = [name for name, module in model.named_modules() if name.rpartition(".")[2] in RANKS]
    for name in names:
        leaf = name.rpartition(".")[2]
        layer = exchange(model, name, RANKS[leaf], "pivoted" if leaf in pivoted else "factors")
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
        if isinstance(layer, PivotedLinear):
            layer.index.copy_(torch.randperm(layer.out_features))
    return model


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("pivoted", [(), ("q_proj", "up_proj"), tuple(RANKS)])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_stay_the_same(pivoted: tuple[str, ...], bias: bool) -> None:
    model = compressed(pivoted, bias=bias)
    torch.testing.assert_close(logits(fuse(copy.deepcopy(model))), logits(model))


def test_what_reads_the_same_is_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fuse(compressed())
    assert [module.ranks for module in model.modules() if isinstance(module, StackedInputs)] == [[5, 3, 7], [6, 4]] * 2
    seen: list[torch.Size] = []
    linear = nn.functional.linear

    def noted(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        seen.append(weight.shape)
        return linear(x, weight, *bias)

    monkeypatch.setattr(nn.functional, "linear", noted)
    logits(model)
    assert seen.count(torch.Size([15, 32])) == 2
    assert seen.count(torch.Size([10, 32])) == 2
    assert not {torch.Size([rank, 32]) for rank in (5, 3, 7, 6, 4)} & set(seen)


def test_another_tensor_gets_its_own_product() -> None:
    layer = fuse(compressed()).model.layers[0].self_attn
    plain = compressed().model.layers[0].self_attn
    x, y = torch.randn(1, 3, 32), torch.randn(1, 3, 32)
    with torch.no_grad():
        layer.q_proj(x)
        torch.testing.assert_close(layer.k_proj(y), plain.k_proj(y))
        torch.testing.assert_close(layer.v_proj(x), plain.v_proj(x))


def test_nothing_of_the_input_stays() -> None:
    model = fuse(compressed())
    logits(model)
    assert all(m._read is None and m._parts == () for m in model.modules() if isinstance(m, StackedInputs))


def test_moved_and_cast_like_any_module() -> None:
    model = compressed(("k_proj",))
    fused = fuse(copy.deepcopy(model)).to(torch.float64)
    torch.testing.assert_close(logits(fused), logits(model.to(torch.float64)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert logits(fuse(compressed())).isfinite().all()


@pytest.mark.parametrize("pivoted", [(), tuple(RANKS)])
def test_half_precision_is_as_good(pivoted: tuple[str, ...]) -> None:
    model = compressed(pivoted)
    exact, half = logits(model), copy.deepcopy(model).to(torch.bfloat16)
    plain, fused = logits(half), logits(fuse(copy.deepcopy(half)))
    assert fused.dtype == torch.bfloat16
    assert (fused - exact).square().mean() < 2 * (plain - exact).square().mean()


def test_a_fused_model_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(LowRankError, match="a fused model is for inference"):
        fuse(compressed()).save_pretrained(tmp_path / "model")


def test_wrapped_layers_are_left_alone() -> None:
    model = compressed()
    model.model.layers[0].mlp.gate_proj.A = nn.Sequential(model.model.layers[0].mlp.gate_proj.A)
    fused = fuse(model)
    assert not isinstance(fused.model.layers[0].mlp.up_proj.A, StackedPart)
    assert isinstance(fused.model.layers[1].mlp.up_proj.A, StackedPart)


def test_compiled_whole() -> None:
    model = fuse(compressed(("v_proj",)))
    forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(forward(IDS).logits, logits(compressed(("v_proj",))))
        torch.testing.assert_close(forward(IDS + 8).logits, logits(compressed(("v_proj",)), IDS + 8))


def test_greedy_decoding_is_the_same() -> None:
    model = compressed(("q_proj", "down_proj"))
    given = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(IDS, **given)
    assert torch.equal(fuse(model).generate(IDS, **given), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_many_tokens_are_not_moved(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = PivotedLinear(12, 10, 4, bias=bias)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    layer.index.copy_(torch.randperm(10))
    few, many = torch.randn(3, 12), torch.randn(2, 2, 12)
    with torch.no_grad():
        expected = layer(few), layer(many)
        fuse(nn.Sequential(layer))
        monkeypatch.setattr(torch, "cat", lambda parts, dim=0: pytest.fail("outputs moved") if dim else cat(parts))
        torch.testing.assert_close(layer(many), expected[1])
        with pytest.raises(pytest.fail.Exception, match="outputs moved"):
            layer(few)
        monkeypatch.undo()
        torch.testing.assert_close(layer(few), expected[0])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(many).dtype == torch.bfloat16
