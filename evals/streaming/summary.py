"""Print the tables of the README from the results that there are.

python evals/streaming/summary.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lowrank_kit.report.tables import amount, markdown_table

HERE = Path(__file__).parent


def main() -> None:
    tables = {"memory": memory_rows, "pace": pace_rows, "kills": kill_rows}
    for name, rows in tables.items():
        if (path := HERE / f"results-{name}.json").exists():
            print(f"{markdown_table(rows(json.loads(path.read_text())))}\n")


def memory_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What was measured, and the bound."""
    bound, both = found["bound"], found["bound"]["its Grams"]
    twice = round(found["bound"]["bound"] + 1.1 * both)
    values = {
        f"weights, {found['blocks']} blocks": found["weights"],
        "peak of resident memory": found["peak"],
        "of it mapped files": found["files"],
        "an idle interpreter that has imported the same": found["idle"],
        "the same command, a model 64 wide": found["without a model"],
        "peak over that": found["peak for the model"],
        **{f"bound: {name}": bound[name] for name in ("weights of a block", "its Grams", "two streams")},
        "bound: these and 10 %": bound["bound"],
        "with the Grams of the check text, too": twice,
        "disk beside the source": found["disk"],
    }
    rows = [{"": name, "bytes": amount(value)} for name, value in values.items()]
    seconds = found["seconds"]
    return [*rows, {"": "seconds", "bytes": "not taken" if seconds is None else f"{seconds:,.0f}"}]


def pace_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Seconds of all rounds, and ratios with their spread."""
    rows = []
    for way, result in found["results"].items():
        for kind in result["rounds"][0]:
            runs = [one[kind] for one in result["rounds"]]
            over = result["over in memory"].get(kind)
            rows.append(
                {
                    "settings": way,
                    "run": kind,
                    "seconds": ", ".join(f"{run['seconds']:.1f}" for run in runs),
                    "peak memory": amount(max(run["peak"] for run in runs)),
                    "over in memory": "" if over is None else "{median:.2f} ({from:.2f} to {to:.2f})".format(**over),
                }
            )
    return rows


def kill_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Kills of each case by what was there when they came."""
    stages = dict.fromkeys(stage.partition(",")[0] for case in found["cases"] for stage in case["killed at"])
    return [
        {
            "settings": case["way"],
            "--spill": "yes" if case["spill"] else "no",
            "kills": case["kills"],
            "outputs": case["outputs"],
            "same bytes": "yes" if case["same bytes"] else "NO",
            **{name: sum(n for at, n in case["killed at"].items() if at.partition(",")[0] == name) for name in stages},
        }
        for case in found["cases"]
    ]


if __name__ == "__main__":
    main()
