"""Spectral muP: settings tuned on a small model, for a wide and deep one."""

from lowrank_kit.scaling.branches import Fold as Fold
from lowrank_kit.scaling.branches import find_folds as find_folds
from lowrank_kit.scaling.granite import to_granite as to_granite
from lowrank_kit.scaling.mup import MuP as MuP
from lowrank_kit.scaling.parts import Part as Part
from lowrank_kit.scaling.parts import find_parts as find_parts
from lowrank_kit.scaling.rules import DEPTH_RULES as DEPTH_RULES
from lowrank_kit.scaling.rules import STEPS as STEPS
from lowrank_kit.scaling.rules import Fans as Fans
from lowrank_kit.scaling.rules import Ratios as Ratios
from lowrank_kit.scaling.rules import ratios as ratios
from lowrank_kit.scaling.sidecar import load_rule as load_rule
from lowrank_kit.scaling.sidecar import save_rule as save_rule
