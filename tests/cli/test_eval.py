"""`lowrank eval`: several models, a reference, text and a task in one table, and every refusal."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from cli.main import run
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.data.blocks import token_blocks
from lowrank_kit.data.corpus import load_corpus
from lowrank_kit.data.sources import Document, read_source
from lowrank_kit.evaluation.cloze import make_cloze, write_cloze_task
from lowrank_kit.evaluation.divergence import divergence
from lowrank_kit.evaluation.perplexity import perplexity
from lowrank_kit.evaluation.run import EvalSettings, documents_of
from tests.pages import write_pages

OPTIONS = ["--block-tokens", "32", "--device", "cpu"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_pages(tmp_path_factory.mktemp("text") / "pages.jsonl", num_pages=30))


@pytest.fixture(scope="module")
def compressed(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("models") / "half"
    compress(tiny_llama_folder, output, CompressSettings(keep=0.5, objective="plain"))
    return output


@pytest.fixture(scope="module")
def task_folder(tiny_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    documents = [Document(str(index), text * 4) for index, text in enumerate(tiny_texts)]
    write_cloze_task(folder, make_cloze(documents, num_items=8, context_chars=60), "tiny_cloze")
    return folder


def test_everything_in_one_call(
    tiny_llama_folder: Path, compressed: Path, task_folder: Path, pages: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = ["--tasks", "tiny_cloze", "--include-path", str(task_folder)]
    models = [str(tiny_llama_folder), str(compressed)]
    command = ["eval", *models, "--reference", str(tiny_llama_folder), "--text", pages, *OPTIONS, *tasks]
    assert run([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema_version"] == 1
    assert document["environment"]["transformers"]
    dense, low_rank = document["models"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    blocks = token_blocks(read_source(pages), tokenizer, 32, max_blocks=256)
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    for folder, row in zip((tiny_llama_folder, compressed), (dense, low_rank), strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder)
        found, apart = perplexity(model, blocks), divergence(model, reference, blocks)
        assert row["model"] == str(folder)
        assert row["perplexity"] == pytest.approx(found.perplexity)
        assert row["bits_per_byte"] == pytest.approx(found.bits_per_byte)
        assert (row["tokens"], row["sha256"]) == (found.num_tokens, blocks.sha256)
        assert row["reference_kl_nats"] == pytest.approx(apart.kl_nats, abs=1e-9)
        assert row["reference_top1_agreement"] == apart.top1_agreement
        assert row["bytes"] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        assert [result["metric"] for result in row["tasks"]] == ["acc", "acc_norm"]
    assert dense["parameters"] == sum(parameter.numel() for parameter in reference.parameters())
    assert low_rank["bytes"] < dense["bytes"]
    assert (dense["reference_kl_nats"], dense["reference_top1_agreement"]) == (0, 1)
    assert low_rank["reference_kl_nats"] > 1e-4

    assert run(command) == 0
    heading, _, first, second, _, note = capsys.readouterr().out.splitlines()
    assert re.split(r"  +", heading.strip()) == [
        *("model", "parameters", "bytes", "perplexity", "bits/byte", "KL (nats)", "same top-1"),
        *("tiny_cloze acc", "tiny_cloze acc_norm"),
    ]
    assert first.split()[:3] == ["tiny-llama", f"{dense['parameters']:,}", f"{dense['bytes']:,}"]
    assert second.split()[:3] == ["half", f"{low_rank['parameters']:,}", f"{low_rank['bytes']:,}"]
    assert note == f"text: all of {pages}, {dense['tokens']:,} tokens scored, sha256 {dense['sha256'][:12]}"


def rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert run(["eval", *OPTIONS, "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)["models"]


def test_the_held_out_part(tiny_llama_folder: Path, pages: str, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = rows(capsys, str(tiny_llama_folder), "--text", pages, "--part", "heldout")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    assert row["sha256"] == token_blocks(load_corpus(pages).heldout, tokenizer, 32).sha256
    assert run(["eval", *OPTIONS, str(tiny_llama_folder), "--text", pages, "--part", "heldout"]) == 0
    assert f"\ntext: held-out part of {pages}, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "part", "chosen"),
    [
        (None, "auto", "heldout"),
        ("stdlib", "auto", "heldout"),
        ("x.txt", "auto", "all"),
        ("x.txt", "heldout", "heldout"),
        (None, "all", "all"),
    ],
)
def test_which_part_auto_is(text: str | None, part: str, chosen: str) -> None:
    assert EvalSettings(text=text, part=part).chosen_part == chosen


def test_the_parts_of_a_text(pages: str) -> None:
    corpus = load_corpus(pages)
    assert documents_of(EvalSettings(text=pages, part="heldout")) == list(corpus.heldout)
    whole = documents_of(EvalSettings(text=pages))
    assert sorted(whole, key=str) == sorted((*corpus.train, *corpus.heldout), key=str)


def test_how_much_is_scored(tiny_llama_folder: Path, pages: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tiny_llama_folder)
    few = [rows(capsys, model, "--text", pages, "--blocks", "3", "--seed", seed)[0] for seed in ("0", "0", "1")]
    assert {row["tokens"] for row in few} == {3 * 31}
    assert few[0] == few[1]
    assert few[0]["sha256"] != few[2]["sha256"]


def test_only_a_task(
    compressed: Path, task_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lowrank_kit.evaluation.run.documents_of", lambda settings: pytest.fail("the text is not needed")
    )
    arguments = ["--no-perplexity", "--tasks", " tiny_cloze, ", "--include-path", str(task_folder), "--limit", "3"]
    (row,) = rows(capsys, str(compressed), *arguments)
    assert {result["num_docs"] for result in row["tasks"]} == {3}
    assert "perplexity" not in row


def test_only_the_divergence(
    tiny_llama_folder: Path, compressed: Path, pages: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--no-perplexity", "--reference", str(tiny_llama_folder), "--text", pages]
    (row,) = rows(capsys, str(compressed), *arguments)
    assert row["reference_kl_nats"] > 0
    assert "perplexity" not in row
    assert run(["eval", *OPTIONS, str(compressed), *arguments]) == 0
    assert "KL (nats)" in capsys.readouterr().out


def test_dtype(tiny_llama_folder: Path, pages: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tiny_llama_folder)
    exact, rounded = (
        rows(capsys, model, "--text", pages, "--dtype", dtype)[0]["loss"] for dtype in ("float32", "bfloat16")
    )
    assert exact != rounded
    assert exact == pytest.approx(rounded, rel=0.01)


# Refusals


def refusal(code: int, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(["eval", *OPTIONS, *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("error: ") == 1
    assert "this is a bug" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'MODEL...'"),
        (["MODEL", "./nosuch"], "no such model folder: ./nosuch\nhint: "),
        (["MODEL", "--reference", "./nosuch"], "no such model folder: ./nosuch\nhint: "),
        (["MODEL", "--no-perplexity"], "nothing to score\nhint: leave out --no-perplexity, or name --tasks"),
        (["MODEL", "--part", "held"], "Invalid value for '--part'"),
        (["MODEL", "--text", "no/such/text"], "no such text source: no/such/text\nhint: "),
        (["MODEL", "--block-tokens", "129"], "blocks of 129 tokens are longer than the context of"),
        (["MODEL", "--tasks", "x", "--include-path", "nowhere"], "no such folder of tasks: nowhere\nhint: "),
    ],
)
def test_wrong_usage(
    arguments: list[str],
    message: str,
    tiny_llama_folder: Path,
    task_folder: Path,
    pages: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = {"MODEL": str(tiny_llama_folder), "TASKS": str(task_folder)}
    arguments = ["--text", pages, *(words.get(word, word) for word in arguments)]
    assert message in refusal(2, capsys, *arguments)


def test_text_shorter_than_a_block(tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("The gate was open.")
    told = refusal(2, capsys, str(tiny_llama_folder), "--text", str(tmp_path / "short.txt"))
    assert "tokens, fewer than one block of 32" in told


def test_a_broken_model_among_good_ones(
    tiny_llama_folder: Path,
    tmp_path: Path,
    pages: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = Path(shutil.copytree(tiny_llama_folder, tmp_path / "broken"))
    shard = broken / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    # Found before the first is scored.
    monkeypatch.setattr("lowrank_kit.evaluation.run.score", lambda *_, **__: pytest.fail("scored"))
    told = refusal(1, capsys, str(tiny_llama_folder), str(broken), "--text", pages)
    assert str(shard) in told


def test_a_reference_with_another_vocabulary(
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_llama_folder: Path,
    tmp_path: Path,
    pages: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_llama(vocab_size=400).save_pretrained(tmp_path / "other")
    told = refusal(2, capsys, str(tiny_llama_folder), "--reference", str(tmp_path / "other"), "--text", pages)
    assert "has 384 tokens and the reference" in told


def test_a_model_that_gives_nan(
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    pages: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_llama()
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    model.save_pretrained(tmp_path / "nan")
    tiny_tokenizer.save_pretrained(tmp_path / "nan")
    told = refusal(1, capsys, str(tmp_path / "nan"), "--text", pages)
    assert re.search(r"the loss of .*nan is nan on block 0 of \d+\nhint: look for NaN", told)


def test_no_tokenizer(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, pages: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llama().save_pretrained(tmp_path / "bare")
    assert "no tokenizer can be loaded" in refusal(2, capsys, str(tmp_path / "bare"), "--text", pages)


# Text that a compression has read


@pytest.fixture(scope="module")
def calibrated(tiny_llama_folder: Path, pages: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("models") / "calibrated"
    few = CompressSettings(
        keep=0.5, objective="whiten", text=pages, block_tokens=32, calibration_blocks=4, check_blocks=2
    )
    compress(tiny_llama_folder, output, few)
    return output


def read_by(folder: Path) -> list[str]:
    return json.loads((folder / "compression.json").read_text())["calibration"]["documents"]


def test_text_that_a_compression_has_read_is_refused(
    tiny_llama_folder: Path, calibrated: Path, pages: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read = read_by(calibrated)
    assert 6 <= len(read) <= 12
    message = f"{calibrated} was compressed with {len(read)} of the 30 documents of this text (pages.jsonl:"
    hint = "\nhint: --part heldout, or another text\n"
    dense = str(tiny_llama_folder)
    for models in ([str(calibrated)], [dense, str(calibrated)], [dense, "--reference", str(calibrated)]):
        told = refusal(2, capsys, *models, "--text", pages)
        assert message in told
        assert told.endswith(hint)
    # The file has another name and fewer pages: the same text all the same.
    (one,) = [document for document in read_source(pages) if document.digest == read[-1]]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("A page of its own.", one.text)))
    assert "with 1 of the 2 documents of this text (other.jsonl:2)" in refusal(
        2, capsys, str(calibrated), "--text", str(other)
    )


def test_text_that_a_compression_has_not_read_is_scored(
    calibrated: Path, pages: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = rows(capsys, str(calibrated), "--text", pages, "--part", "heldout")
    assert row["perplexity"] > 1
    unread = [document.text for document in read_source(pages) if document.digest not in read_by(calibrated)]
    rest = tmp_path / "rest.jsonl"
    rest.write_text("".join(json.dumps({"text": text}) + "\n" for text in unread))
    (row,) = rows(capsys, str(calibrated), "--text", str(rest))
    assert row["perplexity"] > 1


@pytest.mark.parametrize("max_bytes", [None, 4000])
def test_a_file_of_which_the_beginning_was_read(
    max_bytes: int | None, tiny_llama_folder: Path, pages: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "book.txt"
    text.write_text("\n\n".join(document.text for document in read_source(pages)))
    few = CompressSettings(
        keep=0.5,
        objective="whiten",
        text=str(text),
        block_tokens=32,
        calibration_blocks=3,
        check_blocks=1,
        max_bytes=max_bytes,
    )
    compress(tiny_llama_folder, tmp_path / "half", few)
    model = str(tmp_path / "half")
    assert "with 1 of the 1 documents of this text (book.txt)" in refusal(2, capsys, model, "--text", str(text))
    (row,) = rows(capsys, model, "--text", str(text), "--part", "heldout")
    assert row["perplexity"] > 1


@pytest.mark.parametrize(
    "record",
    [None, "{}", "[]", '{"calibration": null}', '{"calibration": {"source": "stdlib", "sha256": "0", "tokens": 1}}'],
)
def test_folders_that_do_not_say_what_was_read(
    record: str | None, calibrated: Path, pages: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(calibrated, tmp_path / "model"))
    (model / "compression.json").unlink()
    if record is not None:
        (model / "compression.json").write_text(record)
    (row,) = rows(capsys, str(model), "--text", pages, "--blocks", "1")
    assert row["perplexity"] > 1


def test_a_damaged_record_of_what_was_read(
    calibrated: Path, pages: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(calibrated, tmp_path / "model"))
    (model / "compression.json").write_text('{"calibration": {"docu')
    assert f"{model / 'compression.json'} is damaged: " in refusal(1, capsys, str(model), "--text", pages)
