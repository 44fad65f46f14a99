"""Every objective in the table against its own definition, and through one contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_kit.compression.objectives import OBJECTIVES, Objective, Options, Statistics
from lowrank_kit.linalg import factor
from lowrank_kit.linalg.factor import Factors
from tests.linalg.cases import CASES, DTYPES
from tests.linalg.search import activations, best_found

SHAPES = {"wide": (5, 8), "tall": (8, 5), "square": (6, 6)}
objectives = pytest.mark.parametrize("name", OBJECTIVES)


@dataclass(frozen=True)
class Tokens:
    """What a matrix meets: inputs X and Y [I, N] in the dense and the changed model, gradients g [O, N]."""

    X: Tensor
    Y: Tensor
    g: Tensor

    @classmethod
    def draw(cls, shape: tuple[int, int], tokens: int = 40) -> Tokens:
        X = activations(shape[1], tokens)
        return cls(X, X + 0.5 * activations(shape[1], tokens), activations(shape[0], tokens))

    def double(self) -> Tokens:
        return Tokens(self.X.double(), self.Y.double(), self.g.double())

    def statistics(self) -> Statistics:
        X, Y, g = self.X, self.Y, self.g
        return Statistics(tokens=X.shape[1], gram=X @ X.mT, output_gram=g @ g.mT, changed_gram=Y @ Y.mT, cross=X @ Y.mT)


def square(E: Tensor) -> Tensor:
    return E.square().sum()


def by_loss(E: Tensor, tokens: Tokens, options: Options) -> Tensor:
    """E by what it does to the loss: the gradients at all tokens, and directions of their own for the damping."""
    damping = (options.damping * tokens.g.square().sum(1).mean()).sqrt()
    return torch.cat([tokens.g.mT @ E, damping * E])


def scaled(W: Tensor, other: Tensor, tokens: Tokens, options: Options) -> Tensor:
    return square((W - other) * tokens.X.square().mean(1).sqrt() ** options.exponent)


def anchored_errors(W: Tensor, other: Tensor, tokens: Tokens, options: Options) -> tuple[Tensor, Tensor]:
    """Of the outputs, and of the weights times the root of the ridge."""
    wanted = W @ ((1 - options.blend) * tokens.Y + options.blend * tokens.X)
    ridge = (options.ridge * tokens.Y.square().sum(1).mean()).sqrt()
    return wanted - other @ tokens.Y, ridge * (W - other)


# What each minimizes over all matrices of a rank, from nothing but the tokens.
DEFINITIONS: dict[str, Callable[[Tensor, Tensor, Tokens, Options], Tensor]] = {
    "plain": lambda W, other, tokens, options: square(W - other),
    "scaled": scaled,
    "whiten": lambda W, other, tokens, options: square((W - other) @ tokens.X),
    "two-sided": lambda W, other, tokens, options: square(by_loss((W - other) @ tokens.X, tokens, options)),
    "anchored": lambda *given: sum(map(square, anchored_errors(*given)), torch.tensor(0.0)),
    "anchored-two-sided": lambda W, other, tokens, options: sum(
        (square(by_loss(E, tokens, options)) for E in anchored_errors(W, other, tokens, options)), torch.tensor(0.0)
    ),
}
# Numbers other than the defaults, so that each of them is seen to arrive; with 4 tokens the Grams have rank 4.
SETTINGS = {
    "default": (40, Options()),
    "default, rank-deficient Grams": (4, Options()),
    "blend 0": (40, Options(blend=0.0, damping=0.5, exponent=1.0)),
    "blend 0.5, rank-deficient Grams": (4, Options(blend=0.5, ridge=0.1, exponent=2.0)),
}


def test_every_objective_has_a_definition() -> None:
    assert set(DEFINITIONS) == set(OBJECTIVES)


@pytest.mark.parametrize(("num_tokens", "options"), SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@objectives
def test_closed_forms_are_the_optimum(name: str, shape: tuple[int, int], num_tokens: int, options: Options) -> None:
    """Never worse than a search over all factors on the definition itself, and never better than it can be."""
    W, tokens = torch.randn(shape, dtype=torch.float64), Tokens.draw(shape, num_tokens)
    full = OBJECTIVES[name].factorize(W, tokens.statistics(), options)

    def error(other: Tensor) -> Tensor:
        return DEFINITIONS[name](W, other, tokens, options)

    total = error(torch.zeros_like(W)).item()
    found = best_found(error, shape, 2, starts=2)
    reached = error(full.truncate(2).dense()).item()
    assert reached <= found * (1 + 1e-9) + 1e-12 * total
    # Where the search ends is not exact: 1e-6 of the energy of the outputs.
    assert reached == pytest.approx(found, abs=1e-6 * total)
    errors = [error(full.truncate(rank).dense()).item() for rank in range(1, min(shape) + 1)]
    assert all(more <= less * (1 + 1e-9) + 1e-12 * total for less, more in pairwise(errors))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@objectives
def test_the_spectrum_tells_the_error(name: str, shape: tuple[int, int]) -> None:
    """error(r) - error(full) = sum of the squares from r on, up to the scale of the statistics."""
    W, tokens, options = torch.randn(shape, dtype=torch.float64), Tokens.draw(shape), Options()
    full = OBJECTIVES[name].factorize(W, tokens.statistics(), options)
    energy = full.singular_values.square()
    least = DEFINITIONS[name](W, full.dense(), tokens, options).item()
    more = [
        DEFINITIONS[name](W, full.truncate(r).dense(), tokens, options).item() - least for r in range(1, min(shape))
    ]
    # Scaled: inputs by the mean of their squares here, by their sum there.
    scale = more[0] / energy[1:].sum().item()
    assert scale == pytest.approx(1.0, rel=1e-6) or name == "scaled"
    tails = [scale * energy[r:].sum().item() for r in range(1, min(shape))]
    assert more == pytest.approx(tails, rel=1e-6, abs=1e-9 * energy.sum().item())


def scale_inputs(statistics: Statistics, scale: float) -> Statistics:
    scaled = {
        f: scale * value for f in ("gram", "changed_gram", "cross") if (value := getattr(statistics, f)) is not None
    }
    return replace(statistics, **scaled)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@objectives
def test_signs_and_scales_of_tokens_do_not_matter(name: str, shape: tuple[int, int], seed: int) -> None:
    """x -> -x with y -> -y, g -> -g, and positive factors on either side; W -> -8 W is the map times -8."""
    torch.manual_seed(seed)
    W, tokens, factorize = torch.randn(shape, dtype=torch.float64), Tokens.draw(shape), OBJECTIVES[name].factorize

    def best(W: Tensor, statistics: Statistics) -> Tensor:
        return factorize(W, statistics, Options()).truncate(2).dense()

    inputs, outputs = (torch.randint(0, 2, (tokens.X.shape[1],)) * 2.0 - 1 for _ in range(2))
    flipped = Tokens(tokens.X * inputs, tokens.Y * inputs, tokens.g * outputs).statistics()
    statistics = tokens.statistics()
    assert statistics.output_gram is not None
    expected = best(W, statistics)
    for other in (
        flipped,
        scale_inputs(statistics, 2.0**40),
        scale_inputs(statistics, 2.0**-40),
        replace(statistics, output_gram=2.0**30 * statistics.output_gram),
    ):
        torch.testing.assert_close(best(W, other), expected, atol=1e-8, rtol=0)
    torch.testing.assert_close(best(-8 * W, statistics), -8 * expected, atol=1e-7, rtol=0)


def check_contract(full: Factors, W: Tensor, dtype: torch.dtype) -> None:
    side = min(W.shape)
    assert (full.B.shape, full.A.shape) == ((W.shape[0], side), (side, W.shape[1]))
    assert full.singular_values.shape == (side,)
    assert (full.singular_values.diff() <= 0).all()
    assert (full.singular_values >= 0).all()
    for tensor in (full.A, full.B, full.singular_values):
        assert tensor.dtype == dtype
        assert tensor.isfinite().all()


# What may be missing from the text: nothing, most directions of it, all inputs, all gradients.
TEXTS: dict[str, Callable[[tuple[int, int]], Tokens]] = {
    "many tokens": lambda shape: Tokens.draw(shape),
    "one token": lambda shape: Tokens.draw(shape, 1),
    "no inputs": lambda shape: Tokens(torch.zeros(shape[1], 3), torch.zeros(shape[1], 3), torch.randn(shape[0], 3)),
    "no gradients": lambda shape: replace(Tokens.draw(shape), g=torch.zeros(shape[0], 40)),
    "equal and dead inputs": lambda shape: with_equal_and_dead_inputs(Tokens.draw(shape)),
}


def with_equal_and_dead_inputs(tokens: Tokens) -> Tokens:
    """The first two inputs the same, the last zero, in both models; so with the gradients."""
    kept = {field.name: getattr(tokens, field.name).clone() for field in fields(tokens)}
    for values in kept.values():
        values[:2] = values[0]
        values[-1] = 0
    return Tokens(**kept)


def target_of(objective: Objective, W: Tensor, tokens: Tokens) -> Tensor:
    """What full rank is: the weights, of an anchored objective the one that its definition is least at."""
    if not objective.sequential:
        return W
    ridge = 1e-3 * tokens.Y.square().sum(1).mean()
    ridge = ridge if ridge > 0 else torch.ones(())
    lifted = tokens.Y @ tokens.Y.mT + ridge * torch.eye(W.shape[1])
    return torch.linalg.solve(lifted.mT, (W @ (tokens.X @ tokens.Y.mT + ridge * torch.eye(W.shape[1]))).mT).mT


@pytest.mark.parametrize("working", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
@objectives
def test_contract(name: str, case: str, working: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite, nested and of full rank the same map, whatever the matrix, its dtype, the text and the working dtype."""
    if working == torch.float32:
        monkeypatch.setattr(factor, "FLOAT64_SIDE", 0)
    exact = CASES[case]()[0]
    for dtype, draw in product(DTYPES, TEXTS.values()):
        W, tokens = exact.to(dtype), draw((exact.shape[0], exact.shape[1])).double()
        full = OBJECTIVES[name].factorize(W, tokens.statistics(), Options())
        check_contract(full, W, working)
        target = target_of(OBJECTIVES[name], W.double(), tokens)
        # float32: the ridge of 1e-3 and the damping of 0.1 magnify its rounding.
        tolerance = (1e-6 if working == torch.float64 else 1e-3) * max(1.0, target.abs().max().item())
        torch.testing.assert_close(full.dense().double(), target, atol=tolerance, rtol=0)
        assert torch.equal(full.truncate(1).dense(), full.truncate(min(W.shape)).truncate(1).dense())


@objectives
def test_needs_are_what_is_read(name: str) -> None:
    """Without a field that it does not name an objective works, without one that it names it does not."""
    W, statistics = torch.randn(5, 8, dtype=torch.float64), Tokens.draw((5, 8)).statistics()
    objective = OBJECTIVES[name]
    tensors = {field.name for field in fields(Statistics)} - {"tokens"}
    assert objective.needs <= tensors
    expected = objective.factorize(W, statistics, Options()).dense()
    alone = Statistics(**{need: getattr(statistics, need) for need in objective.needs})
    assert torch.equal(objective.factorize(W, alone, Options()).dense(), expected)
    missing: dict[str, Any] = dict.fromkeys(objective.needs)
    for need in missing:
        with pytest.raises(AssertionError):
            objective.factorize(W, replace(alone, **{need: missing[need]}), Options())
    assert objective.needs_text == bool(objective.needs)
    assert objective.sequential == name.startswith("anchored")


@objectives
def test_titles_and_sources_fit_a_line(name: str) -> None:
    for line in (OBJECTIVES[name].title, OBJECTIVES[name].source):
        assert line
        assert "\n" not in line
        assert len(line) < 100
