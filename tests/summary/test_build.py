"""What the page says of real results: each figure stands where it was measured."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowrank_kit.errors import LowRankError
from lowrank_kit.report.page import Picture, Table, Text
from lowrank_kit.summary.build import build_page
from lowrank_kit.summary.compression import compression_parts
from lowrank_kit.summary.experiments import experiment_parts
from lowrank_kit.summary.find import Found, find_documents
from lowrank_kit.summary.models import Models, overview
from lowrank_kit.summary.scaling import scaling_parts
from lowrank_kit.summary.spectra import spectra_parts
from lowrank_kit.summary.speed import speed_parts
from lowrank_kit.summary.training import training_section
from tests.results import DENSE, make_results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_results(tmp_path_factory.mktemp("build"))


@pytest.fixture(scope="module")
def documents(results: Path) -> list[Found]:
    return find_documents([results])


def of(documents: list[Found], kind: str) -> list[Found]:
    return [one for one in documents if one.kind == kind]


def test_all_kinds_are_found(documents: list[Found]) -> None:
    assert sorted(one.kind for one in documents) == sorted(
        ["run", "spectra", "compression", "compression", "eval", "bench", "check", "sweep", "experiment"]
    )


def test_speed_has_a_row_for_each_model_and_batch(documents: list[Found]) -> None:
    (one,) = of(documents, "bench")
    _, table = speed_parts(one)
    assert isinstance(table, Table)
    rows: list[Any] = list(table.rows)
    assert [(row["model"], row["batch"]) for row in rows] == [
        (model["label"], batch) for batch in (1, 2) for model in one.document["models"]
    ]
    for row, measured in zip(rows, one.document["rows"], strict=True):
        assert row["decode tokens/s"] == measured["decode"]["tokens_per_s"]["median"]
        assert row["prefill largest"] == (measured["prefill"]["ratio"] or {}).get("max")
        assert (row["prefill FLOPs"] < 1) == (row["model"] != one.document["models"][0]["label"])


def test_models_have_a_row_for_each_text(documents: list[Found], results: Path) -> None:
    table, front = overview(Models(documents))
    assert isinstance(table, Table)
    scored = {Path(row["model"]).name: row for row in json.loads((results / "eval.json").read_text())["models"]}
    rows: list[Any] = [row for row in table.rows if row.get("reference_kl_nats") is not None]
    assert [Path(row["model"]).name for row in rows] == [DENSE, "keep-0.8", "keep-0.5"]
    for row in rows:
        known = scored[Path(row["model"]).name]
        for key in ("parameters", "bytes", "loss", "perplexity", "bits_per_byte", "reference_kl_nats"):
            assert row[key] == known[key]
    assert [row["optimizer"] for row in rows] == ["numuon"] * 3
    assert [row["method"] for row in rows] == ["dense", "plain", "whiten"]
    assert rows[2]["from"] == f"results/{DENSE}"
    assert rows[2]["keep"] < 0.5 < rows[1]["keep"] < 0.8
    own = next(row for row in table.rows if row.get("reference_kl_nats") is None)
    assert own["loss"] == json.loads((results / DENSE / "run.json").read_text())["validation_loss"]
    assert own["text"] != rows[0]["text"]
    assert isinstance(front, Picture)


def test_the_front_has_a_curve_for_each_method(documents: list[Found]) -> None:
    front = overview(Models(documents))[1]
    assert isinstance(front, Picture)
    axes = front.figure.axes[0]
    curves = {str(line.get_label()): np.asarray(line.get_xdata()).tolist() for line in axes.lines}
    sizes = {Path(model.name).name: model.facts["bytes"] / 1e6 for model in Models(documents)}
    assert curves[f"results/{DENSE}, plain"] == sorted([sizes["keep-0.8"], sizes[DENSE]])
    assert curves[f"results/{DENSE}, whiten"] == sorted([sizes["keep-0.5"], sizes[DENSE]])


def test_training_curves_are_those_of_the_log(documents: list[Found], results: Path) -> None:
    _, curves, ranks = training_section(of(documents, "run")).parts
    log = [json.loads(line) for line in (results / DENSE / "log.jsonl").read_text().splitlines()]
    assert isinstance(curves, Picture)
    assert isinstance(ranks, Picture)
    for axes, key in zip(curves.figure.axes, ("loss", "validation_loss", "lr"), strict=True):
        (line,) = axes.lines
        assert np.asarray(line.get_ydata()).tolist() == [row[key] for row in log if row.get(key) is not None]
    drawn = ranks.figure.axes[0].lines[0]
    assert np.asarray(drawn.get_ydata()).tolist() == [
        row["effective_rank"]["q"] for row in log if "effective_rank" in row
    ]


def test_compression_shows_ranks_and_errors(documents: list[Found], results: Path) -> None:
    one = of(documents, "compression")[0]
    heat, depth = [part for part in compression_parts(one) if isinstance(part, Picture)]
    cells = heat.figure.axes[0].images[0].get_array()
    matrices = one.document["matrices"]
    assert cells is not None
    assert cells.shape == (7, 2)
    first = next(row for row in matrices if row["role"] == "q" and row["block"] == 1)
    assert cells[0, 1] == pytest.approx((first["rank"] or 32) / 32)
    errors = {line.get_label(): line for line in depth.figure.axes[1].lines}
    assert len(errors) == 7
    assert np.asarray(depth.figure.axes[1].lines[0].get_ydata()).tolist() == [
        row["relative_error"] for row in matrices if row["role"] == "q" and row["relative_error"] is not None
    ]


def test_spectra_of_two_models_are_set_against_each_other(documents: list[Found]) -> None:
    pictures = [part.alt for part in spectra_parts(of(documents, "spectra")[0]) if isinstance(part, Picture)]
    assert len(pictures) == 6
    assert pictures[-1] == f"Effective rank of keep-0.5 less that of {DENSE}"


def test_checks_and_sweeps_have_their_verdict(documents: list[Found]) -> None:
    for one in (*of(documents, "check"), *of(documents, "sweep")):
        parts = scaling_parts(one)
        verdicts = [part.verdict for part in parts if isinstance(part, Text)]
        made = one.document.get("checks", {"sweep": one.document})
        assert verdicts == ["PASS" if each["passed"] else "FAIL" for each in made.values()]
        assert sum(isinstance(part, Picture) for part in parts) == len(verdicts)


def test_where_it_comes_from_stands_below(documents: list[Found], results: Path) -> None:
    text = unescape(re.sub(r"<[^>]*>", " ", build_page([of(documents, "run")[0], *of(documents, "experiment")])))
    run = json.loads((results / DENSE / "run.json").read_text())
    for wanted in (run["environment"]["torch"], run["corpus"]["sha256"], "data.text.txt", "5eed", "c0ffee"):
        assert wanted in text


def test_a_document_that_lacks_a_part_is_told_by_its_file(results: Path, tmp_path: Path) -> None:
    document = json.loads((results / "keep-0.5" / "compression.json").read_text())
    del document["matrices"][3]["rank"]
    (tmp_path / "compression.json").write_text(json.dumps(document))
    with pytest.raises(LowRankError, match=r"compression\.json is damaged \(KeyError: 'rank'\)"):
        build_page(find_documents([tmp_path]))


@pytest.mark.parametrize("count", [1, 2])
def test_a_sweep_that_was_stopped_is_shown_as_far_as_it_is(count: int, results: Path, tmp_path: Path) -> None:
    document = json.loads((results / "sweep" / "sweep.json").read_text())
    cells = [document["cells"][0], {**document["cells"][1], "seed": 1}][:count]
    (tmp_path / "sweep.json").write_text(json.dumps({**document, "cells": cells, "passed": None, "reasons": []}))
    first, *more = scaling_parts(find_documents([tmp_path])[0])
    assert first == Text("Cells are missing: the sweep was not finished.")
    assert len(more) == (0 if count == 1 else 2)


def test_an_experiment_may_have_a_picture_for_each_method() -> None:
    rows = [{"of": "a", "way": "dense", "bytes": 9e6, "loss": 3.0}] + [
        {"of": "a", "way": way, "bytes": size, "loss": loss}
        for way, size, loss in (("one", 3e6, 4.0), ("one", 6e6, 3.5), ("two", 3e6, 5.0))
    ]
    front = {"x": "bytes", "y": "loss", "group": "of", "picture": "way", "in_all": "dense"}
    document = {"name": "it", "title": "It", "form": "small", "rows": rows, "front": front}
    parts = experiment_parts(Found("experiment", Path("results.json"), "results.json", document, ""))
    pictures = [part for part in parts if isinstance(part, Picture)]
    assert [picture.figure.axes[0].get_title(loc="left") for picture in pictures] == [
        "It (small): one",
        "It (small): two",
    ]
    points = [sorted(np.asarray(picture.figure.axes[0].lines[-1].get_xydata()).tolist()) for picture in pictures]
    assert points == [[[3, 4], [6, 3.5], [9, 3]], [[3, 5], [9, 3]]]
