"""A compressed folder loads with plain from_pretrained, as the model it says it is, for every family."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D

import lowrank_kit
from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.loading import load_model, load_tokenizer
from lowrank_kit.checkpoint.quantizer import LowRankConfig
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.layers import LAYERS, LowRankLinear, LowRankStack, PivotedLinear
from lowrank_kit.optim import parameter_groups
from tests.families import FAMILIES, build, token_ids

KEEP = 0.6
Layer = LowRankLinear | PivotedLinear | LowRankStack
both_forms = pytest.mark.parametrize("form", LAYERS)
KEEP_OF_EXPERTS = {"gpt_oss": 0.94}  # which stay dense, and are most of it
EXPERTS = ("mixtral", "qwen3_moe")
# float32 logits of size 4: W x and B (A x) differ by some hundred roundings of 2^-24; a wrong factor moves them by 0.1.
LOGITS_ATOL = 3e-5
# Small enough that every family is spread over several files.
SHARD_BYTES = 20_000


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """`folders(family, form="factors")`: the dense folder and the one compressed from it, made once."""
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def make(family: str, form: str = "factors") -> tuple[Path, Path]:
        if (family, form) not in made:
            root = tmp_path_factory.mktemp(family)
            build(family).save_pretrained(root / "dense")
            keep = KEEP_OF_EXPERTS.get(family, KEEP)
            settings = CompressSettings(keep=keep, objective="plain", form=form, max_shard_bytes=SHARD_BYTES)
            compress(root / "dense", root / "compressed", settings)
            made[family, form] = root / "dense", root / "compressed"
        return made[family, form]

    return make


@pytest.fixture
def compressed(folders: Callable[..., tuple[Path, Path]]) -> Path:
    return folders("llama")[1]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=token_ids(), use_cache=False).logits


def low_rank_layers(model: nn.Module) -> dict[str, Layer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Layer)}


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@both_forms
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_dense_model_with_BA_for_W(
    family: str, form: str, folders: Callable[..., tuple[Path, Path]]
) -> None:
    dense_folder, compressed_folder = folders(family, form)
    assert len(list(compressed_folder.glob("*.safetensors"))) > 1
    model, found = AutoModelForCausalLM.from_pretrained(compressed_folder, output_loading_info=True)
    assert not any(found.values())
    dense = AutoModelForCausalLM.from_pretrained(dense_folder)
    before = logits(dense)
    layers = low_rank_layers(model)
    units = [unit for unit in Checkpoint.open(dense_folder).units() if not unit.reason]
    names = {unit.matrix.name: unit.matrix.name.removesuffix("_proj" * (unit.count > 1)) for unit in units}
    assert set(layers) == set(names.values())
    assert {type(layer) for layer in layers.values()} == {LAYERS[form], *[LowRankStack] * (family in EXPERTS)}
    for name, layer in ((name, layers[path]) for name, path in names.items()):
        assert layer.rank == model.config.quantization_config.matrices[name]["rank"]
        if isinstance(layer, LowRankStack):
            with torch.no_grad():
                W, BA = dense.get_parameter(name), layer.dense_weight()
                best = torch.linalg.svdvals(W.double())[:, layer.rank :].norm(dim=1)
                assert torch.allclose((W - BA).double().flatten(1).norm(dim=1), best, rtol=1e-4)
                W.copy_(BA)
            continue
        old = dense.get_submodule(name)
        with torch.no_grad():
            stored_W, BA = old.weight, layer.dense_weight()
            W = stored_W.mT if isinstance(old, Conv1D) else stored_W
            # The best of its rank, up to float32: a transposed or permuted one is worse by far.
            best = torch.linalg.svdvals(W.double())[layer.rank :].norm()
            assert torch.isclose((W - BA).double().norm(), best, rtol=1e-4)
            W.copy_(BA)
        bias = layer.bias if isinstance(layer, PivotedLinear) else layer.B.bias
        assert (bias is None) == (old.bias is None)
        assert bias is None or torch.equal(old.bias, bias)
    expected = logits(dense)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=LOGITS_ATOL)
    # The comparison says something: the factors are not the whole of the weights.
    assert (expected - before).abs().max() > 0.1


@both_forms
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_again_it_is_the_same(
    family: str, form: str, folders: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    _, folder = folders(family, form)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    again, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    before, after = (
        json.loads((path / "config.json").read_text())["quantization_config"] for path in (folder, tmp_path)
    )
    assert after == before
    assert after["format_version"] == (3 if family in EXPERTS else {"factors": 1, "pivoted": 2}[form])
    assert {entry["form"] for entry in after["matrices"].values()} == {form, *["stacked"] * (family in EXPERTS)}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_keep_1_is_the_dense_model_exactly(
    family: str, folders: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    dense_folder, _ = folders(family)
    compress(dense_folder, tmp_path / "whole", CompressSettings(keep=1.0, objective="whiten"))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert "quantization_config" not in json.loads((tmp_path / "whole" / "config.json").read_text())
    assert torch.equal(logits(whole), logits(AutoModelForCausalLM.from_pretrained(dense_folder)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("device_map", [None, "auto", "cpu"])
def test_device_map(family: str, device_map: str | None, folders: Callable[..., tuple[Path, Path]]) -> None:
    _, folder = folders(family)
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(folder)))


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "auto"])
def test_dtype(dtype: torch.dtype | str, form: str, folders: Callable[..., tuple[Path, Path]]) -> None:
    _, compressed = folders("llama", form)
    model = AutoModelForCausalLM.from_pretrained(compressed, dtype=dtype)
    wanted = torch.float32 if dtype == "auto" else dtype
    found = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {dtype for name, dtype in found.items() if not name.endswith(".index")} == {wanted}
    assert {dtype for name, dtype in found.items() if name.endswith(".index")} <= {torch.int32}
    expected = logits(AutoModelForCausalLM.from_pretrained(compressed))
    # bfloat16 has 8 bits: two blocks deep some 2 % of logits of size 4. The pivoted form is some 2.5 times as far off.
    atol = {"factors": 0.15, "pivoted": 0.3}[form]
    torch.testing.assert_close(logits(model).float(), expected, rtol=0, atol=0 if wanted == torch.float32 else atol)


@both_forms
def test_generates(form: str, folders: Callable[..., tuple[Path, Path]]) -> None:
    _, folder = folders("llama", form)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = token_ids(1, 5)
    generated = model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    for end in range(5, 11):  # the same greedily, without a cache
        with torch.inference_mode():
            scores = model(input_ids=generated[:, :end], use_cache=False).logits[0, -1]
            scores[model.generation_config.eos_token_id] = -torch.inf  # as min_new_tokens has it
        assert scores.argmax() == generated[0, end]


@both_forms
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_without_a_head_or_with_another(family: str, form: str, folders: Callable[..., tuple[Path, Path]]) -> None:
    _, folder = folders(family, form)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    base = AutoModel.from_pretrained(folder)
    assert len(low_rank_layers(base)) == len(low_rank_layers(whole))
    with torch.inference_mode():
        expected = whole(input_ids=token_ids(), output_hidden_states=True).hidden_states[-1]
        assert torch.equal(base(input_ids=token_ids()).last_hidden_state, expected)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    assert len(low_rank_layers(classifier)) == len(low_rank_layers(whole))


@pytest.mark.parametrize("family", ["gpt2", "gemma"])
def test_tied_embeddings_stay_tied(family: str, folders: Callable[..., tuple[Path, Path]]) -> None:
    _, folder = folders(family)
    assert "lm_head.weight" not in stored(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert isinstance(model.get_output_embeddings(), nn.Linear)


def test_the_dtype_of_the_source_is_kept(tmp_path: Path) -> None:
    build("qwen3").bfloat16().save_pretrained(tmp_path / "dense")
    report = compress(tmp_path / "dense", tmp_path / "compressed", CompressSettings(keep=0.6, objective="plain"))
    assert {tensor.dtype for tensor in stored(tmp_path / "compressed").values()} == {torch.bfloat16}
    assert report["totals"]["bytes_after"] == (tmp_path / "compressed" / "model.safetensors").stat().st_size
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "compressed")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}


def test_a_folder_without_the_base_prefix(tmp_path: Path, folders: Callable[..., tuple[Path, Path]]) -> None:
    """The hub's gpt2 has names such as h.0.attn.c_attn.weight."""
    dense, compressed = folders("gpt2")
    shutil.copytree(dense, tmp_path / "dense")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in stored(dense).items()}
    save_file(tensors, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    compress(tmp_path / "dense", tmp_path / "out", CompressSettings(keep=KEEP, objective="plain"))
    assert "h.0.attn.c_attn.A.weight" in stored(tmp_path / "out")
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values())
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(compressed)))


@both_forms
def test_training_it(form: str, folders: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders("llama", form)[1])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids(4)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name, _ in model.named_parameters()}
    model.save_pretrained(tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


@both_forms
def test_its_factors_are_matrices_to_the_optimizer(form: str, folders: Callable[..., tuple[Path, Path]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders("llama", form)[1])
    wanted = {id(p) for layer in low_rank_layers(model).values() for p in layer.parameters()}
    groups = {group["name"]: group for group in parameter_groups(model, rule="numuon", lr=1e-3)}
    assert {id(p) for p in groups["matrices"]["params"]} == wanted


def test_nothing_of_the_quantizer_stays(compressed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed)
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model, "quantization_method")
    assert not model.is_quantized
    # All that saving needs.
    assert isinstance(model.config.quantization_config, LowRankConfig)


def test_the_tensor_parallel_plan_splits_the_factors(compressed: Path) -> None:
    plan = AutoModelForCausalLM.from_pretrained(compressed).tp_plan
    for role in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        assert plan[f"model.layers.*.{role}.B"] == "colwise"
    for role in ("self_attn.o_proj", "mlp.down_proj"):
        assert plan[f"model.layers.*.{role}.A"] == "rowwise"
    # Else the sentinel would be split, and the sum of the shards taken twice.
    assert not [name for name in plan if name.endswith("_proj")]


def changed_config(folder: Path, copy: Path, **changes: object) -> Path:
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] |= changes
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"format_version": 5},
            r"format version 5, this lowrank-kit reads up to 4\nhint: pip install --upgrade lowrank-",
        ),
        ({"format_version": "new"}, "format version 'new'"),
        ({"matrices": {"model.layers.0.mlp.up_proj": {"rank": 4, "form": "folded"}}}, "up_proj .* form 'folded'"),
        (
            {"matrices": {"model.layers.0.mlp.up_proj": {"rank": 48, "form": "pivoted"}}},
            "up_proj has 48 outputs: a pivoted layer of rank 48",
        ),
        ({"matrices": {"model.layers.0.mlp.up_proj": {"rank": 0, "form": "factors"}}}, "up_proj has rank 0"),
        ({"matrices": {"model.layers.7.mlp.up_proj": {"rank": 4, "form": "factors"}}}, "no such module"),
    ],
    ids=["newer", "no-number", "form", "no-others", "rank", "module"],
)
def test_a_config_that_it_cannot_read(
    compressed: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    folder = changed_config(compressed, tmp_path / "changed", **changes)
    with pytest.raises(lowrank_kit.errors.LowRankError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_extra_keys_of_the_config_are_kept(compressed: Path, tmp_path: Path) -> None:
    folder = changed_config(compressed, tmp_path / "changed", made_by="somebody")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["quantization_config"]["made_by"] == "somebody"


def test_quantizing_on_the_fly_is_refused(folders: Callable[..., tuple[Path, Path]]) -> None:
    dense, _ = folders("llama")
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=LowRankConfig())


# The package and the import that registers it

LOAD = "from transformers import AutoModelForCausalLM; m = AutoModelForCausalLM.from_pretrained({folder!r}); "
COUNT = "print(sum(type(layer).__name__ in ('LowRankLinear', 'PivotedLinear') for layer in m.modules()))"


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")


@pytest.mark.parametrize(
    "order",
    [
        "import lowrank_kit, transformers; ",
        # And once more, as in a notebook: registered already.
        "import transformers.quantizers.auto, lowrank_kit, importlib; importlib.reload(lowrank_kit); ",
    ],
    ids=["before-transformers", "after-transformers"],
)
def test_either_order_of_imports(order: str, compressed: Path) -> None:
    done = python(order + LOAD.format(folder=str(compressed)) + COUNT)
    assert done.stdout == "14\n", done.stderr


@both_forms
def test_without_the_import_loading_fails_loudly(form: str, folders: Callable[..., tuple[Path, Path]]) -> None:
    done = python(LOAD.format(folder=str(folders("llama", form)[1])) + COUNT)
    assert done.returncode != 0
    assert done.stdout == ""
    assert "mismatch" in done.stderr.lower()


def test_the_import_alone_is_light() -> None:
    code = (
        "import sys, lowrank_kit; print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    assert python(code).stdout == "[]\n"


def test_public_names() -> None:
    assert all(getattr(lowrank_kit, name).__name__ == name for name in lowrank_kit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'LowRank'"):
        _ = lowrank_kit.LowRank


# What our own verbs load with


def test_load_model_loads_what_is_whole(compressed: Path) -> None:
    model = load_model(Checkpoint.open(compressed), device=torch.device("cpu"), dtype=torch.bfloat16)
    assert len(low_rank_layers(model)) == 14
    assert model.dtype == torch.bfloat16
    assert not model.training


def test_load_model_refuses_missing_tensors(tiny_llama_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama_folder, tmp_path / "model")
    tensors = stored(tiny_llama_folder)
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(lowrank_kit.errors.LowRankError, match=r"1 tensors of LlamaForCausalLM are missing, .*norm"):
        load_model(Checkpoint.open(tmp_path / "model"), device=torch.device("cpu"))


@pytest.mark.parametrize("family", ["llama", "qwen3"], ids=["raises", "loads-empty"])
def test_load_tokenizer_refuses_a_folder_without(family: str, folders: Callable[..., tuple[Path, Path]]) -> None:
    dense, _ = folders(family)
    with pytest.raises(lowrank_kit.errors.UsageError, match="no tokenizer"):
        load_tokenizer(dense)


def test_load_tokenizer(tiny_llama_folder: Path) -> None:
    assert len(load_tokenizer(tiny_llama_folder)) == 384


def test_a_saved_state_dict_is_the_given_one(compressed: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed)
    assert isinstance(model, LlamaForCausalLM)
    given = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=given)
    assert all(torch.equal(tensor, given[name]) for name, tensor in stored(tmp_path).items())
