"""Training what was compressed: the factors themselves or adapters beside them, saved in the form that they had."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from cli.main import run as lowrank
from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.evaluation.run import EvalSettings, evaluate
from lowrank_kit.matrices import Split, find_matrices
from lowrank_kit.optim import NuMuon, parameter_groups
from lowrank_kit.summary.find import find_documents
from lowrank_kit.training.callbacks import ProgressLog
from lowrank_kit.training.lora import load_adapters
from lowrank_kit.training.run import train
from lowrank_kit.training.settings import TrainSettings
from tests.compression.folders import once
from tests.families import FAMILIES, token_ids
from tests.pages import write_pages

Make = Callable[..., TrainSettings]
# Kind -> family and form. Between them: untied and tied, biases, all forms, fused and transposed matrices, experts.
KINDS = {
    "factors": ("llama", "factors"),
    "pivoted": ("qwen2_tied", "pivoted"),
    "experts": ("mixtral", "factors"),
    "gpt2": ("gpt2", "factors"),
    "phi3": ("phi3", "auto"),
}


@pytest.fixture(scope="module")
def compressed(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Callable[..., Path]:
    """`compressed(kind)`: a tiny random model of that kind, compressed, with a tokenizer."""
    root = tmp_path_factory.mktemp("compressed")

    def make(kind: str, folder: Path) -> None:
        family, form = KINDS[kind]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(FAMILIES[family](vocab_size=len(tiny_tokenizer)))
        model.save_pretrained(root / f"{kind}-dense")
        tiny_tokenizer.save_pretrained(root / f"{kind}-dense")
        compress(root / f"{kind}-dense", folder, CompressSettings(keep=0.6, objective="plain", form=form))

    return once(root, make)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def parameters_on_disk(folder: Path) -> set[str]:
    """Names of the tensors on disk that are no sentinel and no index: all else is trained."""
    stored = weights(folder)
    layers = {name.removesuffix(".A.weight") for name in stored if name.endswith(".A.weight")}
    sentinels = {f"{layer}.weight" for layer in layers} | {name for name, t in stored.items() if t.shape == (2, 2)}
    return {name for name in stored if name not in sentinels and not name.endswith(".index")}


def quantization(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("factors", {"optimizer": "adamw"}),
        ("factors", {"optimizer": "numuon", "bf16": True}),
        ("pivoted", {"optimizer": "muon"}),
        ("experts", {"optimizer": "numuon"}),
        ("gpt2", {"optimizer": "muon"}),
        ("phi3", {"optimizer": "numuon"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_factors_are_trained_and_saved_in_their_form(
    kind: str, changes: dict[str, Any], settings_for: Make, compressed: Callable[[str], Path], tmp_path: Path
) -> None:
    base, folder = compressed(kind), tmp_path / "run"
    settings = settings_for(model=str(base), steps=3, weight_decay=0.1, **changes)
    record = train(settings, folder, device="cpu")
    before, after = weights(base), weights(folder)
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    assert {name for name, t in after.items() if not torch.equal(t, before[name])} == parameters_on_disk(base)
    assert quantization(folder) == quantization(base)
    assert [m.form for m in Checkpoint.open(folder).matrices()] == [m.form for m in Checkpoint.open(base).matrices()]
    assert (folder / "compression.json").read_bytes() == (base / "compression.json").read_bytes()
    assert "are of before the training" in (folder / "README.md").read_text()
    if kind == "gpt2":  # whose validation loss transformers divides by one token too many
        return
    scored = EvalSettings(text=settings.text, part="heldout", blocks=8, block_tokens=32)
    (row,) = evaluate([str(folder)], scored, device="cpu")
    assert row["loss"] == pytest.approx(record["validation_loss"], abs=1e-2 if settings.bf16 else 1e-5)


def test_resumed_is_uninterrupted(
    settings_for: Make, compressed: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(model=str(compressed("pivoted")), steps=5, save_every=2)
    whole = train(settings, tmp_path / "whole", device="cpu")
    on_step_end = ProgressLog.on_step_end

    def stopping(self: ProgressLog, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ProgressLog, "on_step_end", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(settings, tmp_path / "run", device="cpu")
    assert train(settings, tmp_path / "run", resume=True, device="cpu") == whole
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_every_verb_takes_it(
    settings_for: Make,
    compressed: Callable[[str], Path],
    tmp_path: Path,
    same_process_after: None,
    measured_at_any_cost: None,
) -> None:
    folder = tmp_path / "run"
    settings = settings_for(model=str(compressed("factors")), steps=1, spectra_every=1)
    train(settings, folder, device="cpu")
    logged = (folder / "log.jsonl").read_text()
    assert '"q.A"' in logged
    assert '"down.B"' in logged
    for words in (
        ["eval", folder, "--text", settings.text, "--part", "heldout", "--blocks", "2", "--block-tokens", "32"],
        ["analyze", folder, "-o", tmp_path / "spectra"],
        ["bench", folder, "--rounds", "1", "--prompt", "8", "--new-tokens", "2"],
    ):
        assert lowrank([*map(str, words), "-q"]) == 0, words
    # A report shows it as a training, not as one more compression.
    assert [one.kind for one in find_documents([folder])] == ["run"]


def test_text_that_the_compression_has_read_is_not_scored_on(
    settings_for: Make, compressed: Callable[[str], Path], tmp_path: Path
) -> None:
    base, pages = compressed("factors"), write_pages(tmp_path / "seen.jsonl")
    again = CompressSettings(
        keep=0.5, objective="whiten", text=str(pages), block_tokens=32, calibration_blocks=8, check_blocks=1
    )
    compress(base.with_name("factors-dense"), tmp_path / "small", again)
    train(settings_for(model=str(tmp_path / "small"), steps=1), tmp_path / "run", device="cpu")
    with pytest.raises(UsageError, match="was compressed with"):
        evaluate([str(tmp_path / "run")], EvalSettings(text=str(pages), part="all", block_tokens=32), device="cpu")


def test_a_model_card_says_what_is_not_known(
    settings_for: Make, compressed: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in compressed("factors").iterdir():
        if file.name != "compression.json":
            (base / file.name).write_bytes(file.read_bytes())
    train(settings_for(model=str(base), steps=1, lora=2), tmp_path / "run", device="cpu")
    card = (tmp_path / "run" / "README.md").read_text()
    assert "The compressed model had no `compression.json`" in card
    assert "by LoRA adapters, which are merged" in card
    assert not (tmp_path / "run" / "compression.json").exists()


# Which rule steps which factor


@pytest.mark.parametrize("kind", KINDS)
def test_factors_are_matrices_and_nothing_else_new_is_stepped(kind: str, compressed: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed(kind))
    groups = parameter_groups(model, rule="numuon", lr=1e-2, rank_schedule="fixed:0.5")
    NuMuon(groups)
    stepped = {name for group in groups for name in group["param_names"]}
    assert stepped == {name for name, _ in model.named_parameters()}
    by_rule = {name for group in groups if group["rule"] == "numuon" for name in group["param_names"]}
    factors = {name for name, p in model.named_parameters() if {"A", "B", "C"} & set(name.split(".")) and p.ndim > 1}
    assert factors
    assert factors <= by_rule
    found = {matrix.parameter: matrix for matrix in find_matrices(model)}
    assert found.keys() == by_rule
    letters = {name: next(part for part in name.split(".") if part in ("A", "B", "C")) for name in factors}
    assert all(found[name].role.endswith(f".{letter}") for name, letter in letters.items())


def test_rows_of_a_fused_layer_are_stepped_part_by_part(compressed: Callable[[str], Path]) -> None:
    """Of B, whose rows are those of the weight; not of A, which the parts share, nor of a pivoted layer."""
    for kind, role in (("phi3", "gate_up"), ("experts", "gate_up")):
        matrices = find_matrices(AutoModelForCausalLM.from_pretrained(compressed(kind)))
        splits = {matrix.role: matrix.split for matrix in matrices if matrix.role.startswith(role)}
        assert all(split is None for name, split in splits.items() if not name.endswith(".B"))
        if f"{role}.B" in splits:
            assert splits[f"{role}.B"] == Split(("gate", "up"), (48, 48))
    assert "gate_up.B" in splits


def test_factors_that_read_the_same(compressed: Callable[[str], Path]) -> None:
    matrices = find_matrices(AutoModelForCausalLM.from_pretrained(compressed("factors")))
    readers: dict[str, set[str]] = {}
    for matrix in matrices:
        if matrix.block == 0:
            readers.setdefault(matrix.shares_input, set()).add(matrix.role)
    assert {frozenset(roles) for roles in readers.values() if len(roles) > 1} == {
        frozenset({"q.A", "k.A", "v.A"}),
        frozenset({"gate.A", "up.A"}),
    }
    assert {matrix.role for matrix in matrices if matrix.ends_branch} == {"o.B", "down.B"}


# Adapters


@pytest.mark.parametrize("kind", ["factors", "pivoted", "gpt2"])
def test_adapters_reloaded_are_the_merged_model(
    kind: str, settings_for: Make, compressed: Callable[[str], Path], tmp_path: Path
) -> None:
    base, folder = compressed(kind), tmp_path / "run"
    train(settings_for(model=str(base), steps=3, lora=2), folder, device="cpu")
    assert quantization(folder) == quantization(base)
    merged = AutoModelForCausalLM.from_pretrained(folder)
    adapted = load_adapters(AutoModelForCausalLM.from_pretrained(base), folder / "adapter")
    ids = token_ids()
    expected = merged(ids).logits
    torch.testing.assert_close(adapted(ids).logits, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(AutoModelForCausalLM.from_pretrained(base)(ids).logits, expected, atol=1e-3)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert quantization(tmp_path / "merged") == quantization(base)
    torch.testing.assert_close(
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits, expected, rtol=0, atol=1e-5
    )


def test_adapters_of_roles(settings_for: Make, compressed: Callable[[str], Path], tmp_path: Path) -> None:
    base = compressed("pivoted")
    train(settings_for(model=str(base), steps=2, lora=2, lora_roles=("q",)), tmp_path / "run", device="cpu")
    before, after = weights(base), weights(tmp_path / "run")
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if name.endswith(("q_proj.A.weight", "q_proj.C.weight"))}
    settings = settings_for(model=str(base), steps=2, lora=2, lora_roles=("quey",))
    with pytest.raises(UsageError, match='has the role "quey"') as caught:
        train(settings, tmp_path / "other", device="cpu")
    assert caught.value.hint == "its roles: q, k, v, o, gate, up, down"


def test_adapters_of_all_linear_layers_find_the_factors(compressed: Callable[[str], Path]) -> None:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(compressed("factors"))
    wanted = {matrix.name for matrix in find_matrices(model)}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    found = {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert found == {f"base_model.model.{name}" for name in wanted}


def test_adapters_for_another_base(settings_for: Make, compressed: Callable[[str], Path], tmp_path: Path) -> None:
    train(settings_for(model=str(compressed("factors")), steps=1, lora=2), tmp_path / "run", device="cpu")
    adapters = tmp_path / "run" / "adapter"
    dense = AutoModelForCausalLM.from_pretrained(compressed("factors").with_name("factors-dense"))
    with pytest.raises(UsageError, match=r"adapters for another base, .*factors: .*_proj\.[AB] .*is no linear layer"):
        load_adapters(dense, adapters)
    other = AutoModelForCausalLM.from_pretrained(compressed("experts"))
    with pytest.raises(UsageError, match="adapters for another base"):
        load_adapters(other, adapters)
    smaller = CompressSettings(keep=0.3, objective="plain")
    compress(compressed("factors").with_name("factors-dense"), tmp_path / "small", smaller)
    with pytest.raises(UsageError, match=r"(reads|makes) \d+ numbers there, and (reads|makes) \d+ numbers in .*small"):
        load_adapters(AutoModelForCausalLM.from_pretrained(tmp_path / "small"), adapters)
    with pytest.raises(UsageError, match="LoRA adapters, and no model"):
        Checkpoint.open(adapters)
    with pytest.raises(UsageError, match=r"no adapters in this folder, it has no adapter_config\.json"):
        load_adapters(dense, tmp_path / "run")
    (adapters / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(LowRankError, match="damaged adapters"):
        load_adapters(dense, adapters)
