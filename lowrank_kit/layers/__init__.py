"""Low-rank layers and how they get into a model."""

from lowrank_kit.layers.experts import LowRankExperts as LowRankExperts
from lowrank_kit.layers.experts import LowRankStack as LowRankStack
from lowrank_kit.layers.int8 import Int8Linear as Int8Linear
from lowrank_kit.layers.linear import LowRankLinear as LowRankLinear
from lowrank_kit.layers.pivoted import PivotedLinear as PivotedLinear
from lowrank_kit.layers.surgery import INT8 as INT8
from lowrank_kit.layers.surgery import LAYERS as LAYERS
from lowrank_kit.layers.surgery import STACKED as STACKED
from lowrank_kit.layers.surgery import exchange as exchange
from lowrank_kit.layers.surgery import exchange_experts as exchange_experts
from lowrank_kit.layers.surgery import exchange_linear as exchange_linear

# For isinstance.
LOW_RANK_LAYERS = (*LAYERS.values(), LowRankStack)
