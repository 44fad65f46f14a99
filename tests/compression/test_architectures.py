"""Every family: compressed, saved again, generated from, and the same as dense where nothing is lost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

from tests.architectures import REFUSED, STREAMED, WHOLE, check
from tests.families import FAMILIES, build_from
from tests.more_families import MORE, tiny_config

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"
TIED = ("llama_tied", "qwen2_tied", "gpt2", "gemma", "gemma2", "gemma3", "opt", "opt_projected")
STACKED = ("mixtral", "qwen3_moe")
STAY_DENSE = {"gpt_oss": {"experts stored transposed": 4}}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family: str, text_file: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = build_from(FAMILIES[family](vocab_size=len(tiny_tokenizer)))
    outcome = check(model, tiny_tokenizer, text_file, tmp_path)
    assert outcome.failed == []
    assert (outcome.way, outcome.why) == (STREAMED, "")
    assert outcome.tied == (family in TIED)
    assert outcome.stacked == (family in STACKED)
    assert outcome.dense == STAY_DENSE.get(family, {})
    assert outcome.keep == (0.95 if family in STAY_DENSE else 0.6)
    assert {"o"} < outcome.factorized.keys()
    assert not any(outcome.factorized[role] % 2 for role in outcome.factorized.keys() - {"project_in", "project_out"})


@pytest.mark.parametrize(
    ("family", "way", "why"),
    [
        ("mamba", STREAMED, ""),
        ("recurrent_gemma", STREAMED, ""),
        ("rwkv", WHOLE, "its blocks are no chain"),
        (
            "olmo_hybrid",
            WHOLE,
            "conv1d.weight of OlmoHybridForCausalLM is put together of several tensors of its files",
        ),
        (
            "zamba",
            REFUSED,
            "ZambaForCausalLM has the weight of model.layers.2.shared_transf.* in several of its blocks",
        ),
    ],
)
def test_others(
    family: str, way: str, why: str, text_file: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip("a newer transformers has it")
    config = tiny_config(family, MORE[family][1] | {"vocab_size": len(tiny_tokenizer)})
    outcome = check(build_from(config), tiny_tokenizer, text_file, tmp_path)
    assert (outcome.way, outcome.failed) == (way, [])
    assert re.search(why, outcome.why)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_tells_of_the_family(family: str) -> None:
    rows = [[cell.strip() for cell in line.split("|")] for line in TABLE.read_text().splitlines()]
    found = [row for row in rows if f"**{family}**" in row]
    assert [row[4] for row in found] == [STREAMED], "python -m evals.architectures"
