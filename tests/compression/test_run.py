"""One compression end to end: optimal on its calibration text, honest about its errors, whole or not there at all."""

from __future__ import annotations

import math
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.compression.calibration import calibrate
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.compression.texts import Texts, draw_texts
from lowrank_kit.data.blocks import token_blocks
from lowrank_kit.data.corpus import load_corpus
from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.layers import LowRankLinear, PivotedLinear
from tests.compression.folders import report_of, weights

BLOCKS, BLOCK_TOKENS = 24, 32
SMALL: dict[str, Any] = {
    "keep": 0.5,
    "objective": "whiten",
    "calibration_blocks": BLOCKS,
    "block_tokens": BLOCK_TOKENS,
}


def settings_for(text: str | None, **given: Any) -> CompressSettings:
    return CompressSettings(**(SMALL | {"text": text} | given))


def texts_of(folder: Path, text: str) -> Texts:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return draw_texts(
        text, tokenizer, block_tokens=BLOCK_TOKENS, calibration=BLOCKS, check=CompressSettings.check_blocks
    )


def inputs_of(model: LlamaForCausalLM, names: list[str], ids: Tensor) -> dict[str, Tensor]:
    """What each named module reads, [tokens, in] float64."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(name, args[0].double().flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def low_rank_weights(folder: Path) -> dict[str, Tensor]:
    """B A of every factorized matrix, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRankLinear | PivotedLinear)}
    return {name: layer.dense_weight().detach() for name, layer in layers.items()}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path, text_file: str) -> dict[str, Path]:
    """The tiny Llama compressed with each objective to the same size."""
    root = tmp_path_factory.mktemp("objectives")
    for objective in ("plain", "whiten"):
        compress(tiny_llama_folder, root / objective, settings_for(text_file, objective=objective))
    return {objective: root / objective for objective in ("plain", "whiten")}


def test_whiten_is_better_on_outputs_and_both_report_what_they_reach(
    outputs: dict[str, Path], tiny_llama_folder: Path, text_file: str
) -> None:
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    weights = {objective: low_rank_weights(folder) for objective, folder in outputs.items()}
    names = list(weights["plain"])
    assert len(names) == 14
    texts = texts_of(tiny_llama_folder, text_file)
    inputs, unseen = (inputs_of(dense, names, blocks.ids.long()) for blocks in (texts.calibration, texts.check))
    rows = {key: {row["matrix"]: row for row in report_of(folder)["matrices"]} for key, folder in outputs.items()}
    for name in names:
        W, X, checked = dense.get_submodule(name).weight.double(), inputs[name].mT, unseen[name].mT
        output_error = {key: ((W - BA[name]) @ X).norm() / (W @ X).norm() for key, BA in weights.items()}
        check_error = ((W - weights["whiten"][name]) @ checked).norm() / (W @ checked).norm()
        weight_error = {key: (W - BA[name]).norm() / W.norm() for key, BA in weights.items()}
        assert output_error["whiten"] < 0.99 * output_error["plain"]
        assert weight_error["plain"] < 0.99 * weight_error["whiten"]
        # Factors are stored in float32, the Gram is made of float32 products.
        assert math.isclose(rows["plain"][name]["relative_error"], weight_error["plain"].item(), rel_tol=1e-5)
        assert math.isclose(rows["whiten"][name]["relative_error"], check_error.item(), rel_tol=1e-5)
        for key, error in (("plain", weight_error), ("whiten", output_error)):
            assert math.isclose(rows[key][name]["kept_energy"], 1 - error[key].item() ** 2, rel_tol=1e-5)


def test_pivoted_is_more_rank_in_the_same_numbers(
    outputs: dict[str, Path], tiny_llama_folder: Path, text_file: str, tmp_path: Path
) -> None:
    report = compress(tiny_llama_folder, tmp_path / "out", settings_for(text_file, form="pivoted"))
    factors = report_of(outputs["whiten"])
    pivoted, two = low_rank_weights(tmp_path / "out"), low_rank_weights(outputs["whiten"])
    assert pivoted.keys() == two.keys()
    for row, other in zip(report["matrices"], factors["matrices"], strict=True):
        name = row["matrix"]
        assert (row["form"], other["form"]) == ("pivoted", "factors")
        assert torch.linalg.matrix_rank(pivoted[name], rtol=1e-6) == row["rank"] >= other["rank"]
        assert row["kept_energy"] >= other["kept_energy"]
        assert row["relative_error"] < other["relative_error"] + 1e-6
        # Nested: what the two factors keep, it keeps too. Both are rounded to float32.
        basis = torch.linalg.svd(two[name]).U[:, : other["rank"]]
        assert (basis.mT @ (pivoted[name] - two[name])).norm() < 1e-5 * two[name].norm()
    ranks = [sum(row["rank"] for row in made["matrices"]) for made in (report, factors)]
    assert ranks[0] > 1.05 * ranks[1]
    assert 0.48 < report["totals"]["matrix_keep"] <= 0.5
    assert "- form: pivoted (r rows" in (tmp_path / "out" / "README.md").read_text()


def test_report_and_card(outputs: dict[str, Path], tiny_llama_folder: Path, text_file: str) -> None:
    report = report_of(outputs["whiten"])
    assert report["model"] == str(tiny_llama_folder)
    assert report["settings"] == CompressSettings(**report["settings"]).__dict__
    blocks = token_blocks(
        load_corpus(text_file).train,
        AutoTokenizer.from_pretrained(tiny_llama_folder),
        BLOCK_TOKENS,
        max_blocks=BLOCKS,
        seed=0,
    )
    text = report["calibration"]
    assert (text["source"], text["sha256"], text["tokens"]) == (text_file, blocks.sha256, BLOCKS * BLOCK_TOKENS)
    assert (text["check"]["tokens"], text["refinement"]) == (report["settings"]["check_blocks"] * BLOCK_TOKENS, None)
    assert text["corpus_sha256"] == load_corpus(text_file).sha256
    # 56 of the 70 blocks of 36 pages: most pages are in, none held out.
    assert set(text["documents"]) < {document.digest for document in load_corpus(text_file).train}
    assert len(text["documents"]) > 30
    assert report["environment"]["torch"]
    assert report_of(outputs["plain"])["calibration"] is None
    card = (outputs["whiten"] / "README.md").read_text()
    assert card.startswith("---\nbase_model: tiny-llama\nlibrary_name: transformers\n")
    total, kept = report["totals"]["matrix_numbers_before"], report["totals"]["matrix_numbers_after"]
    assert re.search(rf"\| matrices \(numbers\) +\| {total:,} \| {kept:,} \|", card)
    assert blocks.sha256 in card
    assert str(tiny_llama_folder) not in card


def test_what_else_is_in_the_folder(tiny_llama_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_llama_folder, source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    for name in ("run.json", "compression.json", "pytorch_model.bin.index.json", "log.jsonl", "notes.py"):
        (source / name).write_text("{}")
    compress(source, tmp_path / "out", settings_for(None, objective="plain", max_shard_bytes=30_000))
    made = {path.name for path in (tmp_path / "out").iterdir()}
    shards = {name for name in made if re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name)}
    assert len(shards) > 1
    assert made - shards == {
        *("config.json", "model.safetensors.index.json", "compression.json", "compression.jsonl", "README.md"),
        *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "out")]
    assert tokenizers[0]("The river").input_ids == tokenizers[1]("The river").input_ids


def test_the_seed_decides_everything(tiny_llama_folder: Path, text_file: str, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        compress(tiny_llama_folder, tmp_path / name, settings_for(text_file, seed=seed, max_shard_bytes=40_000))
    one, again, two = (weights(tmp_path / name) for name in ("one", "again", "two"))
    assert one == again
    assert one.keys() == two.keys()
    assert one != two  # other blocks of the text


def test_calibrated_once_for_any_keep(tiny_llama_folder: Path, text_file: str, tmp_path: Path) -> None:
    calibration = calibrate(Checkpoint.open(tiny_llama_folder), settings_for(text_file))
    for keep in (0.3, 0.7):
        settings = settings_for(text_file, keep=keep)
        compress(tiny_llama_folder, tmp_path / f"once-{keep}", settings, calibration=calibration)
        compress(tiny_llama_folder, tmp_path / f"anew-{keep}", settings)
        assert weights(tmp_path / f"once-{keep}") == weights(tmp_path / f"anew-{keep}")
    shutil.copytree(tiny_llama_folder, tmp_path / "other")
    with pytest.raises(ValueError, match="the calibration is of"):
        compress(tmp_path / "other", tmp_path / "out", settings_for(text_file), calibration=calibration)


def test_the_held_out_text_is_left_alone(tiny_llama_folder: Path, text_file: str) -> None:
    corpus = load_corpus(text_file)
    assert corpus.heldout
    # As many blocks as there are: any document that were in would show.
    settings = settings_for(text_file, calibration_blocks=10**6, check_blocks=1)
    texts = calibrate(Checkpoint.open(tiny_llama_folder), settings).texts
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    text = "\n".join(tokenizer.decode(blocks.ids.flatten()) for blocks in texts.sets.values())
    number = [re.match(r"Page \d+\.", document.text).group() for document in corpus.heldout]  # type: ignore[union-attr]
    assert not [page for page in number if page in text]
    # All but the last, and those that the one block of check text is cut out of.
    assert sum(document.text in text for document in corpus.train) >= len(corpus.train) - 3
    assert set(texts.documents) == {document.digest for document in corpus.train}


def test_calibration_in_bfloat16_leaves_the_dtype_on_disk(
    tiny_llama_folder: Path, text_file: str, tmp_path: Path
) -> None:
    compress(tiny_llama_folder, tmp_path / "out", settings_for(text_file), dtype="bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}


# Refusals: one message, and nothing left behind


@pytest.fixture
def model(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may break."""
    return Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))


def change(folder: Path, **tensors: Callable[[Tensor], Tensor]) -> None:
    stored = load_file(folder / "model.safetensors")
    for name, make in tensors.items():
        stored[name] = make(stored[name])
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def refused(model: Path, settings: CompressSettings, error: type[LowRankError], message: str, **options: Any) -> None:
    """Compress into a folder that is not there and into one that is empty: refused, and both as before."""
    absent, empty = model.parent / "absent", model.parent / "empty"
    empty.mkdir()
    before = sorted(model.parent.rglob("*"))
    for output in (absent, empty):
        with pytest.raises(error, match=message) as raised:
            compress(model, output, settings, **options)
        assert raised.value.exit_code == error.exit_code
    assert sorted(model.parent.rglob("*")) == before  # no output, and no temporary folder beside it


def with_nan(W: Tensor) -> Tensor:
    W[3, 5] = math.nan
    W[4, 5] = math.inf
    return W


@pytest.mark.parametrize("objective", ["plain", "whiten"])
def test_nan_in_a_matrix(model: Path, text_file: str, objective: str) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    change(model, **{name: with_nan})
    message = rf"NaN or Inf in {name}: 2 of 512 numbers"
    refused(model, settings_for(text_file, objective=objective), LowRankError, message)


def test_an_activation_that_overflows(model: Path, text_file: str) -> None:
    names = [f"model.layers.0.mlp.{role}_proj.weight" for role in ("gate", "up")]
    change(model, **dict.fromkeys(names, lambda W: W * 1e30))
    refused(model, settings_for(text_file), LowRankError, r"input of model.layers.0.mlp.down_proj: \d+ of \d+")


def test_a_truncated_shard_is_found_before_any_work(model: Path) -> None:
    shard = model / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    # The text would be refused too, had it been looked at.
    refused(model, settings_for("/no/such/text"), LowRankError, r"model\.safetensors.*(damaged|truncated|bytes)")


def test_text_shorter_than_a_block(model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Nobody had opened the gate.\nThe wheel stood still.\n")
    refused(model, settings_for(str(tmp_path / "short.txt")), UsageError, r"\d+ tokens, fewer than one block of 32")


def test_no_such_text(model: Path) -> None:
    refused(model, settings_for("/no/such/text"), UsageError, "no such text source: /no/such/text")


def test_blocks_longer_than_the_context(model: Path, text_file: str) -> None:
    refused(
        model, settings_for(text_file, block_tokens=129), UsageError, r"blocks of 129 .* context of .*, 128\nhint: --bl"
    )


def test_a_tokenizer_of_another_model(
    tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, text_file: str
) -> None:
    tiny_llama(vocab_size=300).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    refused(tmp_path / "model", settings_for(text_file), UsageError, r"token id 3\d\d, but .* knows 300 tokens")


def test_no_tokenizer(tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, text_file: str) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    refused(tmp_path / "model", settings_for(text_file), UsageError, "no tokenizer can be loaded")


@pytest.mark.parametrize(("option", "message"), [("device", 'unknown device "gpu"'), ("dtype", 'unknown dtype "gpu"')])
def test_no_such_device_or_dtype(model: Path, text_file: str, option: str, message: str) -> None:
    refused(model, settings_for(text_file), UsageError, message, **{option: "gpu"})


def test_compressed_already(outputs: dict[str, Path], text_file: str, tmp_path: Path) -> None:
    model = Path(shutil.copytree(outputs["plain"], tmp_path / "model"))
    refused(model, settings_for(text_file), UsageError, "compressed already")


def test_an_output_that_is_not_empty(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=r"not empty \(1 entries\)"):
        compress(model, tmp_path / "out", settings_for(None, objective="plain"))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_gets_full(model: Path, text_file: str) -> None:
    before = sorted(model.parent.rglob("*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (25_000, limits[1]))
    try:
        with pytest.raises(LowRankError, match=r"\.safetensors: File too large: it takes [\d,]+ bytes, [\d,]+ are"):
            compress(model, model.parent / "out", settings_for(text_file, max_shard_bytes=30_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(model.parent.rglob("*")) == before
