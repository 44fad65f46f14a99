"""The page of the checkpoint format says what the code writes: names, shapes, dtypes and versions."""

from __future__ import annotations

import re

from lowrank_kit.checkpoint import quantizer
from lowrank_kit.compression.forms import FORMS
from lowrank_kit.layers.experts import PROJECTIONS, sentinel_shape
from tests.docs.blocks import ROOT

PAGE = (ROOT / "docs" / "format.md").read_text()
SIZES = {"out": 7, "in": 5, "r": 3}


def section(name: str) -> str:
    """The text below a heading."""
    return PAGE.split(f"\n## {name}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of the tables of a text, without their headings."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [cells for cells in lines if cells[0].startswith("`")]


def size(side: str) -> int:
    """A side of a shape, such as "out - r"."""
    first, *less = (int(word) if word.isdecimal() else SIZES[word] for word in side.strip().split(" - "))
    return first - sum(less)


def test_tensors_of_a_matrix() -> None:
    for name, form in FORMS.items():
        told = {
            (cells[0].strip("`"), tuple(size(side) for side in cells[1].strip("[]").split(",")))
            for cells in rows(section(name))
            if not cells[0].endswith("bias`")
        }
        written = form.tensors("X", "BF16", (SIZES["out"], SIZES["in"]), SIZES["r"])
        assert told == {(tensor, shape) for tensor, _, shape in written}
        integers = {tensor for tensor, dtype, _ in written if dtype == "I32"}
        assert integers == {cells[0].strip("`") for cells in rows(section(name)) if cells[2] == "int32"}


def test_tensors_of_experts() -> None:
    names = {name for cells in rows(section("stacked")) for name in re.findall(r"`P\.(\w+)\.[AB]`", cells[0])}
    assert names == set(PROJECTIONS.values())
    for projection in ("gate_up_proj", "down_proj"):
        assert f"`P.{projection}` {list(sentinel_shape(projection))}" in " ".join(section("stacked").split())


def test_versions() -> None:
    told = {
        form: int(cells[1])
        for cells in rows(section("quantization_config"))
        if cells[1].isdecimal()
        for form in re.findall(r"`([^`]+)`", cells[0])
    }
    assert told == quantizer.FORMS
    keys = {cells[0].strip("`") for cells in rows(section("quantization_config")) if not cells[1].isdecimal()}
    config = quantizer.LowRankConfig({"x": {"rank": 2, "form": "factors"}})
    assert keys == set(config.to_dict())
