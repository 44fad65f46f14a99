"""The tables of spectral muP, written out cell by cell."""

from __future__ import annotations

from math import sqrt

import pytest

from lowrank_kit.errors import UsageError
from lowrank_kit.scaling.rules import DEPTH_RULES, STEPS, Fans, Kind, Ratios, ratios, step_of

# Ratios of width and depth that no two expressions agree for by accident.
N, L = 6.0, 5.0
SQUARE, EMBEDDING, HEAD = Fans((8, 8), (48, 48)), Fans((1, 8), (1, 48)), Fans((8, 1), (48, 1))
MATRICES: dict[str, tuple[Kind, Fans, bool]] = {
    "input": ("input", EMBEDDING, False),
    "hidden": ("hidden", SQUARE, True),
    "output": ("output", HEAD, False),
    "bias": ("vector", EMBEDDING, True),  # and gains inside blocks
    "final": ("vector", EMBEDDING, False),
}


def found(
    optimizer: str,
    row: str,
    depth: str = "k2",
    fold: float = 1.0,
    *,
    fans: Fans | None = None,
    scale: str | None = None,
    L: float = L,
) -> Ratios:
    kind, usual, inside = MATRICES[row]
    step = step_of(optimizer, scale)
    return ratios(kind, fans or usual, step, depth=L, rule=DEPTH_RULES[depth], inside=inside, fold=fold)


def said(expression: str) -> float:
    """A cell of a table."""
    return float(eval(expression, {"sqrt": sqrt, "n": N, "L": L}))


# optimizer, row, learning rate, weight decay, eps (where there is one), as the paper has them. Tables 1 and 3 to 6.
K2 = [
    ("muon_kimi", "hidden", "1/sqrt(n)", "sqrt(n)", None),
    ("muon", "hidden", "1/sqrt(n)", "sqrt(n)", None),
    ("numuon", "hidden", "1/sqrt(n)", "sqrt(n)", None),
    ("muon_original", "hidden", "1", "1", None),
    ("muon_polar", "hidden", "1", "1", None),
    ("muon_spectral", "hidden", "1", "1", None),
    ("shampoo", "input", "sqrt(n)", "1/sqrt(n)", "1/n"),
    ("shampoo", "hidden", "1", "1", "1/L**2"),
    ("shampoo", "output", "sqrt(n)", "1/sqrt(n)", "1/n"),
    ("soap", "input", "sqrt(n)", "1/sqrt(n)", None),
    ("soap", "hidden", "1", "1", None),
    ("soap", "output", "sqrt(n)", "1/sqrt(n)", None),
    ("sgd", "input", "n", "1/n", None),
    ("sgd", "hidden", "L", "1/L", None),
    ("sgd", "output", "n", "1/n", None),
    ("sgd", "bias", "L*n", "1/(L*n)", None),
    ("adamw", "input", "1", "1", "1/n"),
    ("adamw", "hidden", "1/n", "n", "1/(L*n)"),
    ("adamw", "output", "1", "1", "1/n"),
    ("adamw", "bias", "1", "1", "1/(L*n)"),
    ("adamw", "final", "1", "1", "1/n"),
    ("lion", "input", "1", "1", None),
    ("lion", "hidden", "1/n", "n", None),
    ("lion", "output", "1", "1", None),
    ("lion", "bias", "1", "1", None),
]
# Branches of one matrix: tables 9 to 13. Outside of blocks as above.
K1 = [
    ("muon_kimi", "hidden", "1/sqrt(n*L)", "sqrt(n)", None),
    ("numuon", "hidden", "1/sqrt(n*L)", "sqrt(n)", None),
    ("muon_original", "hidden", "1/sqrt(L)", "1", None),
    ("muon_polar", "hidden", "1/sqrt(L)", "1", None),
    ("shampoo", "input", "sqrt(n)", "1/sqrt(n)", "1/n"),
    ("shampoo", "hidden", "1/sqrt(L)", "1", "1/L"),
    ("sgd", "input", "n", "1/n", None),
    ("sgd", "hidden", "1", "1/sqrt(L)", None),
    ("sgd", "output", "n", "1/n", None),
    ("sgd", "bias", "n", "1/(n*sqrt(L))", None),
    ("adamw", "input", "1", "1", "1/n"),
    ("adamw", "hidden", "1/(n*sqrt(L))", "n", "1/(n*sqrt(L))"),
    ("adamw", "output", "1", "1", "1/n"),
    ("adamw", "bias", "1/sqrt(L)", "1", "1/(n*sqrt(L))"),
    ("lion", "hidden", "1/(n*sqrt(L))", "n", None),
]
NONE = [
    ("muon_kimi", "hidden", "1/sqrt(n)", "sqrt(n)", None),
    ("sgd", "hidden", "1", "1", None),
    ("adamw", "hidden", "1/n", "n", "1/n"),
]


@pytest.mark.parametrize(
    ("depth", "cells"), [(depth, row) for depth, rows in (("k2", K2), ("k1", K1), ("none", NONE)) for row in rows]
)
def test_the_explicit_table(depth: str, cells: tuple[str, str, str, str, str | None]) -> None:
    optimizer, row, lr, weight_decay, eps = cells
    ratio = found(optimizer, row, depth)
    assert ratio.lr == pytest.approx(said(lr))
    assert ratio.weight_decay == pytest.approx(said(weight_decay))
    if eps is not None:
        assert ratio.eps == pytest.approx(said(eps))
    elif optimizer != "soap":
        assert ratio.eps == 1
    assert ratio.std == pytest.approx(said("1/sqrt(n)" if row == "hidden" else "1"))


def test_soap_steps_as_adam_does_in_another_basis() -> None:
    assert found("soap", "hidden").eps == pytest.approx(1 / (N * L))


# What is folded, c: of the last matrices and biases of branches 1 / L, of an untied head and a final gain 1 / n.
FOLDS = {"1/L": 1 / L, "1/n": 1 / N, "1": 1.0}
# group, c, row above, optimizer, learning rate, weight decay, eps.
FOLDED = [
    ("embed", "1", "input", "adamw", "1", "1", "1/n"),
    ("embed", "1", "input", "sgd", "n", "1/n", None),
    ("fc", "1", "hidden", "adamw", "1/n", "n", "1/(n*L)"),
    ("fc", "1", "hidden", "muon_polar", "1", "1", None),
    ("fc", "1", "hidden", "muon_original", "1", "1", None),
    ("fc", "1", "hidden", "muon_kimi", "1/sqrt(n)", "sqrt(n)", None),
    ("fc", "1", "hidden", "numuon", "1/sqrt(n)", "sqrt(n)", None),
    ("fc", "1", "hidden", "sgd", "L", "1/L", None),
    ("c_proj", "1/L", "hidden", "adamw", "1/(n*L)", "n*L", "1/n"),
    ("c_proj", "1/L", "hidden", "muon_polar", "1/L", "L", None),
    ("c_proj", "1/L", "hidden", "muon_original", "1/L", "L", None),
    ("c_proj", "1/L", "hidden", "muon_kimi", "1/(sqrt(n)*L)", "sqrt(n)*L", None),
    ("c_proj", "1/L", "hidden", "numuon", "1/(sqrt(n)*L)", "sqrt(n)*L", None),
    ("c_proj", "1/L", "hidden", "sgd", "1/L", "L", None),
    ("head", "1/n", "output", "adamw", "1/n", "n", "1"),
    ("head", "1/n", "output", "sgd", "1/n", "n", None),
    ("final gain", "1/n", "final", "adamw", "1/n", "n", "1"),
    ("final gain", "1/n", "final", "sgd", "1/n", "n", None),
    ("bias", "1", "bias", "adamw", "1", "1", "1/(n*L)"),
    ("bias", "1", "bias", "sgd", "L*n", "1/(L*n)", None),
    ("bias of c_proj", "1/L", "bias", "adamw", "1/L", "L", "1/n"),
    ("bias of c_proj", "1/L", "bias", "sgd", "n/L", "L/n", None),
]
FOLDED_STD = {
    "embed": "1", "fc": "1/sqrt(n)", "c_proj": "1/(sqrt(n)*L)", "head": "1/n",
    "final gain": "1/n", "bias": "1", "bias of c_proj": "1/L",
}  # fmt: skip


@pytest.mark.parametrize(("group", "c", "row", "optimizer", "lr", "weight_decay", "eps"), FOLDED)
def test_the_folded_table(
    group: str, c: str, row: str, optimizer: str, lr: str, weight_decay: str, eps: str | None
) -> None:
    ratio = found(optimizer, row, fold=FOLDS[c])
    assert ratio.lr == pytest.approx(said(lr))
    assert ratio.weight_decay == pytest.approx(said(weight_decay))
    assert ratio.eps == pytest.approx(said(eps or "1"))
    assert ratio.std == pytest.approx(said(FOLDED_STD[group]))


@pytest.mark.parametrize("optimizer", STEPS)
@pytest.mark.parametrize("c", FOLDS)
def test_what_is_decayed_in_a_step_is_the_base_s(optimizer: str, c: str) -> None:
    for row, (kind, _, _) in MATRICES.items():
        if kind == "hidden" or STEPS[optimizer].vectors:
            ratio = found(optimizer, row, fold=FOLDS[c])
            assert ratio.lr * ratio.weight_decay == pytest.approx(1)


# From a base of one shape to a target of another, with 3 times the depth: std, AdamW's rate and eps, and the rates of
# Muon (scaled by sqrt(n_out / n_in), then not at all), Muon-Kimi and SGD, of the general form.
SHAPES = {
    # Keys of 2 heads of 16 with 128 become 2 of 64 with 512: fan-in times 4, fan-out times 4.
    "k": (Fans((64, 32), (256, 128)), "1/2", "1/4", "1/12", "1", "1", "1/2", "3"),
    # An MLP of 4 n becomes one of 2 n: 64 -> 256 becomes 256 -> 512.
    "up": (Fans((64, 256), (256, 512)), "1/2", "1/4", "1/6", "1", "sqrt(1/2)", "1/2", "3/2"),
    # And back: 256 -> 64 becomes 512 -> 256. R is sqrt(256) * 2, then sqrt(512) * sqrt(2).
    "down": (Fans((256, 64), (512, 256)), "1", "1/2", "1/12", "1", "sqrt(2)", "1", "6"),
    # 8 experts for 64, then for 256: R of Muon-Kimi is 8 sqrt(8), then 16 sqrt(32).
    "router": (Fans((64, 8), (256, 8)), "1/4", "1/4", "1/3", "1", "1/2", "1/4", "3/4"),
    # Factors of rank 8, of 64 x 64 then 256 x 256.
    "A": (Fans((64, 8), (256, 8)), "1/4", "1/4", "1/3", "1", "1/2", "1/4", "3/4"),
    "B": (Fans((8, 64), (8, 256)), "1", "1", "1/12", "1", "2", "1", "12"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_matrices_of_any_shape(shape: str) -> None:
    fans, std, adamw, eps, spectral, polar, kimi, sgd = SHAPES[shape]
    assert found("adamw", "hidden", fans=fans, L=3.0).std == pytest.approx(said(std))
    assert found("adamw", "hidden", fans=fans, L=3.0).lr == pytest.approx(said(adamw))
    assert found("adamw", "hidden", fans=fans, L=3.0).eps == pytest.approx(said(eps))
    assert found("muon", "hidden", fans=fans, L=3.0, scale="spectral").lr == pytest.approx(said(spectral))
    assert found("muon", "hidden", fans=fans, L=3.0, scale="none").lr == pytest.approx(said(polar))
    assert found("numuon", "hidden", fans=fans, L=3.0, scale="match_rms").lr == pytest.approx(said(kimi))
    assert found("sgd", "hidden", fans=fans, L=3.0).lr == pytest.approx(said(sgd))


def test_muon_s_scale_of_torch_is_that_of_wide_matrices_alone() -> None:
    """sqrt(max(1, n_out / n_in)): R is 1 for tall ones, sqrt(n_in / n_out) for wide ones."""
    assert found("muon_original", "hidden", fans=Fans((64, 256), (256, 512))).lr == 1
    assert found("muon_original", "hidden", fans=Fans((256, 64), (512, 256))).lr == pytest.approx(sqrt(2))


@pytest.mark.parametrize("c", FOLDS)
def test_spectral_decay_takes_a_share_of_the_singular_values(c: str) -> None:
    """lr * decay is taken off all, and they go with c sqrt(n_out / n_in)."""
    fans = Fans((64, 32), (256, 512))
    ratio = found("numuon", "hidden", fold=FOLDS[c], fans=fans)
    assert ratio.lr * ratio.decay == pytest.approx(FOLDS[c] * sqrt((512 / 256) / (32 / 64)))


@pytest.mark.parametrize("optimizer", STEPS)
def test_ratios_of_one_change_nothing(optimizer: str) -> None:
    for row, (kind, fans, inside) in MATRICES.items():
        if kind == "hidden" or STEPS[optimizer].vectors:
            same = Fans(fans.base, fans.base)
            one = ratios(kind, same, STEPS[optimizer], depth=1.0, rule=DEPTH_RULES["k2"], inside=inside, fold=1.0)
            assert one == Ratios(1.0, 1.0, 1.0, 1.0, 1.0), row


def test_equal_ratios_are_equal_to_the_last_bit() -> None:
    """Otherwise they would make groups of their own."""
    rates = {found("numuon", "hidden", fans=Fans((n, m), (3 * n, 3 * m))).lr for n in (8, 12, 40) for m in (8, 20, 96)}
    assert rates == {1 / sqrt(3)}


@pytest.mark.parametrize("row", ["input", "output", "bias", "final"])
@pytest.mark.parametrize("optimizer", ["muon", "numuon", "muon_kimi", "muon_spectral", "muon_original", "muon_polar"])
def test_muon_is_for_hidden_matrices(optimizer: str, row: str) -> None:
    with pytest.raises(UsageError, match="hidden matrices") as error:
        found(optimizer, row)
    assert "AdamW" in str(error.value.hint)


def test_an_optimizer_whose_update_nobody_knows() -> None:
    with pytest.raises(UsageError, match='"muonn"') as error:
        step_of("muonn")
    assert error.value.hint == 'did you mean "muon"?'
    with pytest.raises(UsageError, match="rms_norm") as error:
        step_of("muon", "rms_norm")
    assert error.value.hint == "match_rms, spectral, none"
    assert step_of("adamw", "match_rms") is STEPS["adamw"]
