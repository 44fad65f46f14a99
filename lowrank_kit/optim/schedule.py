"""Rank schedules: the rank fraction of the step as a function of training progress."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from lowrank_kit.errors import UsageError, did_you_mean

# Rank fraction in (0, 1] of the progress in [0, 1].
RankFraction = Callable[[float], float]
KINDS = ("fixed", "piecewise", "cosine")
GRAMMAR = "fixed:0.25, cosine:1:0.25, cosine:1:0.25:hold=0.1:until=0.8 or piecewise:1@0,0.5@0.3,0.25@0.6"


@dataclass(frozen=True)
class RankSchedule:
    """Rank fraction against progress p in [0, 1].

    fixed: knots = ((0, f),). piecewise: the fraction of the last knot (p_i, f_i) with p_i <= p.
    cosine: start until `hold`, then half a cosine down to end at `until`, then end.

    Args:
        kind: fixed, piecewise or cosine.
        knots: (progress, fraction) pairs, progress ascending from 0; for cosine the start at `hold` and the end at
            `until`.

    Raises:
        UsageError: a fraction outside (0, 1], progress outside [0, 1] or out of order.

    Source: NuMuon (arXiv 2603.03597) names the three kinds; hold 10 % and end at 80 % as in its re-implementations.
    """

    kind: str
    knots: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        for progress, fraction in self.knots:
            if not 0 < fraction <= 1:
                raise UsageError(
                    f"rank fraction must be in (0, 1], got {fraction:g}",
                    hint=f"a rank schedule reads like {GRAMMAR}",
                )
            if not 0 <= progress <= 1:
                raise UsageError(
                    f"progress in a rank schedule must be in [0, 1], got {progress:g}",
                    hint="progress is the share of all steps, for example 0.5@0.3: half the rank from 30 % on",
                )
        places = [progress for progress, _ in self.knots]
        if places != sorted(set(places)):
            raise UsageError(
                f"progress in a rank schedule must ascend, got {places}", hint=f"a rank schedule reads like {GRAMMAR}"
            )
        if self.kind == "piecewise" and places[0] != 0:
            raise UsageError(
                f"a piecewise rank schedule starts at progress 0, got {places[0]:g}",
                hint=f"a rank schedule reads like {GRAMMAR}",
            )

    def fraction(self, progress: float) -> float:
        """Rank fraction at a progress in [0, 1]."""
        if self.kind == "cosine":
            (hold, start), (until, end) = self.knots
            done = min(max((progress - hold) / (until - hold), 0.0), 1.0)
            return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))
        return [fraction for place, fraction in self.knots if place <= progress][-1]

    @classmethod
    def parse(cls, text: str) -> RankSchedule:
        """A schedule from its one-line form.

        Args:
            text: `fixed:F`, `piecewise:F@P,F@P,...` or `cosine:START:END[:hold=P][:until=P]`; a bare number is fixed.

        Raises:
            UsageError: an unknown kind or a number that does not parse.
        """
        kind, _, rest = text.partition(":")
        try:
            if not rest:
                return cls("fixed", ((0.0, float(kind)),))
            if kind == "fixed":
                return cls(kind, ((0.0, float(rest)),))
            if kind == "piecewise":
                pairs = [part.split("@") for part in rest.split(",")]
                return cls(kind, tuple((float(place), float(fraction)) for fraction, place in pairs))
            if kind == "cosine":
                start, end, *options = rest.split(":")
                places = {"hold": 0.1, "until": 0.8}
                for option in options:
                    name, _, value = option.partition("=")
                    places[{"hold": "hold", "until": "until"}[name]] = float(value)
                return cls(kind, ((places["hold"], float(start)), (places["until"], float(end))))
        except (ValueError, KeyError):
            raise UsageError(f'cannot read the rank schedule "{text}"', hint=f"it reads like {GRAMMAR}") from None
        raise UsageError(f'unknown rank schedule "{kind}"', hint=f"{did_you_mean(kind, KINDS)} It reads like {GRAMMAR}")


def fraction_at(schedule: str | RankFraction, progress: float) -> float:
    """Rank fraction of a schedule, in its one-line form or as a function, at a progress in [0, 1].

    Raises:
        UsageError: a function gives a fraction outside (0, 1].
    """
    if isinstance(schedule, str):
        return _parse_once(schedule).fraction(progress)
    fraction = float(schedule(progress))
    if not 0 < fraction <= 1:
        raise UsageError(f"the rank schedule gave a fraction of {fraction:g} at progress {progress:g}, outside (0, 1]")
    return fraction


_parse_once = lru_cache(maxsize=64)(RankSchedule.parse)
