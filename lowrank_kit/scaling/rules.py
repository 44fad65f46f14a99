"""How learning rate, decay, eps and initial std of a tensor go with width and depth, in spectral muP.

Symbols: i and o are the ratios target / base of a tensor's fan-in n_in and fan-out n_out, L that of the depths, c what
is folded into a tensor. R(A) = sqrt(n_in / n_out) |A|_2 is the RMS operator norm of a matrix, the RMS of a vector.

A step changes R of a tensor by R(update) times the learning rate. The rates are such that this is constant in width,
and in depth what the depth rule says. All else follows from how large an optimizer's update is, and a gradient.

Source: spectral muP (arXiv 2603.00541), conditions 3.1 and B.1, tables 1 to 13. Deviations, derived and not run there:
fans of any ratio in place of one width, norm gains, routers (hidden matrices of fixed fan-out), spectral decay, NuMuon.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from lowrank_kit.errors import UsageError, did_you_mean

Kind = Literal["input", "hidden", "output", "vector"]


@dataclass(frozen=True)
class DepthRule:
    """How a branch and its steps shrink with the depth.

    Args:
        branch: the output of a branch is multiplied by L^-branch.
        step: R(update) inside of it goes with L^-step.
    """

    branch: float
    step: float


# k2: branches of two matrices and more (condition 3.1), as attention and MLPs are. k1: of one (condition B.1), and
# none, which leaves the depth alone: both for comparison.
DEPTH_RULES = {"k2": DepthRule(1.0, 0.0), "k1": DepthRule(0.5, 0.5), "none": DepthRule(0.0, 0.0)}


@dataclass(frozen=True)
class Fans:
    """Fan-in and fan-out of one tensor; a side that does not go with the width, as the vocabulary, is 1.

    Args:
        base: (n_in, n_out) in the base.
        target: (n_in, n_out) in the target.
    """

    base: tuple[int, int]
    target: tuple[int, int]

    @property
    def i(self) -> float:
        """Ratio of the fans in."""
        return self.target[0] / self.base[0]

    @property
    def o(self) -> float:
        """Ratio of the fans out."""
        return self.target[1] / self.base[1]

    def ratio(self, squared: Callable[[int, int], Fraction]) -> float:
        """Ratio of a function of (n_in, n_out), given squared: what is the same is so to the last bit."""
        return math.sqrt(squared(*self.target) / squared(*self.base))


@dataclass(frozen=True)
class Step:
    """How large an optimizer's update is.

    Args:
        norm: R(update)^2 of a matrix at learning rate 1, as a function of (n_in, n_out), without a gradient's size.
        gradient: whether the update is as large as the gradient.
        eps: what is added to: "entry", a gradient's entries; "square", the square of its spectral norm; None, nothing.
        vectors: whether it steps vectors, and embeddings and head.
    """

    norm: Callable[[int, int], Fraction]
    gradient: bool = False
    eps: Literal["entry", "square"] | None = None
    vectors: bool = True


def _sign(n_in: int, n_out: int) -> Fraction:
    return Fraction(n_in**2)


def _polar(n_in: int, n_out: int) -> Fraction:
    return Fraction(n_in, n_out)


def _kimi(n_in: int, n_out: int) -> Fraction:
    return n_in * max(Fraction(1), Fraction(n_in, n_out))


def _original(n_in: int, n_out: int) -> Fraction:
    return max(Fraction(1), Fraction(n_in, n_out))


def _one(n_in: int, n_out: int) -> Fraction:
    return Fraction(1)


def _initial(n_in: int, n_out: int) -> Fraction:
    """Variance of a hidden matrix."""
    return min(Fraction(1), Fraction(n_out, n_in)) / n_in


_KIMI = Step(_kimi, vectors=False)
# A new optimizer is one line here.
STEPS: dict[str, Step] = {
    "adamw": Step(_sign, eps="entry"),
    "lion": Step(_sign),
    "sgd": Step(_sign, gradient=True),
    # Muon as this package has it, scale match_rms; NuMuon's k is a share of the smaller side, and |U_k V_k^T|_2 = 1.
    "numuon": _KIMI,
    "muon": _KIMI,
    "muon_kimi": _KIMI,
    "muon_spectral": Step(_one, vectors=False),  # scaled by sqrt(n_out / n_in)
    "muon_original": Step(_original, vectors=False),  # torch.optim.Muon's
    "muon_polar": Step(_polar, vectors=False),  # not scaled
    "shampoo": Step(_polar, eps="square"),
    "soap": Step(_polar, eps="entry"),
}
# The scales of this package's Muon and NuMuon.
MUON_SCALES = {"match_rms": "muon_kimi", "spectral": "muon_spectral", "none": "muon_polar"}


@dataclass(frozen=True)
class Ratios:
    """Target / base of what a tensor is trained with. `decay` is spectral decay's."""

    lr: float
    weight_decay: float
    eps: float
    decay: float
    std: float


def step_of(optimizer: str, scale: str | None = None) -> Step:
    """The step of an optimizer.

    Args:
        optimizer: name in `STEPS`.
        scale: of this package's muon and numuon, where it is not match_rms.

    Raises:
        UsageError: an optimizer or a scale whose update is not known.
    """
    name = optimizer
    if optimizer in ("muon", "numuon") and scale is not None:
        if scale not in MUON_SCALES:
            raise UsageError(f'how large an update of scale "{scale}" is, is not known', hint=", ".join(MUON_SCALES))
        name = MUON_SCALES[scale]
    if name not in STEPS:
        raise UsageError(f'how large an update of "{name}" is, is not known', hint=did_you_mean(name, STEPS))
    return STEPS[name]


def ratios(kind: Kind, fans: Fans, step: Step, *, depth: float, rule: DepthRule, inside: bool, fold: float) -> Ratios:
    """What changes from the base to the target for one tensor.

    Args:
        kind: input, an embedding; hidden, a matrix; output, the head; vector, a bias or a gain.
        fans: of the tensor; of a vector only the fan-out.
        step: of its optimizer.
        depth: L.
        rule: for the depth.
        inside: whether it is inside a block.
        fold: c, the forward multiplier that is in the tensor; 1 where it is not, or stays in the forward pass.

    Raises:
        UsageError: a vector, embedding or head that the optimizer does not step.
    """
    if kind != "hidden" and not step.vectors:
        raise UsageError(
            "steps of Muon and NuMuon are for hidden matrices", hint="AdamW for embeddings, head and vectors"
        )
    deep = depth if inside else 1.0
    # A gradient's entry, and its spectral norm, without what is folded.
    entry = 1 / (fans.i if kind == "output" else fans.o * deep**rule.branch)
    spectral = math.sqrt(fans.i * fans.o) * entry
    update = 1.0 if kind == "vector" else fans.ratio(step.norm)
    wanted = fans.i if kind == "output" else deep**-rule.step  # the output is multiplied by 1 / i
    lr = wanted / (update * (entry if step.gradient else 1.0))
    shrink = deep**-rule.step  # lr * weight decay, of whatever optimizer
    folded = lr * (fold**2 if step.gradient else fold)
    eps = {"entry": entry / fold, "square": (spectral / fold) ** 2, None: 1.0}[step.eps]
    return Ratios(
        lr=folded,
        weight_decay=shrink / folded,
        eps=eps,
        # lr * decay is taken off all singular values, which go with sqrt(n_out / n_in) and with c.
        decay=fold * shrink * math.sqrt(fans.o / fans.i) / folded,
        std=fold * (fans.ratio(_initial) if kind == "hidden" else 1.0),
    )
