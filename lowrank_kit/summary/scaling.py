"""Results of `lowrank scale check` and `lowrank scale sweep`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowrank_kit.report.files import finite
from lowrank_kit.report.page import Part, Picture, Table, Text
from lowrank_kit.scaling.checks import Check, slope_rows
from lowrank_kit.scaling.family import Size
from lowrank_kit.scaling.picture import draw
from lowrank_kit.scaling.transfer import MUP, RULES, Grid, Sweep
from lowrank_kit.scaling.write import check_plot
from lowrank_kit.summary.find import Found

PASS, FAIL = "PASS", "FAIL"


def scaling_parts(one: Found) -> list[Part]:
    """Verdicts, pictures and tables of a check or a sweep."""
    return _check(one) if one.kind == "check" else _sweep(one)


def _check(one: Found) -> list[Part]:
    parts: list[Part] = []
    for name, found in one.document["checks"].items():
        check = Check(name, [_with_numbers(row) for row in found["slopes"]])
        verdict = PASS if found["passed"] else FAIL
        parts.append(Text(found["verdict"].replace(f" {verdict},", ""), verdict))
        parts.append(Picture(check_plot(check), f"{name} check: what should not go with the size, against the size"))
        parts.append(Table(finite(slope_rows(check)), caption=f"Slopes of the {name} check over the size, 0 is right"))
    return parts


def _with_numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no numbers that are not finite."""
    values = [float("nan") if value is None else value for value in row["values"]]
    return {**row, "slope": float("nan") if row["slope"] is None else row["slope"], "values": values}


def _sweep(one: Found) -> list[Part]:
    document, passed = one.document, one.document.get("passed")
    unfinished = Text("Cells are missing: the sweep was not finished.")
    if len({(cell["width"], cell["depth"]) for cell in document["cells"]}) < 2:
        return [unfinished]
    sweep = _read(one)
    reasons = "; ".join(document.get("reasons") or []) or "the base's best learning rate serves the other sizes"
    parts: list[Part] = [unfinished if passed is None else Text(reasons, PASS if passed else FAIL)]
    title = f"Loss against the learning rate, {one.name}"
    figure = draw(sweep, title)
    parts.append(Picture(figure, f"{title}: log2 of the rate, a line for each size, optima marked"))
    return [
        *parts,
        Table(finite(sweep.rows()), caption="Optimum by size; shift in log2, regret in nats, against the base"),
    ]


def _read(one: Found) -> Sweep:
    """The sweep, with the grid that its cells have."""
    settings = dict(one.document["settings"])
    cells = one.document["cells"]
    base = Size(*map(int, settings["base"].split(" x ")))
    rates = tuple(settings.pop("log2_rates"))
    settings.pop("base")
    sizes = {Size(cell["width"], cell["depth"]) for cell in cells}
    # the base is trained first: without it a seed tells nothing
    seeds = tuple(sorted({cell["seed"] for cell in cells if (cell["width"], cell["depth"]) == base}))
    rules = tuple(rule for rule in RULES if rule == MUP or any(cell["rule"] == rule for cell in cells))
    widths = tuple(sorted({size.width for size in sizes} - {base.width}))
    depths = tuple(sorted({size.depth for size in sizes} - {base.depth}))
    controls = tuple(sorted({cell["seed"] for cell in cells if cell["rule"] != MUP} & set(seeds))) or None
    return Sweep(Grid(base, widths, depths, rates, seeds, rules, controls), one.path, settings)
