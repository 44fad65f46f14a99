"""What a factorization minimizes. A new objective is a file here and a line in the table."""

from lowrank_kit.compression.objectives.anchored import ANCHORED, ANCHORED_TWO_SIDED
from lowrank_kit.compression.objectives.base import Objective as Objective
from lowrank_kit.compression.objectives.base import Options as Options
from lowrank_kit.compression.objectives.base import Statistics as Statistics
from lowrank_kit.compression.objectives.plain import PLAIN
from lowrank_kit.compression.objectives.scaled import SCALED
from lowrank_kit.compression.objectives.two_sided import TWO_SIDED
from lowrank_kit.compression.objectives.whiten import WHITEN

OBJECTIVES: dict[str, Objective] = {
    "plain": PLAIN,
    "scaled": SCALED,
    "whiten": WHITEN,
    "anchored": ANCHORED,
    "two-sided": TWO_SIDED,
    "anchored-two-sided": ANCHORED_TWO_SIDED,
}
