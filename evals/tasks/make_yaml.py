"""Write the task files of BLiMP and MMLU, one for each benchmark file in the data folder, and their groups.

    LOWRANK_EVAL_DATA=DIR python evals/tasks/make_yaml.py

The prompts and metrics are in _blimp_yaml and _mmlu_yaml.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

BLIMP_PHENOMENA = 67
GROUP_METRIC = "aggregate_metric_list:\n  - metric: acc\n    aggregation: mean\n    weight_by_size: {by_size}\n"


def main() -> int:
    """Write to the folder of this file, or to another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, default=Path(__file__).parent)
    output = parser.parse_args().output
    folder = os.environ.get("LOWRANK_EVAL_DATA", "")
    phenomena = sorted(path.stem for path in Path(folder, "blimp").glob("*.jsonl"))
    subjects = sorted(path.name.removesuffix("_test.csv") for path in Path(folder, "mmlu_subset").glob("*_test.csv"))
    if not folder or not phenomena or not subjects:
        print("error: LOWRANK_EVAL_DATA names no folder with blimp/*.jsonl and mmlu_subset/*_test.csv", file=sys.stderr)
        return 2
    write_blimp(output / "blimp", phenomena)
    write_mmlu(output / "mmlu", subjects)
    return 0


def write_blimp(folder: Path, phenomena: list[str]) -> None:
    """One task for each phenomenon, and the group: the mean over phenomena, as in lm-eval's."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in phenomena:
        text = f"include: ../_blimp_yaml\ntask: blimp_{name}\ndataset_kwargs:\n  file: blimp/{name}.jsonl\n"
        (folder / f"{name}.yaml").write_text(text)
    alias = f"blimp ({len(phenomena)} of {BLIMP_PHENOMENA} phenomena)"
    write_group(folder, "blimp", alias, [f"blimp_{name}" for name in phenomena], by_size=False)


def write_mmlu(folder: Path, subjects: list[str]) -> None:
    """One task for each subject, and the group: the mean over questions."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in subjects:
        words = name.replace("_", " ")
        (folder / f"{name}.yaml").write_text(
            f"include: ../_mmlu_yaml\ntask: mmlu_{name}\ntask_alias: {name}\n"
            f'description: "The following are multiple choice questions (with answers) about {words}.\\n\\n"\n'
            f"dataset_kwargs:\n  file: mmlu_subset/{name}_test.csv\n"
        )
    alias = f"mmlu ({len(subjects)} subjects)"
    write_group(folder, "mmlu_subset", alias, [f"mmlu_{name}" for name in subjects], by_size=True)


def write_group(folder: Path, name: str, alias: str, tasks: list[str], *, by_size: bool) -> None:
    """A group file; `by_size`: its score is the mean over all documents, not over tasks."""
    members = "".join(f"  - {task}\n" for task in tasks)
    metric = GROUP_METRIC.format(by_size=str(by_size).lower())
    (folder / "_group.yaml").write_text(f"group: {name}\ngroup_alias: {alias}\ntask:\n{members}{metric}")


if __name__ == "__main__":
    sys.exit(main())
