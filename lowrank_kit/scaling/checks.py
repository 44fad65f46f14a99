"""Whether a scaling rule does what it promises: what must not go with the size, does it? A number, and PASS or FAIL.

The spectral check looks at the norms of weights and updates, the coordinate check at what the last block gives. A slope
is that of log2 of the mean over blocks against log2 of the width or depth: 0 where nothing goes with the size, 1 where
all is doubled with it. Models without scaling stand beside it, to show that a fault would be seen.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from lowrank_kit.errors import UsageError
from lowrank_kit.scaling.family import Size
from lowrank_kit.scaling.observe import PLAIN, STREAM, Row, Training, observe

# Largest slope that passes, and least slope of the control at which the check sees something: by experiments with
# muP, whose slopes were below .1, and without, where they were 0.8 and more, and 1 to 2.
BOUND = 0.15
SPECTRAL_SEEN, COORDINATE_SEEN = 0.8, 0.5
AXES = {"width": "depth", "depth": "width"}
Key = tuple[str, str, str, int]


@dataclass(frozen=True)
class Check:
    """Slopes with their verdicts.

    Args:
        name: spectral or coordinate.
        slopes: rows of scaling, axis, part, condition, step, slope, bound, verdict, sizes, values (means) and worst.
            The verdict is PASS or FAIL; of the control "seen" or "not seen"; None where nothing is promised.
    """

    name: str
    slopes: list[Row]

    @property
    def failed(self) -> list[Row]:
        """Slopes that fail, the steepest first."""
        found = [row for row in self.slopes if row["verdict"] == "FAIL"]
        return sorted(found, key=lambda row: -abs(row["slope"]) if math.isfinite(row["slope"]) else -math.inf)

    @property
    def passed(self) -> bool:
        return not self.failed

    @property
    def seen(self) -> bool | None:
        """Whether the control shows that a fault would be seen; None without a control."""
        verdicts = [row["verdict"] for row in self.slopes if row["scaling"] == PLAIN and row["verdict"]]
        return all(verdict == "seen" for verdict in verdicts) if verdicts else None

    def sentence(self) -> str:
        """The verdict in words, with the worst of what fails."""
        beside = {
            True: "without scaling it fails, as it should",
            False: "without scaling not all of it fails, so it says little: try more sizes or steps, or another --lr",
            None: "no control",
        }[self.seen]
        if self.passed:
            steepest = max((abs(row["slope"]) for row in self.slopes if row["verdict"] == "PASS"), default=0.0)
            return f"{self.name} check: PASS, largest slope {steepest:.2f} of {BOUND:g} allowed; {beside}"
        worst = self.failed[0]
        return (
            f"{self.name} check: FAIL, {len(self.failed)} slopes, the worst {worst['slope']:+.2f} over {worst['axis']} "
            f"in {worst['part']} {worst['condition']}, furthest off at {worst['worst']}; {beside}"
        )


def spectral_check(rows: Iterable[Row]) -> Check:
    """The four products of condition 3.1 of spectral muP, for each pair of matrices.

        L c R(W2) R(W1), L c R(dW2) R(W1), L c R(W2) R(dW1), L c R(dW2) R(dW1),  R(A) = sqrt(n_in / n_out) |A|_2

    W at the start, dW its change in all steps; c, the multiplier of the branch, is in the weight. Tells k2 from k1,
    which the coordinate check mostly cannot.

    Args:
        rows: of `observe`, for a base and larger sizes, with those of `scaling="SP"` as the control.

    Raises:
        UsageError: fewer than two sizes.

    Source: spectral muP (arXiv 2603.00541), condition 3.1.
    """
    return _check("spectral", [row for row in rows if row["part"] != STREAM], lambda row: True, SPECTRAL_SEEN)


def coordinate_check(rows: Iterable[Row]) -> Check:
    """RMS of what the last block gives after the last step; at the start it is shown, and has no verdict.

    Args, raises: as `spectral_check`.
    """
    kept = [row for row in rows if row["part"] == STREAM]
    return _check("coordinate", kept, lambda row: row["step"] > 0, COORDINATE_SEEN)


def _check(name: str, rows: list[Row], judged: Callable[[Row], bool], seen_from: float) -> Check:
    slopes = _slopes(rows)
    if not slopes:
        raise UsageError(f"the {name} check needs two sizes or more of a width or a depth")
    for row in slopes:
        control = row["scaling"] == PLAIN
        row["bound"] = (seen_from if control else BOUND) if judged(row) else None
        row["verdict"] = _verdict(row["slope"], seen_from if control else None) if judged(row) else None
    return Check(name, slopes)


def _verdict(slope: float, seen_from: float | None) -> str:
    """Of what is not finite: a control that diverges has shown it."""
    if seen_from is not None:
        return "not seen" if abs(slope) < seen_from else "seen"
    return "PASS" if abs(slope) <= BOUND else "FAIL"


def _slopes(rows: Iterable[Row]) -> list[Row]:
    groups: dict[Key, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["scaling"], row["part"], row["condition"], row["step"]].append(row)
    found = [_slope(axis, key, members) for axis in AXES for key, members in groups.items()]
    return [row for row in found if row is not None]


def _slope(axis: str, key: Key, rows: list[Row]) -> Row | None:
    """Least squares over the sizes of an axis, at the least of the other; None with one size."""
    other = AXES[axis]
    least = min(row[other] for row in rows)
    by_size: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        if row[other] == least:
            by_size[row[axis]].append(row)
    if len(by_size) < 2:
        return None
    sizes = sorted(by_size)
    values = [sum(row["value"] for row in by_size[size]) / len(by_size[size]) for size in sizes]
    scaling, part, condition, step = key
    return {
        "scaling": scaling,
        "axis": axis,
        "part": part,
        "condition": condition,
        "step": step,
        "slope": _fit(sizes, values),
        "sizes": sizes,
        "values": values,
        "worst": _worst(axis, by_size, values[0]),
    }


def _fit(sizes: list[int], values: list[float]) -> float:
    if not all(0 < value < math.inf for value in values):
        return math.nan
    return float(np.polyfit(np.log2(sizes), np.log2(values), 1)[0])


def _worst(axis: str, by_size: Mapping[int, list[Row]], base: float) -> str:
    """The block of a size that is the furthest from the mean of the least one, up or down."""

    def far(row: Row) -> float:
        value = row["value"] / base if base else math.nan
        return abs(math.log2(value)) if 0 < value < math.inf else math.inf

    size, row = max(((size, row) for size, rows in by_size.items() for row in rows), key=lambda pair: far(pair[1]))
    where = f"{axis} {size}, block {row['block']}"
    return f"{where} ({row['value'] / base:.2g} times the base's)" if far(row) < math.inf else f"{where} (not finite)"


def run_checks(
    config: PreTrainedConfig,
    sizes: Sequence[Size],
    batches: Sequence[Tensor],
    training: Training,
    *,
    scalings: Sequence[str] = ("k2", PLAIN),
    seeds: int = 1,
    device: torch.device | None = None,
) -> tuple[list[Row], list[Check]]:
    """Train every size in each scaling and with each seed; what was measured, and the two checks of it.

    Args:
        seeds: how many, from that of `training` on; slopes are of the means.
        config, sizes, batches, training, scalings, device: see `observe`.
    """
    rows = [
        row
        for scaling in scalings
        for seed in range(training.seed, training.seed + seeds)
        for row in observe(config, sizes, batches, replace(training, seed=seed), scaling=scaling, device=device)
    ]
    return rows, [spectral_check(rows), coordinate_check(rows)]


def slope_rows(check: Check) -> list[dict[str, Any]]:
    """A row for each axis, part and condition, for a table: a column of slopes for each scaling, and the verdict."""
    made: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in check.slopes:
        place = tuple(row[name] for name in ("axis", "part", "condition", "step"))
        one = made.setdefault(place, dict(zip(("over", "part", "what", "step"), place, strict=True)))
        one[row["scaling"]] = row["slope"]
        if row["scaling"] != PLAIN and row["verdict"]:
            one["verdict"] = "FAIL" if "FAIL" in (row["verdict"], one.get("verdict")) else "PASS"
            one["worst"] = row["worst"]
    return list(made.values())
