"""What is known of each model, from all documents that speak of it: one row for each model and text."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank_kit.report.page import Measured, Part, Picture, Table, Text
from lowrank_kit.report.plots import pareto_plot
from lowrank_kit.summary.find import Found, reading

MOST_FRONTS = 6
DENSE = "dense"
SCORES = {
    "loss": "loss (nats)",
    "perplexity": "perplexity",
    "bits_per_byte": "bits/byte",
    "reference_kl_nats": "KL (nats)",
    "reference_top1_agreement": "same top-1",
}
COLUMNS = {
    "model": "model",
    "from": "from",
    "optimizer": "optimizer",
    "method": "method",
    "keep": "keep",
    "parameters": "parameters",
    "bytes": "bytes",
    **SCORES,
    "text": "text (sha256)",
}


@dataclass
class Model:
    """A model folder.

    Args:
        name: as it is shown.
        facts: columns but for scores.
        source: name of the model it was compressed from.
        scores: hash of the text -> figures on it; "" for tasks alone.
    """

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    source: str | None = None
    scores: dict[str, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))

    def rows(self) -> Iterator[dict[str, Any]]:
        """One for each text; tasks, which have none, stand in the first."""
        texts = {text: scores for text, scores in self.scores.items() if text} or {"": {}}
        tasks = self.scores.get("", {})
        for index, (text, scores) in enumerate(texts.items()):
            shown = {"model": self.name, "from": self.source, **self.facts, "text": text[:12] or None}
            yield {**shown, **scores, **(tasks if index == 0 else {})}


class Models:
    """All models that documents speak of, by folder where that is there, else by the name they are called."""

    def __init__(self, documents: Sequence[Found]) -> None:
        self._models: dict[Path | str, Model] = {}
        self._shown = {one.folder: one.name for one in documents if one.kind in ("run", "compression")}
        add = {"run": self._run, "compression": self._compression, "eval": self._eval, "quickstart": self._quickstart}
        for kind, function in add.items():
            for one in documents:
                if one.kind == kind:
                    with reading(one):
                        function(one)

    def __iter__(self) -> Iterator[Model]:
        """Each dense model, then what was compressed from it, the largest first."""
        place = {model.name: index for index, model in enumerate(self._models.values())}

        def order(model: Model) -> tuple[int, bool, float]:
            source = model.source or model.name
            return place.get(source, len(place)), model.source is not None, -(model.facts.get("bytes") or 0)

        return iter(sorted(self._models.values(), key=order))

    def _at(self, named: str, beside: Path) -> Model:
        """The model that a document in the folder `beside` calls so."""
        places = [Path(named), beside / named, beside.parent / named]
        known = [place.resolve() for place in places if place.resolve() in self._shown]
        alike = [folder for folder in self._shown if folder.name == Path(named).name]
        folder = known[0] if known else alike[0] if len(alike) == 1 else None
        key: Path | str = named if folder is None else folder
        name = named if folder is None else self._shown[folder]
        return self._models.setdefault(key, Model(name))

    def _run(self, one: Found) -> None:
        document, model = one.document, self._at(str(one.folder), one.folder)
        model.facts |= {"optimizer": document["settings"].get("optimizer"), "method": DENSE}
        model.facts |= {"parameters": document.get("parameters"), "bytes": _weight_bytes(one.folder)}
        if (loss := document.get("validation_loss")) is not None:
            text = (document.get("corpus") or {}).get("heldout_blocks_sha256", "")
            model.scores[text] |= {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    def _compression(self, one: Found) -> None:
        document, model = one.document, self._at(str(one.folder), one.folder)
        source = self._at(str(document.get("model")), one.folder)
        settings, totals = document["settings"], document["totals"]
        model.source = source.name
        model.facts |= {
            "optimizer": source.facts.get("optimizer"),
            "method": method_of(settings),
            "keep": totals["matrix_keep"],
            "parameters": totals["model_numbers_after"],
            "bytes": totals["bytes_after"],
        }
        source.facts.setdefault("method", DENSE)
        source.facts.setdefault("parameters", totals["model_numbers_before"])
        source.facts.setdefault("bytes", totals["bytes_before"])

    def _eval(self, one: Found) -> None:
        for row in one.document["models"]:
            self._score(self._at(row["model"], one.folder), row)

    def _quickstart(self, one: Found) -> None:
        for row in one.document["models"]:
            kept = "" if row.get("keep") is None else f"-keep-{row['keep']}"
            model = self._at(str(one.folder / f"{row['optimizer']}{kept}"), one.folder)
            task = {
                "value": row.get("accuracy"),
                "stderr": row.get("accuracy_stderr"),
                "task": "cloze",
                "metric": "acc",
            }
            self._score(model, {**row, "tasks": [task] if row.get("accuracy") is not None else []})

    @staticmethod
    def _score(model: Model, row: Mapping[str, Any]) -> None:
        model.facts |= {key: row[key] for key in ("parameters", "bytes") if row.get(key) is not None}
        figures = {key: row[key] for key in SCORES if row.get(key) is not None}
        model.scores[row.get("sha256", "")] |= figures
        for task in row.get("tasks") or []:
            heading = f"{task['task']} {task['metric']}"
            model.scores[""][heading] = Measured(task["value"], task.get("stderr"))


def method_of(settings: Mapping[str, Any]) -> str:
    """Objective, allocation, form and refinement, as far as they are not the plain ones."""
    named = [settings.get("objective"), settings.get("allocation"), settings.get("form"), settings.get("refine")]
    return ", ".join(str(word) for word in named if word not in (None, "uniform", "factors", "none"))


def overview(models: Models) -> list[Part]:
    """The table of all models, and a picture of loss against bytes for each text."""
    rows = [row for model in models for row in model.rows()]
    if not rows:
        return []
    named = {key: heading for key, heading in COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    tasks = {key: key for row in rows for key, value in row.items() if isinstance(value, Measured)}
    text = named.pop("text", None)
    columns = {**named, **tasks, **({"text": text} if text else {})}
    caption = "A row for each model and text. Losses of different texts are not to be compared."
    return [Table(rows, columns, caption), *_fronts(models)]


def _fronts(models: Models) -> list[Part]:
    texts = list(dict.fromkeys(text for model in models for text in model.scores if text))
    drawn = [(text, curves) for text in texts if (curves := _curves(models, text))]
    parts: list[Part] = [_front(text, curves) for text, curves in drawn[:MOST_FRONTS]]
    if len(drawn) > MOST_FRONTS:
        parts.append(Text(f"Pictures of {len(drawn) - MOST_FRONTS} further texts are left out."))
    return parts


def _curves(models: Iterable[Model], text: str) -> dict[str, list[tuple[float, float, str]]]:
    """One curve for each dense model and method, from the dense model on; none where there is but one model."""
    points: dict[str, tuple[float, float, str]] = {}
    curves: dict[str, list[str]] = {}
    for model in models:
        loss, size = model.scores.get(text, {}).get("loss"), model.facts.get("bytes")
        if loss is None or size is None:
            continue
        points[model.name] = (size / 1e6, loss, DENSE if model.source is None else "")
        if model.source is not None:
            curves.setdefault(f"{model.source}, {model.facts['method']}", [model.source]).append(model.name)
    drawn = {name for names in curves.values() for name in names}
    curves |= {name: [name] for name in points if name not in drawn}
    found = {label: [points[name] for name in names if name in points] for label, names in curves.items()}
    return found if len(points) > 1 else {}


def _front(text: str, curves: Mapping[str, Sequence[tuple[float, float, str]]]) -> Picture:
    title = f"Loss against bytes, text {text[:12]}"
    figure = pareto_plot(curves, x_label="MB on disk", y_label="held-out loss (nats)", title=title, marked=DENSE)
    return Picture(figure, f"{title}: {len(curves)} curves, the Pareto front of all is marked")


def _weight_bytes(folder: Path) -> int | None:
    """Of the weights as files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) or None
