"""Every matrix of every family is found on disk, whatever it is called there; bad folders are refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM, T5Config

from lowrank_kit.checkpoint import folder as folder_module
from lowrank_kit.checkpoint import reading
from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.headers import SINGLE_FILE, ShardFile
from lowrank_kit.checkpoint.hub import resolve_model
from lowrank_kit.checkpoint.loading import load_model, load_tokenizer
from lowrank_kit.checkpoint.stacks import StoredStack
from lowrank_kit.checkpoint.stored import StoredMatrix
from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.matrices import find_matrices
from tests.families import FAMILIES, build

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def llama(tmp_path: Path, tiny_llama_folder: Path) -> Path:
    """A copy of the tiny Llama's folder, to be spoiled."""
    return shutil.copytree(tiny_llama_folder, tmp_path / "llama")


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE_FILE)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights(checkpoint: Checkpoint) -> Iterator[tuple[StoredMatrix, Tensor]]:
    on_disk = dict(checkpoint.tensors())
    for stored in checkpoint.matrices():
        yield stored, stored.weight(*(on_disk[name] for name in stored.tensors))


def halves(role: str, rows: int) -> slice:
    """Rows of a fused gate_up tensor that belong to a role."""
    return {"gate": slice(rows), "up": slice(rows, 2 * rows)}.get(role, slice(None))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_is_found_on_disk_with_its_numbers(tmp_path: Path, family: str) -> None:
    model = build(family)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    parameters, wanted = model.state_dict(), find_matrices(model)
    found = list(weights(Checkpoint.open(tmp_path)))

    for stored, W in found:
        matrix = stored.matrix
        W_model = parameters[matrix.parameter]
        if matrix.expert is not None:
            W_model = W_model[matrix.expert]
        if any(m.parameter == matrix.parameter and m.transposed for m in wanted):
            W_model = W_model.mT
        if len(W_model) == 2 * len(W):
            W_model = W_model[halves(matrix.role, len(W))]
        assert tuple(W.shape) == matrix.shape
        assert torch.equal(W, W_model), matrix.name
    assert sum(W.numel() for _, W in found) == sum(m.shape[0] * m.shape[1] for m in wanted)
    assert len({stored.matrix.name for stored, _ in found}) == len(found)


@pytest.mark.parametrize(
    ("family", "gate", "up"),
    [
        ("qwen3_moe", "mlp.experts.2.gate_proj", "mlp.experts.2.up_proj"),
        ("mixtral", "block_sparse_moe.experts.2.w1", "block_sparse_moe.experts.2.w3"),
    ],
)
def test_an_expert_stored_apart_is_a_matrix_of_its_own(tmp_path: Path, family: str, gate: str, up: str) -> None:
    build(family).save_pretrained(tmp_path)
    by_name = {stored.matrix.name: stored for stored in Checkpoint.open(tmp_path).matrices()}
    halves = [by_name[f"model.layers.1.{name}"] for name in (gate, up)]
    assert [stored.matrix.role for stored in halves] == ["gate", "up"]
    for stored in halves:
        assert (stored.matrix.block, stored.matrix.expert) == (1, 2)
        assert stored.tensors == (f"{stored.matrix.name}.weight",)
    assert halves[0].matrix.shares_input == halves[1].matrix.shares_input


def test_half_an_expert_is_missing(tmp_path: Path) -> None:
    build("qwen3_moe").save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.experts.2.up_proj.weight"))
    with pytest.raises(
        LowRankError, match=r"1 matrices .* only in part, first .*layers\.1\.mlp.experts.gate_up_proj\[2\]"
    ):
        Checkpoint.open(tmp_path).matrices()


@pytest.mark.parametrize(("family", "prefix"), [("gpt2", "transformer."), ("llama", "model."), ("opt", "model.")])
def test_names_without_the_prefix_of_the_base_model(tmp_path: Path, family: str, prefix: str) -> None:
    """As the real gpt2 stores them: `h.0.attn.c_attn.weight`."""
    build(family).base_model.save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=None)
    names = [(stored.matrix.name, stored.tensors) for stored, _ in weights(Checkpoint.open(tmp_path))]
    assert names == [(m.name, (f"{m.name}.weight".removeprefix(prefix),)) for m in find_matrices(build(family))]


def test_a_name_with_a_prefix_too_many(llama: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("model.", "model.model.")] = tensors.pop(name)

    edit_tensors(llama, rename)
    assert Checkpoint.open(llama).matrices()[0].tensors == (f"model.{Q}.weight",)


def test_factors_stand_for_the_matrix_they_make(llama: Path) -> None:
    A, B = torch.randn(5, 32), torch.randn(32, 5)
    factors = {f"{Q}.A.weight": A, f"{Q}.B.weight": B, f"{Q}.weight": torch.zeros(1)}
    edit_tensors(llama, lambda tensors: tensors.update(factors))
    entries = {Q: {"rank": 5, "form": "factors"}}
    edit_config(llama, quantization_config={"quant_method": "lowrank", "matrices": entries})
    (stored, W), *others = weights(Checkpoint.open(llama))
    assert (stored.matrix.name, stored.matrix.shape, stored.compressed) == (Q, (32, 32), True)
    assert stored.tensors == (f"{Q}.B.weight", f"{Q}.A.weight")
    torch.testing.assert_close(W, B.double() @ A.double())
    assert not any(other.compressed for other, _ in others)


def test_factors_of_a_transposed_matrix_are_not_transposed(tmp_path: Path) -> None:
    build("gpt2").save_pretrained(tmp_path)
    name = "transformer.h.0.attn.c_attn"
    A, B = torch.randn(5, 32), torch.randn(96, 5)
    factors = {f"{name}.A.weight": A, f"{name}.B.weight": B, f"{name}.weight": torch.zeros(1)}
    edit_tensors(tmp_path, lambda tensors: tensors.update(factors))
    stored, W = next(weights(Checkpoint.open(tmp_path)))
    assert (stored.matrix.name, stored.matrix.transposed, W.shape) == (name, False, (96, 32))


def test_a_pivoted_matrix_is_found(tmp_path: Path) -> None:
    build("gpt2").save_pretrained(tmp_path)
    name = "transformer.h.0.attn.c_attn"
    A, C, index = torch.randn(5, 32), torch.randn(91, 5), torch.randperm(96).int()
    parts = {f"{name}.A.weight": A, f"{name}.C.weight": C, f"{name}.index": index, f"{name}.weight": torch.zeros(1)}
    edit_tensors(tmp_path, lambda tensors: tensors.update(parts))
    (stored, W), *others = weights(Checkpoint.open(tmp_path))
    assert (stored.matrix.name, stored.matrix.transposed, stored.compressed) == (name, False, True)
    assert stored.tensors == tuple(f"{name}.{leaf}" for leaf in ("A.weight", "C.weight", "index"))
    rows = [*A.double(), *(C.double() @ A.double())]
    torch.testing.assert_close(W, torch.stack([rows[place] for place in index.tolist()]))
    assert not any(other.compressed for other, _ in others)


def set_tensors(**changes: Tensor | None) -> Callable[[dict[str, Tensor]], object]:
    def edit(tensors: dict[str, Tensor]) -> None:
        for part, tensor in changes.items():
            name = f"{Q}.{part.replace('_', '.')}"
            tensors.pop(name, None)
            if tensor is not None:
                tensors[name] = tensor

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_tensors(weight=None), f"1 matrices of LlamaForCausalLM are not in the checkpoint, .*first {Q}"),
        (set_tensors(weight=torch.zeros(31, 32)), rf"{Q}.weight has shape \[31, 32\], config.json asks for \[32, 32\]"),
        (set_tensors(weight=torch.zeros(1)), rf"{Q}.weight has shape \[1\], config.json asks for \[32, 32\]"),
        (
            set_tensors(weight=torch.zeros(1), A_weight=torch.zeros(5, 32), B_weight=torch.zeros(32, 4)),
            rf"factors {Q}.B.weight \[32, 4\] and {Q}.A.weight \[5, 32\] do not make matrix {Q}",
        ),
        (
            set_tensors(weight=torch.zeros(1), A_weight=torch.zeros(5, 32), B_weight=torch.zeros(30, 5)),
            rf"factors {Q}.B.weight \[30, 5\]",
        ),
        (
            set_tensors(
                weight=torch.zeros(1), A_weight=torch.zeros(5, 32), C_weight=torch.zeros(26, 5), index=torch.arange(32)
            ),
            rf"pivoted {Q}.A.weight \[5, 32\] and {Q}.C.weight \[26, 5\] and {Q}.index \[32\] do not make matrix {Q}",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_config(
    llama: Path, edit: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    edit_tensors(llama, edit)
    with pytest.raises(LowRankError, match=message) as caught:
        Checkpoint.open(llama).matrices()
    assert str(llama) in caught.value.message
    assert caught.value.exit_code == 1


def test_quantized_weights_are_refused(llama: Path) -> None:
    edit_config(llama, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UsageError, match="quantized with gptq"):
        Checkpoint.open(llama).matrices()


@pytest.mark.parametrize(("quantization", "told"), [("awq", "awq"), ({"load_in_8bit": True}, "None"), ([8], r"\[8\]")])
def test_weights_quantized_in_an_unknown_way_are_refused(llama: Path, quantization: object, told: str) -> None:
    edit_config(llama, quantization_config=quantization)
    with pytest.raises(UsageError, match=f"quantized with {told}"):
        Checkpoint.open(llama).matrices()


@pytest.mark.parametrize("num_experts", [3, 5])
def test_more_or_fewer_experts_than_the_config_says(tmp_path: Path, num_experts: int) -> None:
    build("gpt_oss").save_pretrained(tmp_path)
    edit_config(tmp_path, num_local_experts=num_experts)
    with pytest.raises(LowRankError, match=rf"gate_up_proj has shape \[4, 32, 96\], .* \[{num_experts}, 32, 96\]"):
        Checkpoint.open(tmp_path).matrices()


def test_a_newer_format_is_refused(llama: Path) -> None:
    edit_config(llama, quantization_config={"quant_method": "lowrank", "format_version": 99, "ranks": {}})
    with pytest.raises(LowRankError, match="99"):
        Checkpoint.open(llama).matrices()


def test_the_meta_model_takes_no_memory_and_is_built_once(tiny_llama_folder: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama_folder)
    model = checkpoint.meta_model()
    assert isinstance(model, LlamaForCausalLM)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert checkpoint.meta_model() is model


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (None, UsageError, "no config.json"),
        ("{", LowRankError, "config.json: not valid JSON"),
        ("[]", LowRankError, "config.json: a JSON object is expected, found list"),
        (
            '{"model_type": "no_such_model"}',
            UsageError,
            r"config.json: transformers 5\.\S+ has no model_type 'no_such_model'",
        ),
        ("{}", UsageError, "no causal language model can be built from it"),
        (T5Config().to_json_string(), UsageError, "no causal language model can be built from it: .*T5Config"),
        ('{"model_type": "llama", "num_attention_heads": 0}', UsageError, "no causal language model can be built"),
    ],
    ids=["none", "no JSON", "a list", "unknown", "empty", "not causal", "absurd"],
)
def test_a_bad_config(llama: Path, config: str | None, error: type[LowRankError], message: str) -> None:
    (llama / "config.json").unlink()
    if config is not None:
        (llama / "config.json").write_text(config)
    with pytest.raises(error, match=message) as caught:
        Checkpoint.open(llama).meta_model()
    assert type(caught.value) is error


CODE = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}


@pytest.fixture
def evil(llama: Path) -> Path:
    """A Llama that brings code, for its tokenizer too."""
    (llama / "evil.py").write_text(f"open({str(llama / 'ran')!r}, 'w').close()")
    edit_config(llama, auto_map=CODE)
    tokenizer = json.loads((llama / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
    (llama / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return llama


@pytest.mark.parametrize("auto_map", [CODE, {"AutoModel": "some/where--evil.Model"}, "evil.Model", [1]])
def test_a_model_that_needs_its_own_code(evil: Path, auto_map: object) -> None:
    edit_config(evil, model_type="evil", auto_map=auto_map)
    (evil / SINGLE_FILE).unlink()  # before any work
    message = r"config.json: asks for code of its own \(auto_map: .*\), and transformers 5\S+ has no model_type 'evil'"
    for opened in (Checkpoint.open, Checkpoint.open_headers):
        with pytest.raises(UsageError, match=message) as caught:
            opened(evil)
        assert "never run" in str(caught.value.hint)
    assert not (evil / "ran").exists()


def test_code_that_is_not_needed_is_not_run(evil: Path) -> None:
    checkpoint = Checkpoint.open(evil)
    assert len(checkpoint.matrices()) == 14
    model = load_model(checkpoint, device=torch.device("cpu"))
    assert type(model) is LlamaForCausalLM
    assert len(load_tokenizer(evil)) == 384
    assert not (evil / "ran").exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"])
def test_a_link_out_of_the_folder(llama: Path, file: str) -> None:
    outside = llama.parent / "outside"
    outside.write_bytes((llama / file).read_bytes() if (llama / file).exists() else b"")
    (llama / file).unlink(missing_ok=True)
    (llama / file).symlink_to(outside)
    for opened in (Checkpoint.open, Checkpoint.open_headers, resolve_model):
        with pytest.raises(LowRankError, match=rf"{file}: a symbolic link out of the model's folder, to {outside}"):
            opened(str(llama))


def test_other_links_are_nobodys_business(llama: Path, tmp_path: Path) -> None:
    (llama / "checkpoints").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(llama)
    assert len(Checkpoint.open(tmp_path / "link").headers) == 21


def test_tensors_come_shard_by_shard_with_one_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    checkpoint = Checkpoint.open(tmp_path)
    opened: list[str] = []
    open_now: list[str] = []

    @contextmanager
    def watched(path: Path, shard: ShardFile) -> Iterator[Any]:
        assert not open_now
        opened.append(path.name)
        open_now.append(path.name)
        with reading.opened(path, shard) as stream:
            yield stream
        open_now.clear()

    monkeypatch.setattr(folder_module, "opened", watched)
    wanted = [stored.tensors[0] for stored in checkpoint.matrices()][::-3]
    read = dict(checkpoint.tensors(wanted))
    assert list(read) == [name for name in checkpoint.headers if name in wanted]
    assert opened == list(dict.fromkeys(checkpoint.headers[name].file for name in read))
    assert len(opened) > 1
    everything = dict(checkpoint.tensors())
    assert list(everything) == list(checkpoint.headers)
    assert all(torch.equal(read[name], everything[name]) for name in read)


def test_an_unknown_tensor_is_a_key_error(tiny_llama_folder: Path) -> None:
    with pytest.raises(KeyError, match=r"no tensor model\.nothing"):
        next(Checkpoint.open(tiny_llama_folder).tensors(["model.nothing"]))


@pytest.mark.parametrize("model", ["./nothing", "/nothing/here", "a/b/c", "a b", "..x"])
def test_no_such_folder(model: str) -> None:
    with pytest.raises(UsageError, match=f"no such model folder: {re.escape(model)}"):
        resolve_model(model)


@pytest.mark.parametrize("model", ["gpt2", "runs/nothing"])
def test_neither_a_folder_nor_on_the_hub(model: str) -> None:
    with pytest.raises(UsageError, match=f"no such model folder, and not to be had from the hub: {model}"):
        resolve_model(model)


def test_a_file_is_not_a_folder(tiny_llama_folder: Path) -> None:
    with pytest.raises(UsageError, match="is a file") as caught:
        resolve_model(str(tiny_llama_folder / SINGLE_FILE))
    assert str(tiny_llama_folder) in str(caught.value.hint)


def test_a_hub_model_in_the_cache(tiny_llama_folder: Path) -> None:
    repository = Path(HF_HUB_CACHE) / "models--tests--tiny"
    snapshot = shutil.copytree(tiny_llama_folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    try:
        assert resolve_model("tests/tiny") == snapshot
        assert Checkpoint.open("tests/tiny").matrices()
    finally:
        shutil.rmtree(repository)


def test_a_local_folder_wins_over_the_hub(tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_llama_folder.parent)
    assert resolve_model(tiny_llama_folder.name) == Path(tiny_llama_folder.name)


def test_experts_of_another_kind_are_one_thing_too(tmp_path: Path) -> None:
    """A gate of experts by itself, which no layer of low rank stands for."""
    build("mixtral").save_pretrained(tmp_path)
    stack = next(unit for unit in Checkpoint.open(tmp_path).units() if isinstance(unit, StoredStack))
    other = replace(stack, matrix=replace(stack.matrix, name=f"{stack.module}.gate_proj"))
    assert (other.projection, other.factors) == ("gate_proj", "gate_proj")
