"""Forms of storage: what is written is what is planned, joins to the matrix again, and its rounding is measured."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save

from lowrank_kit.compression.forms import FORMS
from lowrank_kit.linalg.factor import Factors, truncated_svd, weighted_error
from tests.linalg.cases import with_spectrum

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def factors_of(num_out: int, num_in: int, rank: int) -> Factors:
    side = min(num_out, num_in)
    return truncated_svd(with_spectrum(num_out, num_in, 1 / torch.arange(1.0, side + 1))).truncate(rank)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_stored_is_what_the_form_says(form: str, dtype: str) -> None:
    told = FORMS[form].tensors("x", dtype, (12, 9), 4)
    stored = FORMS[form].stored(factors_of(12, 9, 4), DTYPES[dtype])
    kinds = DTYPES | {"I32": torch.int32}
    assert [(tensor.dtype, tensor.shape) for tensor in stored] == [(kinds[kind], shape) for _, kind, shape in told]
    assert told[-1][0] == "x.weight"
    names = [name for name, _, _ in told]
    assert FORMS[form].numbers((12, 9), 4) == sum(tensor.numel() for tensor in stored)
    bare = save(dict.fromkeys(names, torch.zeros(0)))
    whole = save({name: tensor.contiguous() for name, tensor in zip(names, stored, strict=True)})
    # Headers differ by the digits in them.
    assert abs(len(whole) - len(bare) - FORMS[form].nbytes((12, 9), 4, dtype)) < 64


@pytest.mark.parametrize("form", FORMS)
def test_split_and_joined_it_is_the_product(form: str) -> None:
    factors = factors_of(12, 9, 4)
    joined = FORMS[form].join(*FORMS[form].split(factors))
    torch.testing.assert_close(joined, factors.dense(), atol=1e-13, rtol=0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_what_rounding_costs(form: str, weighted: bool) -> None:
    factors = factors_of(40, 30, 10)
    X = torch.randn(30, 50, dtype=torch.float64) * torch.logspace(0, -2, 30, dtype=torch.float64)[:, None]
    gram = X @ X.mT if weighted else None
    *rounded, _ = (t.double() if t.is_floating_point() else t for t in FORMS[form].stored(factors, torch.bfloat16))
    error = weighted_error(factors.dense(), FORMS[form].join(*rounded), gram)
    # bfloat16 has eight bits; the pivoted form is some 2.5 times as far off as two factors.
    assert 1e-3 < error < 1e-2


def test_pivoted_takes_more_rank_in_the_same_numbers() -> None:
    rank = max(rank for rank in range(1, 512) if FORMS["factors"].numbers((512, 512), rank) <= 0.5 * 512 * 512)
    assert rank == 127
    assert max(r for r in range(1, 512) if FORMS["pivoted"].numbers((512, 512), r) <= 0.5 * 512 * 512) == 149
