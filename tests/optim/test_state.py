"""The state of NuMuon: made at the first step, in the dtype that was asked for, and bit for bit through a file."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_kit.errors import UsageError
from lowrank_kit.optim import NuMuon
from tests.optim.cases import RULES, TOPK, gradients, random_steps, steps_of

STEPS = 8
COSINE, PIECEWISE = "cosine:1:0.25", "piecewise:0.25@0,0.95@0.3,0.5@0.6"
# Name -> options of a group. In a side of 48 warm keeps fewer columns than the side, and where the piecewise rank rises
# it takes further random ones.
CASES: dict[str, dict[str, Any]] = {
    **{f"{topk} cosine": {"topk": topk, "rank_schedule": COSINE} for topk in TOPK},
    "warm piecewise": {"rank_schedule": PIECEWISE, "spectral_decay": 0.1},
    "warm bfloat16": {"rank_schedule": PIECEWISE, "momentum_dtype": "bfloat16", "basis_dtype": "bfloat16"},
    "warm split": {"rank_schedule": "fixed:0.3", "split": (28, 20)},
    "muon": {"rule": "muon"},
    "adamw": {"rule": "adamw", "spectral_decay": 0.1},
    "sgd": {"rule": "sgd", "nesterov": True},
}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(3)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in [(48, 60), (48, 48), (3, 48, 30)]]


def optimizer_of(params: list[nn.Parameter], options: dict[str, Any]) -> NuMuon:
    return NuMuon([{"params": params, "weight_decay": 0.1, "total_steps": STEPS, "health_every": 2, **options}])


def through_a_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("stop", [1, 5])
@pytest.mark.parametrize("case", CASES)
def test_saved_and_loaded_in_the_middle_it_ends_at_the_same_weights(case: str, stop: int, dtype: torch.dtype) -> None:
    whole = parameters(dtype)
    random_steps(optimizer_of(whole, CASES[case]), whole, range(STEPS))

    first = parameters(dtype)
    optimizer = optimizer_of(first, CASES[case])
    random_steps(optimizer, first, range(stop))
    saved = through_a_file({"optimizer": optimizer.state_dict(), "weights": [p.detach() for p in first]})
    kept = copy.deepcopy(saved["optimizer"]["state"])

    second = [nn.Parameter(weights) for weights in saved["weights"]]
    resumed = optimizer_of(second, CASES[case])
    resumed.load_state_dict(saved["optimizer"])
    for parameter, before in zip(second, first, strict=True):
        state = optimizer.state[before]
        assert resumed.state[parameter].keys() == state.keys()
        for key, tensor in resumed.state[parameter].items():
            assert tensor.dtype == state[key].dtype
            assert torch.equal(tensor, state[key])
    random_steps(resumed, second, range(stop, STEPS))
    for parameter, expected in zip(second, whole, strict=True):
        assert torch.equal(parameter, expected)
    # Going on changed copies, not what was loaded.
    for index, tensors in kept.items():
        for key, tensor in tensors.items():
            assert torch.equal(saved["optimizer"]["state"][index][key], tensor)


def test_a_schedule_that_is_a_function_is_not_saved_but_its_position_is() -> None:
    def halved(progress: float) -> float:
        return 1.0 if progress < 0.4 else 0.5

    whole = parameters()
    random_steps(optimizer_of(whole, {"rank_schedule": halved}), whole, range(STEPS))
    first, second = parameters(), parameters()
    optimizer = optimizer_of(first, {"rank_schedule": halved})
    random_steps(optimizer, first, range(5))
    saved = through_a_file(optimizer.state_dict())
    with torch.no_grad():
        for parameter, weights in zip(second, first, strict=True):
            parameter.copy_(weights)
    resumed = optimizer_of(second, {"rank_schedule": halved})
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["rank_schedule"] is halved
    assert resumed.param_groups[0]["step"] == 5
    random_steps(resumed, second, range(5, STEPS))
    assert all(torch.equal(one, other) for one, other in zip(second, whole, strict=True))

    fixed = optimizer_of(parameters(), {"rank_schedule": "fixed:0.5"})
    with pytest.raises(UsageError, match="group 0 was saved with a rank schedule that is a function"):
        fixed.load_state_dict(saved)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NuMuon(parameters(), rule="muon"), "group 0 was saved with rule numuon and has rule muon"),
        (lambda: NuMuon(parameters()[:2], rank_schedule="0.5"), r"groups of \[3\] parameters, this one of \[2\]"),
        (
            lambda: NuMuon([{"params": parameters()[:2]}, {"params": parameters()[2:]}], rank_schedule="0.5"),
            r"groups of \[3\] parameters, this one of \[2, 1\]",
        ),
        (
            lambda: NuMuon(parameters()[::2] + parameters()[1:2], rank_schedule="0.5"),
            r"momentum of parameter 1 was saved with shape \(48, 48\), the parameter has \(3, 48, 30\)",
        ),
    ],
)
def test_a_state_of_another_optimizer_is_refused(make: Callable[[], NuMuon], message: str) -> None:
    params = parameters()
    optimizer = optimizer_of(params, {"rank_schedule": "0.5"})
    random_steps(optimizer, params, range(1))
    other = make()
    with pytest.raises(UsageError, match=message) as caught:
        other.load_state_dict(optimizer.state_dict())
    assert caught.value.hint
    assert not other.state
    assert other.param_groups[0]["step"] == 0


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_a_state_of_another_shape_is_refused_for_rules_without_matrices(rule: str) -> None:
    first, second = (nn.Parameter(torch.ones(size)) for size in (3, 4))
    optimizer = NuMuon([first], rule=rule)
    random_steps(optimizer, [first], range(1))
    with pytest.raises(UsageError, match=r"was saved with shape \(3,\), the parameter has \(4,\)"):
        NuMuon([second], rule=rule).load_state_dict(optimizer.state_dict())


def test_the_state_of_torchs_adamw_is_refused() -> None:
    params = parameters()
    other = torch.optim.AdamW(params)
    random_steps(other, params, range(1))
    with pytest.raises(UsageError, match="group 0 was saved with rule None and has rule adamw"):
        NuMuon(params, rule="adamw").load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"rule": "numuon"}, {"momentum", "basis.0"}),
        ({"rule": "numuon", "split": (4, 4, 8)}, {"momentum", "basis.0", "basis.1", "basis.2"}),
        ({"topk": "filter"}, {"momentum", "threshold.0"}),
        ({"topk": "exact"}, {"momentum"}),
        ({"topk": "krylov"}, {"momentum"}),
        ({"rank_schedule": "0.9"}, {"momentum"}),
        ({"rule": "muon"}, {"momentum"}),
        ({"rule": "adamw"}, {"step", "exp_avg", "exp_avg_sq"}),
        ({"rule": "sgd"}, {"momentum"}),
    ],
)
def test_state_is_made_at_the_first_step_with_the_same_keys_for_all(options: dict[str, Any], keys: set[str]) -> None:
    """Also without a gradient and of no size: what each process of a sharded run holds has the same keys."""
    params = [nn.Parameter(torch.zeros(shape)) for shape in [(16, 20), (16, 0), (3, 16, 20), (16, 20)]]
    optimizer = NuMuon([{"params": params, "rank_schedule": "0.5", **options}])
    assert not optimizer.state
    params[0].grad = torch.randn(16, 20)
    optimizer.step()
    assert [optimizer.state[p].keys() for p in params] == [keys] * 4


@pytest.mark.parametrize(("basis_dtype", "most"), [("float32", 0.30), ("bfloat16", 0.15)])
@pytest.mark.parametrize("shape", [(768, 768), (768, 2304), (2048, 768)])
def test_memory_of_warm_at_a_quarter(shape: tuple[int, int], basis_dtype: str, most: float) -> None:
    """At most 30 % of the momentum, half of that in bfloat16: made at the first step, before any gradient."""
    parameter = nn.Parameter(torch.empty(shape))
    optimizer = NuMuon([parameter], rank_schedule="fixed:0.25", basis_dtype=basis_dtype)
    optimizer.step()
    state = optimizer.state[parameter]
    assert state["basis.0"].dtype == getattr(torch, basis_dtype)
    assert state.keys() == {"momentum", "basis.0"}
    assert 0 < state["basis.0"].nbytes <= most * state["momentum"].nbytes


@pytest.mark.parametrize("rule", RULES)
def test_arithmetic_is_float32_for_bfloat16_parameters_and_rounds_once_a_step(rule: str) -> None:
    """A float32 twin that is rounded after each step takes the same way, bit for bit."""
    options: dict[str, Any] = {"rule": rule, "lr": 0.02, "weight_decay": 0.1, "rank_schedule": "fixed:0.5"}
    parameter = nn.Parameter(torch.randn(16, 24, dtype=torch.bfloat16))
    twin = nn.Parameter(parameter.detach().float())
    optimizer, twins = NuMuon([parameter], **options), NuMuon([twin], **options)
    for grad in gradients((16, 24)):
        steps_of(optimizer, parameter, [grad])
        steps_of(twins, twin, [grad.bfloat16()])
        with torch.no_grad():
            twin.copy_(twin.bfloat16())
        assert torch.equal(parameter.float(), twin)
    for key, tensor in optimizer.state[parameter].items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, twins.state[twin][key])


@pytest.mark.parametrize("rule", ["numuon", "muon"])
def test_momentum_averages_in_float32_unless_told_otherwise(rule: str) -> None:
    """In bfloat16 a hundredth of what is left rounds away once that is a fifth: half a unit in the last place."""
    ones = [torch.ones(2, 3)] * 200
    averages = {}
    for dtype in ("float32", "bfloat16"):
        parameter = nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))
        optimizer = NuMuon([parameter], rule=rule, lr=0.0, momentum=0.99, rank_schedule="1", momentum_dtype=dtype)
        steps_of(optimizer, parameter, ones)
        averages[dtype] = optimizer.state[parameter]["momentum"]
        assert averages[dtype].dtype == getattr(torch, dtype)
    torch.testing.assert_close(averages["float32"], torch.full((2, 3), 1 - 0.99**200), rtol=1e-4, atol=0)
    assert (averages["bfloat16"] < 0.83).all()


@pytest.mark.parametrize("key", ["momentum_dtype", "basis_dtype"])
def test_what_is_kept_in_bfloat16_hardly_moves_the_step(key: str) -> None:
    """Eight bits of mantissa: the momentum is off by 0.4 %, and a basis but by what one iteration does not repair."""
    grads, ends = gradients((64, 96)), []
    for dtype in ("float32", "bfloat16"):
        parameter = nn.Parameter(torch.zeros(64, 96))
        optimizer = NuMuon([{"params": [parameter], key: dtype}], rank_schedule="fixed:0.25")
        ends.append(steps_of(optimizer, parameter, grads)[-1])
    assert 0 < (ends[0] - ends[1]).norm() < 0.05 * ends[0].norm()
