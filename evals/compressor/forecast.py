"""How far the forecasts of `lowrank compress` are from what came out, by the runs of methods.py.

    python evals/compressor/forecast.py MODELS

The constants of `lowrank_kit/compression/forecast.py` are what this prints.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from methods import RESULTS, TRIALS, method_settings
from tables import increase

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.compression.allocation import Evidence
from lowrank_kit.compression.calibration import calibrate, loss_evidence
from lowrank_kit.compression.evidence import weight_evidence
from lowrank_kit.compression.plan import Plan, make_plan

REFINED = " + e2e"
ONE_SHOT = TRIALS["best"].removesuffix(REFINED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, help="folder of a quickstart")
    models = parser.parse_args().models
    runs = json.loads(RESULTS.read_text())["runs"]
    rows = [row for optimizer in TRIALS["optimizers"] for row in compared(models / optimizer, optimizer, runs)]
    for row in rows:
        print(json.dumps(row))
    for evidence, outcome in (("tails", "one shot"), ("tails", "refined"), ("cut", "whiten"), ("cut", "refined")):
        print(f"{outcome} = %.3g x {evidence} ^ %.3g, within a factor of %.2g" % law(rows, evidence, outcome))


def law(rows: list[dict[str, float]], evidence: str, outcome: str) -> tuple[float, float, float]:
    """Constant and power of a power law fitted to logarithms, and the largest factor that an outcome is off it."""
    known, found = (np.log([row[name] for row in rows]) for name in (evidence, outcome))
    power, constant = np.polyfit(known, found, 1)
    return math.exp(constant), power, float(np.exp(np.abs(found - constant - power * known).max()))


def compared(folder: Path, optimizer: str, runs: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Outcomes of one checkpoint on held-out text, and what is known of its spectra."""
    checkpoint = Checkpoint.open(folder)
    calibration = calibrate(checkpoint, method_settings(TRIALS["best"], 0.5, 0), curvature=True)
    weights = weight_evidence(checkpoint)
    rows = []
    for keep in TRIALS["keeps"]:
        settings = method_settings(ONE_SHOT, keep, 0).with_defaults()
        scores = loss_evidence(calibration, checkpoint, settings.objective, settings.options)
        plan = make_plan(checkpoint, settings, scores)
        uniform = make_plan(checkpoint, method_settings("whiten", keep, 0).with_defaults())
        outcomes = {name: increase(runs, optimizer, method, keep, "stdlib")[0] for name, method in METHODS.items()}
        rows.append({"keep": keep, **outcomes, "tails": tails(plan, scores), "cut": cut_share(uniform, weights)})
    return rows


METHODS = {"whiten": "whiten", "one shot": ONE_SHOT, "refined": TRIALS["best"]}


def tails(plan: Plan, evidence: dict[str, Evidence]) -> float:
    """Sum of the scores that a plan cuts."""
    known = {m.stored.matrix.name: m.rank for m in plan.matrices if m.rank is not None}
    scores = {name: evidence[name].loss_scores for name in known}
    return sum(float(one[known[name] :].sum()) for name, one in scores.items() if one is not None)


def cut_share(plan: Plan, evidence: dict[str, Evidence]) -> float:
    """Mean over matrices of the share of the energy of W that a plan cuts."""
    shares = []
    for m in plan.matrices:
        values = evidence[m.stored.matrix.name].singular_values
        assert values is not None
        energy = values.double().square()
        shares.append(0.0 if m.rank is None else float(energy[m.rank :].sum() / energy.sum()))
    return sum(shares) / len(shares)


if __name__ == "__main__":
    main()
