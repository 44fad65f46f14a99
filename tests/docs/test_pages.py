"""Every command and every block of Python of the pages is run, in an empty folder, in order; or it says why not.

The models are of 2 blocks, 32 wide, and the amounts are `walk.SCALE`; options and files are the page's own.
"""

from __future__ import annotations

import gc
import json
import re
import shutil
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from transformers import AutoModelForCausalLM

from lowrank_kit.layers import LowRankLinear, PivotedLinear
from tests.docs.blocks import FENCE, PAGES, ROOT, Block, anchors, blocks, commands, headers, links
from tests.docs.walk import NOT_RUN, Walk, parse
from tests.pages import write_pages

# Page -> what a reader has there already: of the quickstart, or of their own.
GIVEN: dict[str, tuple[str, ...]] = {
    "README.md": (),
    "evals/README.md": (),
    "docs/README.md": (),
    "docs/quickstart.md": ("book.txt", "other.txt"),
    "docs/train.md": ("model", "book.txt", "books", "chat.jsonl"),
    "docs/scaling.md": ("base.json", "large.json"),
    "docs/analyze.md": ("model", "model-half"),
    "docs/compress.md": ("model", "book.txt"),
    "docs/evaluate.md": ("model", "model-half", "model-whiten", "book.txt", "other.txt"),
    "docs/serve.md": ("model", "model-half", "chat.jsonl"),
    "docs/format.md": ("model-half",),
    "docs/adding-an-objective.md": (),
    "docs/adding-an-optimizer-rule.md": (),
}
# What stands for a preset, and for the standard library's text.
ALWAYS = ("tiny.json", "base.json", "other.txt")
# Their code is run by test_adding.py, and what they compress with it is not there without it.
ADDING = ("docs/adding-an-objective.md", "docs/adding-an-optimizer-rule.md")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
)


def llama(path: Path, *, width: int, blocks: int) -> None:
    """A config of a Llama with heads of 8."""
    config = {
        **{"model_type": "llama", "hidden_size": width, "intermediate_size": 5 * width // 2},
        **{"num_hidden_layers": blocks, "num_attention_heads": width // 8, "num_key_value_heads": width // 8},
        **{"head_dim": 8, "vocab_size": 384, "tie_word_embeddings": True, "max_position_embeddings": 64},
    }
    path.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pages begin with, made by the quickstart's commands."""
    folder = tmp_path_factory.mktemp("shelf")
    write_pages(folder / "pages.jsonl", num_pages=60)
    texts = [json.loads(line)["text"] for line in (folder / "pages.jsonl").read_text().splitlines()]
    (folder / "book.txt").write_text("\n\n".join(texts[:40]))
    (folder / "other.txt").write_text("\n\n".join(texts[40:]))
    (folder / "books").mkdir()
    for place, text in enumerate(texts):
        (folder / "books" / f"{place}.txt").write_text(text)
    turns = [({"role": "user", "content": text[:20]}, {"role": "assistant", "content": text[20:]}) for text in texts]
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": two}) + "\n" for two in turns))
    llama(folder / "base.json", width=16, blocks=1)
    for name in ("tiny.json", "large.json"):
        llama(folder / name, width=32, blocks=2)
    walk = Walk(folder)
    for block in shell_blocks(ROOT / "docs" / "quickstart.md"):
        for command in commands(block):
            if command.words[-2:-1] == ("-o",) and command.words[-1] in ("model", "model-whiten", "model-half"):
                walk.shell(command)
    # A tokenizer that was made here has no chat template.
    for model in ("model", "model-half"):
        (folder / model / "chat_template.jinja").write_text(TEMPLATE)
    gc.freeze()  # what the first commands have imported, see tests/conftest.py
    return folder


def shell_blocks(page: Path) -> list[Block]:
    """Those for a shell."""
    return [block for block in blocks(page) if block.language == "bash"]


def begin(name: str, shelf: Path, folder: Path) -> Walk:
    """The folder in which a page is walked: what is given, and the configs that stand for presets."""
    for given in {*GIVEN[name], *ALWAYS}:
        (shutil.copytree if (shelf / given).is_dir() else shutil.copyfile)(shelf / given, folder / given)
    return Walk(folder)


def walk_page(page: Path, walk: Walk) -> set[str]:
    """Run all blocks; the entries of `NOT_RUN` that were met."""
    met: set[str] = set()
    for block in blocks(page):
        if block.language == "bash":
            met |= {listed for command in commands(block) if (listed := walk.shell(command)) is not None}
        elif block.language == "python":
            walk.python(block.place, block.text)
        elif name := file_named_before(block):
            (walk.folder / name).write_text(block.text)
    return met


def file_named_before(block: Block) -> str:
    """The file that a block is, where the line before it ends in its name: `recipe.yaml`:"""
    before = "\n".join(block.page.read_text().splitlines()[: block.line - 1]).rstrip("`").rstrip().removesuffix("```")
    found = re.search(r"`([\w.-]+)`:\s*(?:```\w*)?\s*$", before)
    return found[1] if found else ""


def test_every_page_with_a_block_is_listed() -> None:
    assert {str(page.relative_to(ROOT)) for page in PAGES if blocks(page)} == set(GIVEN)


@pytest.mark.parametrize("name", [name for name in GIVEN if name not in ADDING])
def test_page(name: str, shelf: Path, tmp_path: Path, met: dict[str, set[str]]) -> None:
    page, walk = ROOT / name, begin(name, shelf, tmp_path)
    met[name] = walk_page(page, walk)
    printed = set(headers(walk.printed))
    for block in blocks(page):
        for header in headers(block.text) if block.language == "text" else ():
            assert header in printed, f"{block.place}: no such table: {header}"
    if name == "docs/format.md":
        check_reader(walk.names["dense_weights"], shelf)


def check_reader(dense_weights: Any, shelf: Path) -> None:
    """The reader on the page of the format makes the weights that the layers have."""
    forms = set()
    for folder in ("model-half", "model-whiten"):
        weights, model = dense_weights(shelf / folder), AutoModelForCausalLM.from_pretrained(shelf / folder)
        for path, layer in model.named_modules():
            if isinstance(layer, LowRankLinear | PivotedLinear):
                forms.add(type(layer))
                torch.testing.assert_close(weights[f"{path}.weight"], layer.dense_weight().detach(), atol=1e-5, rtol=0)
    assert forms == {LowRankLinear, PivotedLinear}


@pytest.fixture(scope="module")
def met() -> dict[str, set[str]]:
    """Page that was walked -> entries of `NOT_RUN` that it had a use for."""
    return {}


@pytest.mark.parametrize("name", ADDING)
def test_commands_of_a_page_whose_code_is_run_elsewhere(name: str, tmp_path: Path, met: dict[str, set[str]]) -> None:
    for block in shell_blocks(ROOT / name):
        for command in commands(block):
            if command.words[0] == "lowrank":
                parse(list(command.words[1:]))
            else:
                listed = Walk(tmp_path).shell(command)
                assert listed is not None
                met.setdefault(name, set()).add(listed)


def test_the_list_of_what_is_not_run_has_no_entry_too_many(met: dict[str, set[str]]) -> None:
    if met.keys() != GIVEN.keys():
        pytest.skip("not all pages have been walked before")
    assert set().union(*met.values()) == set(NOT_RUN)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_fences_are_closed_and_of_a_known_language(page: Path) -> None:
    text = page.read_text()
    assert text.count("```") == 2 * len(FENCE.findall(text))
    assert {block.language for block in blocks(page)} <= {"bash", "python", "text", "yaml", "json"}


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("lowrank compress model --keeep 0.5", "exit code 2"),
        ("lowrank analyze no-such-model", "exit code 2"),
        ("lowrank trian model", "exit code 2"),
        ("make all", "neither run here nor in NOT_RUN"),
        ("torchrun --nproc-per-node 2 --no-python lowrank train --model-config 1m --stepss 5", "No such option"),
        ("python evals/run.py no-such-experiment", "no-such-experiment"),
        ("python examples/no_such.py", "no_such.py"),
        ("vllm serve model | tee log", "not understood"),
    ],
)
def test_what_is_wrong_on_a_page_is_found(line: str, error: str, tmp_path: Path) -> None:
    """The harness can fail."""
    page = tmp_path / "page.md"
    page.write_text(f"```bash\n{line}\n```\n")
    with pytest.raises((AssertionError, click.ClickException, ValueError), match=re.escape(error)):
        walk_page(page, Walk(tmp_path))
