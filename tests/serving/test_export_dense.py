"""A compressed model as a plain folder: what is in it, loaded without lowrank-kit, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.data.sources import read_source
from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.evaluation.overlap import refuse_used_text
from lowrank_kit.serving.export import export
from lowrank_kit.serving.exports.base import ExportSettings
from lowrank_kit.summary.find import find_documents
from tests.compression.folders import once, weights
from tests.families import token_ids
from tests.serving.folders import KINDS, logits, make_compressed

# A process that has no lowrank-kit.
ELSEWHERE = """
import sys
top, *names = sys.argv[1:]
sys.modules["lowrank_kit"] = None
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
ids = load_file(f"{top}/ids.safetensors")["ids"]
for name in names:
    model, found = AutoModelForCausalLM.from_pretrained(f"{top}/{name}", output_loading_info=True)
    assert not any(found.values()), (name, found)
    save_file({"logits": model(input_ids=ids).logits.detach()}, f"{top}/{name}.safetensors")
"""
# Largest difference over the largest logit: a weight that is rounded once more, in some products.
ROUNDING = {torch.float32: 3e-6, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`compressed(name)`: a folder of one of `KINDS`. Read only."""
    return once(tmp_path_factory.mktemp("compressed"), make_compressed)


@pytest.fixture(scope="module")
def dense(compressed: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`dense(name)`: the same exported."""
    return once(tmp_path_factory.mktemp("dense"), lambda name, folder: export(compressed(name), folder))


def test_logits_without_lowrank_kit(compressed: Callable[[str], Path], dense: Callable[[str], Path]) -> None:
    top = dense("llama").parent
    save_file({"ids": token_ids()}, top / "ids.safetensors")
    for name in KINDS:
        dense(name)
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(top), *KINDS],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, (_, dtype) in KINDS.items():
        expected = logits(compressed(name))
        found = load_file(top / f"{name}.safetensors")["logits"]
        assert found.dtype == expected.dtype == dtype
        difference = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
        assert difference < ROUNDING[dtype], name


@pytest.mark.parametrize("name", KINDS)
def test_the_folder_is_laid_out_as_a_dense_one(
    name: str, compressed: Callable[[str], Path], dense: Callable[[str], Path]
) -> None:
    original = compressed(name).with_name(f"{name}-dense")
    ours, theirs = Checkpoint.open(dense(name)), Checkpoint.open(original)
    layout = [{h.name: (h.dtype, h.shape) for h in one.headers.values()} for one in (ours, theirs)]
    assert layout[0] == layout[1]
    assert ours.config == theirs.config
    assert not any(one.compressed for one in ours.matrices())
    files = {path.name for path in dense(name).iterdir()}
    assert files == {path.name for path in original.iterdir()} | {"README.md", "compression.json", "export.json"}


def test_a_second_export_is_the_same_to_the_byte(
    compressed: Callable[[str], Path], dense: Callable[[str], Path], tmp_path: Path
) -> None:
    for name in ("llama_tied", "mixtral"):
        export(compressed(name), tmp_path / name)
        again, first = ({path.name: path.read_bytes() for path in f.iterdir()} for f in (tmp_path / name, dense(name)))
        assert again == first
    # In pieces it is the same tensors.
    export(compressed("mixtral"), tmp_path / "pieces", ExportSettings(max_shard_bytes=20_000))
    assert len(weights(tmp_path / "pieces")) > 3
    pieces = dict(Checkpoint.open(tmp_path / "pieces").tensors())
    whole = dict(Checkpoint.open(dense("mixtral")).tensors())
    assert pieces.keys() == whole.keys()
    assert all(torch.equal(pieces[name], whole[name]) for name in whole)


def test_the_product_is_rounded_once(compressed: Callable[[str], Path], dense: Callable[[str], Path]) -> None:
    factors, made = (dict(Checkpoint.open(one("gpt_neox")).tensors()) for one in (compressed, dense))
    path = "gpt_neox.layers.0.mlp.dense_h_to_4h"
    product = factors[f"{path}.B.weight"].double() @ factors[f"{path}.A.weight"].double()
    assert torch.equal(made[f"{path}.weight"], product.bfloat16())
    assert torch.equal(made[f"{path}.bias"], factors[f"{path}.B.bias"])


def test_another_number_format(compressed: Callable[[str], Path], tmp_path: Path) -> None:
    export(compressed("qwen2_tied"), tmp_path / "half", ExportSettings(dtype="bfloat16"))
    checkpoint = Checkpoint.open(tmp_path / "half")
    assert {header.dtype for header in checkpoint.headers.values()} == {"BF16"}
    assert checkpoint.config["dtype"] == "bfloat16"
    assert logits(tmp_path / "half").dtype == torch.bfloat16


def test_what_goes_along(tiny_llama_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("What the model has read. " * 400)
    settings = CompressSettings(keep=0.5, objective="whiten", text=str(text), calibration_blocks=2, check_blocks=1)
    compress(tiny_llama_folder, tmp_path / "small", settings)
    (tmp_path / "small" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "small" / "run.json").write_text("{}")
    record = export(tmp_path / "small", tmp_path / "dense")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer("The river")["input_ids"] == tiny_tokenizer("The river")["input_ids"]
    assert not (tmp_path / "dense" / "run.json").exists()
    card = (tmp_path / "dense" / "README.md").read_text()
    assert "base_model: small\n" in card
    assert f"{record['result']['bytes_after']:,} bytes of weights" in card
    told = json.loads((tmp_path / "dense" / "export.json").read_text())
    assert told == {"schema_version": 1, **record}
    assert [row["rank"] for row in told["matrices"]] == [
        one["rank"] for one in json.loads((tmp_path / "small" / "compression.json").read_text())["matrices"]
    ]
    assert "to 1." in told["notes"][0]
    # What it was compressed with is not what it is scored on, and its report is not counted as another compression.
    documents = list(read_source(str(text)))
    with pytest.raises(UsageError, match="was compressed with 1 of the 1 documents"):
        refuse_used_text(Checkpoint.open(tmp_path / "dense"), documents)
    (tmp_path / "small" / "run.json").unlink()
    assert [(one.kind, one.folder.name) for one in find_documents([tmp_path])] == [("compression", "small")]


def broken(source: Path, folder: Path, **changes: object) -> Path:
    """A copy whose tensors (name=tensor, None to leave out) or `quantization_config` (matrix=entry) differ."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    for name, change in changes.items():
        if name == "format_version":
            config["quantization_config"][name] = change
        elif isinstance(change, dict):
            config["quantization_config"]["matrices"][name] = change
        elif isinstance(change, torch.Tensor):
            tensors[name] = change
        else:
            (tensors if name in tensors else config["quantization_config"]["matrices"]).pop(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


PATH = "model.layers.0.self_attn.q_proj"
EXPERTS = "model.layers.0.block_sparse_moe.experts"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"format_version": 9}, "has format version 9, this lowrank-kit reads up to"),
        (
            "llama",
            {f"{PATH}.A.weight": None},
            f"rank 10, form factors in config.json, and {PATH}.A.weight is in no file",
        ),
        ("llama", {f"{PATH}.weight": None}, f"and {PATH}.weight is in no file"),
        ("mixtral", {f"{EXPERTS}.down.A": None}, "experts.down.A is in no file"),
        (
            "llama",
            {PATH: {"rank": 9, "form": "factors"}},
            "rank 10, form factors in .*, rank 9, form factors in quantization_config",
        ),
        (
            "llama",
            {PATH: {"rank": 10, "form": "pivoted"}},
            f"rank 10, form pivoted in config.json, and {PATH}.C.weight is in",
        ),
        ("llama", {PATH: None}, f"{PATH}: rank 10, form factors in .*, nothing in quantization_config"),
        ("llama", {"model.norm": {"rank": 1, "form": "factors"}}, "and model.norm.B.weight is in no file"),
        ("llama", {f"{PATH}.A.weight": torch.zeros(9, 32)}, r"\[9, 32\] do not make matrix model.layers.0"),
        (
            "llama",
            {f"{PATH}.A.weight": torch.zeros(10, 32).half()},
            f"{PATH}.B.weight has dtype F32; {PATH}.A.weight F16",
        ),
        ("llama", {f"{PATH}.A.weight": torch.full((10, 32), float("nan"))}, "NaN or Inf in"),
        ("phi3", {"model.layers.0.mlp.down_proj.A.weight": torch.full((14, 48), 6e4).half()}, "are too large for F16"),
    ],
)
def test_a_damaged_folder(
    name: str, changes: dict[str, object], message: str, compressed: Callable[[str], Path], tmp_path: Path
) -> None:
    source = broken(compressed(name), tmp_path / "broken", **changes)
    with pytest.raises(LowRankError, match=message) as caught:
        export(source, tmp_path / "out")
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_several_number_formats_and_one_that_is_wanted(compressed: Callable[[str], Path], tmp_path: Path) -> None:
    tensors = load_file(compressed("llama") / "model.safetensors")
    halved = {f"{PATH}.{leaf}": tensors[f"{PATH}.{leaf}"].half() for leaf in ("A.weight", "B.weight", "weight")}
    source = broken(compressed("llama"), tmp_path / "mixed", **halved)
    export(source, tmp_path / "out", ExportSettings(dtype="float32"))
    assert torch.allclose(logits(tmp_path / "out"), logits(compressed("llama")), atol=0.1)


def test_wrong_usage(compressed: Callable[[str], Path], tmp_path: Path) -> None:
    original = compressed("llama").with_name("llama-dense")
    for model, settings, message in (
        (original, ExportSettings(), "is dense already: any tool takes it as it is"),
        (original, ExportSettings(to="dens"), 'no such kind of export "dens"\nhint: did you mean "dense"?'),
        (
            compressed("llama"),
            ExportSettings(base="x"),
            "--base is not for --to dense\nhint: leave it out, or --to",
        ),
        (compressed("llama"), ExportSettings(dtype="float8"), 'unknown dtype "float8"'),
    ):
        with pytest.raises(UsageError) as caught:
            export(model, tmp_path / "out", settings)
        assert message in str(caught.value)
    with pytest.raises(UsageError, match="the output folder is not empty"):
        export(compressed("llama"), original)
    assert not list(tmp_path.iterdir())
