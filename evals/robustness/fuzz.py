"""Ten thousand cases of what tests/fuzz tries a few of: damaged files, wrong settings, senseless command lines.

    python evals/robustness/fuzz.py

For each property the number of cases, what became of them, and the failures that hypothesis found, each as small as it
could make it. Ends with 1 where there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
# Before any import of a Hugging Face library: they read these once. What looks for a model elsewhere finds none.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch  # noqa: E402
from hypothesis import HealthCheck, given, seed, settings  # noqa: E402

from lowrank_kit.report.environment import environment  # noqa: E402
from lowrank_kit.report.files import write_json  # noqa: E402
from lowrank_kit.report.tables import markdown_table  # noqa: E402
from tests.fuzz.place import Place  # noqa: E402
from tests.fuzz.properties import FUZZES  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(FUZZES), action="append")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results-fuzz.json")
    parser.add_argument("--show", action="store_true", help="print the table of the results that there are")
    arguments = parser.parse_args()
    if arguments.show:
        found: dict[str, Any] = json.loads(arguments.output.read_text())
        print(markdown_table([row(name, one) for name, one in found["properties"].items()]))
        return
    torch.set_num_threads(1)
    found = {"cases": 0, "failures": 0, "seconds": 0, "seed": arguments.seed, "threads": 1}
    found |= {"properties": {}, "environment": environment()}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["LOWRANK_CACHE"] = f"{scratch}/cache"
        (Path(scratch) / "place").mkdir()
        place = Place(Path(scratch) / "place")
        started = time.perf_counter()
        for name in arguments.only or FUZZES:
            result = tried(name, place, round(FUZZES[name].many * arguments.cases / 10_000), arguments.seed)
            found["properties"][name] = result
            found["cases"] += sum(result["became"].values())
            found["failures"] += len(result["failures"])
            found["seconds"] = round(time.perf_counter() - started)
            print(name, json.dumps(result), flush=True)
            write_json(arguments.output, found)
    sys.exit(found["failures"] > 0)


def row(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """What is told of a property in the table."""
    became = ", ".join(f"{what} {count}" for what, count in result["became"].items())
    cases = sum(result["became"].values())
    return {"property": name, "cases": cases, "failures": len(result["failures"]), "what became of them": became}


def tried(name: str, place: Place, cases: int, first_seed: int) -> dict[str, Any]:
    """So many cases of a property."""
    fuzz, became, failures = FUZZES[name], Counter[str](), list[str]()

    @seed(first_seed)
    @settings(
        max_examples=cases, database=None, deadline=None, suppress_health_check=list(HealthCheck), print_blob=False
    )
    @given(fuzz.cases)
    def check(case: object) -> None:
        became["failed"] += 1  # unless it comes to the next line but one
        what = fuzz.check(place, case)
        became["failed"] -= 1
        became[what] += 1

    started = time.perf_counter()
    try:
        check()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        failures.append("".join(traceback.format_exception(error))[-4000:])
    return {
        "asked": cases,
        "became": dict(sorted((+became).items())),
        "failures": failures,
        "seconds": round(time.perf_counter() - started, 1),
    }


if __name__ == "__main__":
    main()
