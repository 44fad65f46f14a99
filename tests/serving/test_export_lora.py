"""What a model is less its base, as adapters that PEFT loads."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.matrices import find_matrices
from lowrank_kit.serving.export import export
from lowrank_kit.serving.exports.base import ExportSettings
from lowrank_kit.serving.exports.lora import WEIGHTS_FILE
from lowrank_kit.training.lora import load_adapters
from tests.compression.folders import once
from tests.families import build, token_ids
from tests.serving.folders import logits

RANK = 3


def trained(family: str) -> PreTrainedModel:
    """A model of a family whose matrices, but for experts, have changed by rank 3."""
    model = build(family)
    random = torch.Generator().manual_seed(1)
    for matrix in find_matrices(model):
        if matrix.expert is None:
            weight = model.get_parameter(matrix.parameter).data
            rows, columns = weight.shape
            change = torch.randn(rows, RANK, generator=random) @ torch.randn(RANK, columns, generator=random)
            weight += 0.1 * change
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`base(family)`: a dense folder. Read only."""
    return once(tmp_path_factory.mktemp("base"), lambda family, folder: build(family).save_pretrained(folder))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tuned(family)`: the same, changed by rank 3. Read only."""
    return once(tmp_path_factory.mktemp("tuned"), lambda family, folder: trained(family).save_pretrained(folder))


def settings(base: Path, rank: int | None = RANK, **others: Any) -> ExportSettings:
    return ExportSettings(to="lora", base=str(base), rank=rank, **others)


def adapted_logits(base: Path, adapters: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters)
    return model(input_ids=token_ids()).logits.detach()


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_base_and_adapters_are_the_model(
    family: str, base: Callable[[str], Path], tuned: Callable[[str], Path], tmp_path: Path
) -> None:
    record = export(tuned(family), tmp_path / "out", settings(base(family)))
    wanted = logits(tuned(family))
    assert (logits(base(family)) - wanted).abs().max() > 0.5
    torch.testing.assert_close(adapted_logits(base(family), tmp_path / "out"), wanted, rtol=0, atol=5e-5)
    assert record["result"]["relative_error"] < 1e-6
    assert record["notes"] == [
        f"adapters leave out {100 * record['result']['relative_error']:.2g} % of the differences, in norm, by rounding"
    ]
    assert (record["warnings"], record["result"]["left_out"]) == ([], {})
    assert len(record["matrices"]) == len(find_matrices(build(family)))
    assert {row["rank"] for row in record["matrices"]} == {RANK}


def test_a_lower_rank_leaves_out_what_it_says(
    base: Callable[[str], Path], tuned: Callable[[str], Path], tmp_path: Path
) -> None:
    record = export(tuned("llama"), tmp_path / "out", settings(base("llama"), rank=2))
    adapters, new, old = (
        load_file(file)
        for file in (tmp_path / "out" / WEIGHTS_FILE, *(f("llama") / "model.safetensors" for f in (tuned, base)))
    )
    left = total = 0.0
    for row in record["matrices"]:
        path = f"base_model.model.{row['name']}"
        made = adapters[f"{path}.lora_B.weight"].double() @ adapters[f"{path}.lora_A.weight"].double()
        difference = (new[f"{row['name']}.weight"] - old[f"{row['name']}.weight"]).double()
        values = torch.linalg.svdvals(difference)
        best = (values[2:].square().sum() / values.square().sum()).sqrt().item()
        assert row["relative_error"] == pytest.approx(best, rel=1e-4)
        assert ((difference - made).norm() / difference.norm()).item() == pytest.approx(best, rel=1e-4)
        left, total = left + (difference - made).square().sum().item(), total + difference.square().sum().item()
    assert record["result"]["relative_error"] == pytest.approx((left / total) ** 0.5, rel=1e-4)
    assert record["notes"][0].endswith("a higher --rank leaves out less")


def test_files_and_a_second_export(base: Callable[[str], Path], tuned: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        export(tuned("gpt2"), tmp_path / name, settings(base("gpt2"), dtype="bfloat16"))
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert set(one) >= {WEIGHTS_FILE, "adapter_config.json", "README.md", "export.json"}
    assert {tensor.dtype for tensor in load_file(tmp_path / "one" / WEIGHTS_FILE).values()} == {torch.bfloat16}
    config = json.loads(one["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["fan_in_fan_out"], config["r"]) == (str(base("gpt2")), True, RANK)
    assert config["lora_alpha"] == config["r"]
    assert "base_model: " + str(base("gpt2")) in one["README.md"].decode()
    # Ours takes them too, and refuses them for a base of other shapes.
    load_adapters(build("gpt2"), tmp_path / "one")
    with pytest.raises(UsageError, match="adapters for another base"):
        load_adapters(build("llama"), tmp_path / "one")


def test_of_a_compressed_model(base: Callable[[str], Path], tmp_path: Path) -> None:
    compress(base("gpt2"), tmp_path / "small", CompressSettings(keep=0.6, objective="plain"))
    record = export(tmp_path / "small", tmp_path / "out", settings(base("gpt2"), rank=32))
    assert record["result"]["left_out"] == {}
    found = adapted_logits(base("gpt2"), tmp_path / "out")
    torch.testing.assert_close(found, logits(tmp_path / "small"), rtol=0, atol=5e-5)


def test_what_no_adapter_holds_is_told(
    base: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = trained("mixtral")
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
        model.lm_head.weight[3] += 0.01
        model.model.layers[1].mlp.experts.down_proj[2].mul_(2)
    model.save_pretrained(tmp_path / "tuned")
    with caplog.at_level(logging.WARNING):
        record = export(tmp_path / "tuned", tmp_path / "out", settings(base("mixtral")))
    left_out = record["result"]["left_out"]
    expert = "model.layers.1.block_sparse_moe.experts.2.w2"
    assert set(left_out) == {"model.norm.weight", "lm_head.weight", expert}
    assert left_out["model.norm.weight"] == pytest.approx(0.5)
    assert left_out[expert] == pytest.approx(1.0)
    told = f"3 tensors differ that no adapter holds ({expert} by 1e+02 %, model.norm.weight by 50 %, lm_head.weight by "
    assert caplog.messages[0].startswith(told)
    assert caplog.messages[0].endswith(f": these stay as in {base('mixtral')}")
    assert "3 tensors differ too that adapters do not hold" in (tmp_path / "out" / "README.md").read_text()


def test_wrong_bases(base: Callable[[str], Path], tuned: Callable[[str], Path], tmp_path: Path) -> None:
    compress(base("llama"), tmp_path / "small", CompressSettings(keep=0.6, objective="plain"))
    wider = build("llama")
    wider.resize_token_embeddings(104)
    wider.save_pretrained(tmp_path / "wider")
    here = {path.name for path in tmp_path.iterdir()}
    for model, chosen, message in (
        (tuned("llama"), ExportSettings(to="lora"), "needs the model that the adapters are for\nhint: --base"),
        (tuned("llama"), settings(tmp_path / "small"), "small is of low rank itself, a base is a dense model\nhint: "),
        (tuned("llama"), settings(base("gpt2")), "is a llama and"),
        (tuned("llama"), settings(tuned("llama")), "is its own base"),
        (tuned("llama"), settings(tmp_path / "nosuch"), "no such model folder"),
        (tmp_path / "wider", settings(base("llama")), "model.embed_tokens.weight is 104 x 32 in"),
        (tuned("llama"), settings(base("llama"), rank=33), "rank 33 is more than any matrix has: at most 32"),
        (tuned("llama"), settings(base("llama"), rank=0), "rank must be at least 1, got 0\nhint: --rank 16"),
        (base("llama"), settings(base("llama_tied")), "differs from"),
    ):
        with pytest.raises(UsageError) as caught:
            export(model, tmp_path / "out", chosen)
        assert message in str(caught.value)
        assert caught.value.hint
    assert {path.name for path in tmp_path.iterdir()} == here


def test_not_a_number(base: Callable[[str], Path], tmp_path: Path) -> None:
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(LowRankError, match=r"NaN or Inf in what model\.layers\.1\.mlp\.up_proj is in"):
        export(tmp_path / "tuned", tmp_path / "out", settings(base("llama")))
    assert not (tmp_path / "out").exists()


def test_without_peft(
    base: Callable[[str], Path], tuned: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match="--to lora needs the package peft, which is not installed") as caught:
        export(tuned("llama"), tmp_path / "out", settings(base("llama")))
    assert caught.value.hint == "pip install 'lowrank-kit[lora]'"
