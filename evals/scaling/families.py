"""Scale a tiny model of every family in tests to twice its width and depth, and write what comes of it to a page.

python -m evals.scaling.families [FAMILY ...]     from the root of the repository; of some families it prints the rows
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers

from lowrank_kit.report.files import write_text
from lowrank_kit.report.tables import markdown_table
from tests.scaling.families import PASSED, all_families, outcome_of, rows

TABLE = Path(__file__).parents[2] / "docs" / "scaling-architectures.md"
ABOVE = """\
# Architectures that can be scaled

What `lowrank_kit.scaling.MuP` does with a model of each family, as
[`evals/scaling/families.py`](../evals/scaling/families.py) found with tiny random ones, in transformers {version};
`python -m evals.scaling.families` writes this page anew. Each is scaled to twice the width and twice the depth.
Passed: every parameter has a rule; with all ends of branches zero every block is the identity, and with one end
alone and halved what its branch adds is halved, in float64; the model is built. The multiplier of the branches is
folded into their last matrices, or into the gains of norms that come after these; that of the logits into the head,
or, where it is tied to the embeddings, into the gain before it; and where an architecture multiplies its embeddings
by sqrt(width), what undoes that into the embeddings. Refused is what has parts that spectral muP has no rule for.
{passed} pass, {experts} of these with experts; {refused} are refused. The families in bold are tested with every
change.

"""


def main(wanted: list[str]) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    outcomes = {family: outcome_of(family) for family in wanted or all_families()}
    table = markdown_table(list(rows(outcomes)))
    if wanted:
        print(table)
        return
    passed = [outcome for outcome in outcomes.values() if outcome.way == PASSED]
    above = ABOVE.format(
        version=transformers.__version__,
        passed=len(passed),
        experts=sum(outcome.has_experts for outcome in passed),
        refused=len(outcomes) - len(passed),
    )
    write_text(TABLE, above + table + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
