"""Make an lm-eval cloze task out of the held-out part of a text source.

    python evals/make_cloze.py -o tasks                          # the standard library
    python evals/make_cloze.py --text my.jsonl -o tasks --name my_cloze
    lowrank eval MODEL --tasks my_cloze --include-path tasks

The split is that of `lowrank train` for the same source: no question is from text that such a model was trained on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lowrank_kit.data.corpus import load_corpus
from lowrank_kit.errors import LowRankError
from lowrank_kit.evaluation.cloze import make_cloze, write_cloze_task


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", metavar="SOURCE", help="text source (default: the standard library)")
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="folder to write the task to")
    parser.add_argument("--name", default="stdlib_cloze", help="task name (default: %(default)s)")
    parser.add_argument("--items", metavar="N", type=int, default=400, help="questions (default: %(default)s)")
    parser.add_argument(
        "--context-chars",
        metavar="N",
        type=int,
        default=320,
        help="characters of context at most (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the questions (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        corpus = load_corpus(arguments.text)
        rows = make_cloze(
            corpus.heldout, num_items=arguments.items, seed=arguments.seed, context_chars=arguments.context_chars
        )
        write_cloze_task(arguments.output, rows, arguments.name)
    except LowRankError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{len(rows)} questions from {len(corpus.heldout)} held-out documents of {corpus.source}")
    print(f"task {arguments.name} in {arguments.output}, corpus sha256 {corpus.sha256}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
