"""Compressed folders that are not what they say: one error with the tensor, the numbers and a hint, before loading."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from cli.main import run
from lowrank_kit.checkpoint.headers import SINGLE_FILE
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.errors import LowRankError
from tests.pages import write_pages

X = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_pages(tmp_path_factory.mktemp("text") / "pages.jsonl"))


@pytest.fixture(scope="module")
def made(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama in both forms."""
    folder = tmp_path_factory.mktemp("made")
    for form in ("factors", "pivoted"):
        compress(tiny_llama_folder, folder / form, CompressSettings(keep=0.5, objective="plain", form=form))
    return folder


def config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / "config.json").read_text())
    change(document["quantization_config"])
    (folder / "config.json").write_text(json.dumps(document))


def tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    found = load_file(folder / SINGLE_FILE)
    change(found)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / SINGLE_FILE)


def newer(folder: Path) -> None:
    config(folder, lambda told: told.update(format_version=9))


def no_names(folder: Path) -> None:
    config(folder, lambda told: told.update(matrices=[X]))


def no_entry(folder: Path) -> None:
    config(folder, lambda told: told["matrices"].update({X: 3}))


def other_rank(folder: Path) -> None:
    config(folder, lambda told: told["matrices"][X].update(rank=told["matrices"][X]["rank"] - 1))


def other_form(folder: Path) -> None:
    config(folder, lambda told: told["matrices"][X].update(form="factors"))


def absurd_rank(folder: Path) -> None:
    config(folder, lambda told: told["matrices"][X].update(rank=10**15))


def no_factor(folder: Path) -> None:
    tensors(folder, lambda found: found.pop(f"{X}.A.weight"))


def cut_factor(folder: Path) -> None:
    tensors(folder, lambda found: found.update({f"{X}.A.weight": found[f"{X}.A.weight"][1:]}))


def mixed(folder: Path) -> None:
    tensors(folder, lambda found: found.update({f"{X}.A.weight": found[f"{X}.A.weight"].half()}))


def whole_numbers(folder: Path) -> None:
    tensors(folder, lambda found: found.update({f"{X}.A.weight": found[f"{X}.A.weight"].int()}))


def out_of_range(folder: Path) -> None:
    tensors(folder, lambda found: found[f"{X}.index"].__setitem__(3, 999))


def twice(folder: Path) -> None:
    tensors(folder, lambda found: found[f"{X}.index"].__setitem__(slice(2), 4))


def short_index(folder: Path) -> None:
    tensors(folder, lambda found: found.update({f"{X}.index": found[f"{X}.index"][1:]}))


def broken_index(folder: Path) -> None:
    tensors(folder, lambda found: found.update({f"{X}.index": found[f"{X}.index"].float()}))


def cut_short(folder: Path) -> None:
    (folder / SINGLE_FILE).write_bytes((folder / SINGLE_FILE).read_bytes()[:-5])


DAMAGES = [
    ("factors", newer, r"format version 9, this lowrank-kit reads up to 4"),
    ("factors", no_names, r"quantization_config: matrices is \['model.* not names with ranks"),
    ("factors", no_entry, rf"quantization_config: {X} has rank 3 and form None"),
    ("factors", other_rank, rf"{X}: rank \d+, form factors in model\.safetensors, rank \d+, form factors in quantiz"),
    ("pivoted", other_form, rf"{X}: rank \d+, form pivoted in model\.safetensors, rank \d+, form factors in quantiz"),
    ("factors", absurd_rank, rf"{X}.* rank .*1[,0]{{15,}}"),
    ("factors", no_factor, rf"1 of the 2 tensors of {X} \(form factors\) are missing, first {X}\.A\.weight"),
    ("pivoted", no_factor, rf"1 of the 3 tensors of {X} \(form pivoted\) are missing, first {X}\.A\.weight"),
    ("factors", cut_factor, rf"factors {X}\.B\.weight \[80, \d+\] and {X}\.A\.weight \[\d+, 32\] do not make matrix"),
    ("factors", mixed, rf"{X}\.B\.weight has dtype F32; {X}\.A\.weight F16"),
    ("pivoted", whole_numbers, rf"{X}\.A\.weight has dtype I32; one of F64, F32, F16, BF16 is wanted"),
    ("pivoted", out_of_range, rf"{X}\.index: 80 numbers for 80 rows, 1 of them are not in 0 to 79, first 999"),
    ("pivoted", twice, rf"{X}\.index: 80 numbers for 80 rows, not each once"),
    ("pivoted", short_index, rf"{X}\.index \[79\] do not make matrix {X} of shape \[80, 32\]"),
    ("pivoted", broken_index, rf"{X}\.index has dtype F32; one of I32, I64 is wanted"),
    ("factors", cut_short, r"model\.safetensors: \d+ bytes, but its header of \d+ tensors asks for \d+"),
]


@pytest.mark.usefixtures("same_process_after")
@pytest.mark.parametrize(("form", "damage", "message"), DAMAGES, ids=lambda one: getattr(one, "__name__", None))
def test_one_error(
    form: str,
    damage: Callable[[Path], None],
    message: str,
    made: Path,
    pages: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(made / form, tmp_path / "model")
    damage(folder)
    with pytest.raises(LowRankError, match=message) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert caught.value.hint
    text = ["--text", pages, "--block-tokens", "16", "--device", "cpu"]
    text = ["--text", pages, "--block-tokens", "16", "--device", "cpu"]
    verbs = {"analyze": [], "eval": [*text, "--blocks", "1"]}
    if damage in (out_of_range, other_rank):  # one that is found by number, one by header
        bench = ["--prompt", "4", "--new-tokens", "2", "--batch", "1", "--rounds", "1", "--device", "cpu"]
        verbs |= {"bench": bench, "train": ["--steps", "1", *text, "-o", str(tmp_path / "out")]}
    for verb, words in verbs.items():
        capsys.readouterr()
        assert run([verb, str(folder), *words, "-q"]) == 1
        told = capsys.readouterr().err
        assert re.search(rf"^error: {re.escape(str(folder))}.*{message}.*\nhint: ", told, re.MULTILINE), told
        assert "this is a bug" not in told
    assert not (tmp_path / "out").exists()


def test_what_may_be_a_pickle(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "factors", tmp_path / "model")
    torch.save(load_file(folder / SINGLE_FILE), folder / "pytorch_model.bin")
    (folder / SINGLE_FILE).unlink()
    with pytest.raises(LowRankError, match=r"pytorch_model\.bin: may be a pickle, which is not read"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_tokenizer_that_fails_with_the_first_text(
    made: Path, pages: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(made / "factors", tmp_path / "model")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": []}))
    assert run(["eval", str(folder), "--text", pages, "--blocks", "1", "-q"]) == 2
    assert "model: no tokenizer can be loaded (" in capsys.readouterr().err


def test_a_config_that_asks_for_more_than_there_is(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(made / "factors", tmp_path / "model")
    document = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"vocab_size": 10**9}, r"config\.json asks for a model of [\d,]{12,} numbers, the files hold \d+,\d{3}"),
        ({"num_hidden_layers": 10**12}, r"num_hidden_layers is 1,000,000,000,000, the files hold \d+ tensors"),
    ):
        (folder / "config.json").write_text(json.dumps(document | change))
        assert run(["eval", str(folder), "--blocks", "1", "-q"]) == 1
        assert re.search(message, capsys.readouterr().err)
