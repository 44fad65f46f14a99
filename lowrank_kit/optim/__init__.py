"""NuMuon and its family, rank schedules and routing."""

from lowrank_kit.optim.numuon import NuMuon as NuMuon
from lowrank_kit.optim.routing import NuMuonFactory as NuMuonFactory
from lowrank_kit.optim.routing import parameter_groups as parameter_groups
from lowrank_kit.optim.routing import parse_overrides as parse_overrides
from lowrank_kit.optim.routing import routing_table as routing_table
from lowrank_kit.optim.schedule import RankSchedule as RankSchedule
