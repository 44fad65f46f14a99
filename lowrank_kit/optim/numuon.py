"""NuMuon, Muon and AdamW behind one torch Optimizer: the rule of a parameter stands in its group.

Shape legend: the last two dimensions are a matrix [m, n], leading ones are a batch of matrices.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lowrank_kit.errors import LowRankError, UsageError, did_you_mean
from lowrank_kit.linalg.polar import newton_schulz
from lowrank_kit.linalg.topk import rank_of_fraction, topk_polar
from lowrank_kit.optim.schedule import RankSchedule

# Rule -> direction of a batch of momenta at a rank fraction. A new matrix rule is one line here.
DIRECTIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "numuon": lambda M, fraction: topk_polar(M, rank_of_fraction(fraction, M.shape)),
    "muon": lambda M, fraction: newton_schulz(M),
}
RULES = (*DIRECTIONS, "adamw")
# RMS of an AdamW step, which the matrix rules are scaled to: one learning rate then serves both.
# Moonlight ("Muon is scalable for LLM training", arXiv 2502.16982), section 2.2.
ADAMW_RMS = 0.2


class NuMuon(torch.optim.Optimizer):
    """Muon with a nuclear-norm budget: each step uses only the top-k singular directions of the momentum.

    M <- momentum M + (1 - momentum) G;  W <- (1 - lr wd) W - lr 0.2 sqrt(max(m, n)) U_k V_k^T,  M = U S V^T,
    k = ceil(rank fraction * min(m, n)). The Frobenius norm of the step falls with sqrt(k): it is not scaled back.

    Args:
        params: parameters or groups. A group has a `rule`: numuon, muon (five Newton-Schulz steps, full rank) or
            adamw; 2-D parameters and fused 3-D experts for the first two, anything for adamw.
        lr: learning rate, the same scale for all rules.
        weight_decay: decoupled.
        momentum: of the exponential moving average.
        nesterov: step along G + momentum (M - G) instead of M. None: on for muon, off for numuon.
        rank_schedule: see `RankSchedule.parse`; its position is `step / total_steps`.
        total_steps: length of the schedule, in steps; needed by the rule numuon unless the schedule is fixed.
        betas, eps: of adamw.

    Raises:
        UsageError: an unknown rule, a rank fraction outside (0, 1], a schedule without its length, a parameter that is
            no matrix.
        LowRankError: a gradient that is not finite; weights and momentum are left as they were.

    Source: NuMuon (arXiv 2603.03597); Muon (Jordan et al., 2024). Deviations: the scale 0.2 sqrt(max(m, n)) is that
    of Moonlight, as in the re-implementations; the rank-k step is exact.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-3,
        *,
        rule: str = "numuon",
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool | None = None,
        rank_schedule: str = "cosine:1:0.25",
        total_steps: int | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "rule": rule,
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "rank_schedule": rank_schedule,
            "total_steps": total_steps,
            "betas": betas,
            "eps": eps,
            "step": 0,
            "rank_fraction": 1.0,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; one whose rule cannot serve its parameters is refused and not added."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except UsageError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every group; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_non_finite()
        for group in self.param_groups:
            if group["rule"] == "adamw":
                self._adamw_step(group)
            else:
                self._matrix_step(group)
            group["step"] += 1
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the momentum of a bfloat16 parameter stays float32."""
        super().load_state_dict(state_dict)
        order = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        for p, index in zip(order, indices, strict=True):
            saved = state_dict["state"].get(index, {}).get("momentum")
            if saved is not None:
                self.state[p]["momentum"] = saved.to(device=p.device, dtype=torch.float32, copy=True)

    def _refuse_non_finite(self) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if grads and not torch.nn.utils.get_total_norm(grads, norm_type=math.inf).isfinite():
            shape = next(list(g.shape) for g in grads if not g.isfinite().all())
            raise LowRankError(
                f"a gradient of shape {shape} is not finite at step {self.param_groups[0]['step']}; "
                "weights and momentum are as they were before it",
                hint="lower the learning rate, or resume from the last checkpoint",
            )

    def _matrix_step(self, group: dict[str, Any]) -> None:
        rule = group["rule"]
        if rule == "numuon":
            progress = min(group["step"] / (group["total_steps"] or 1), 1.0)
            group["rank_fraction"] = RankSchedule.parse(group["rank_schedule"]).fraction(progress)
        nesterov = rule == "muon" if group["nesterov"] is None else group["nesterov"]
        batches: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for p in group["params"]:
            if not self.state[p]:
                # float32, whatever the parameter's dtype: an average of small numbers dies in bfloat16.
                self.state[p]["momentum"] = torch.zeros_like(p, dtype=torch.float32)
            if p.grad is not None:
                batches[tuple(p.shape)].append(p)
        for shape, params in batches.items():
            grads = torch.stack([p.grad.float() for p in params if p.grad is not None])
            momenta = torch.stack([self.state[p]["momentum"] for p in params]).lerp_(grads, 1 - group["momentum"])
            M = grads.lerp(momenta, group["momentum"]) if nesterov else momenta
            direction = DIRECTIONS[rule](M, group["rank_fraction"])
            scale = ADAMW_RMS * math.sqrt(max(shape[-2:]))
            for p, momentum, D in zip(params, momenta, direction, strict=True):
                self.state[p]["momentum"].copy_(momentum)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(D.to(p.dtype), alpha=-group["lr"] * scale)

    def _adamw_step(self, group: dict[str, Any]) -> None:
        for p in group["params"]:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        params = [p for p in group["params"] if p.grad is not None]
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _check_group(group: dict[str, Any]) -> None:
    rule, total_steps = group["rule"], group["total_steps"]
    if rule not in RULES:
        raise UsageError(f'unknown optimizer rule "{rule}"', hint=did_you_mean(rule, RULES))
    schedule = RankSchedule.parse(group["rank_schedule"])
    if total_steps is not None and total_steps < 1:
        raise UsageError(f"total_steps must be at least 1, got {total_steps}")
    if rule == "numuon" and schedule.kind != "fixed" and total_steps is None:
        raise UsageError(
            f'the rank schedule "{group["rank_schedule"]}" needs total_steps, its length in steps',
            hint='pass total_steps=..., or a fixed rank fraction: rank_schedule="fixed:0.25"',
        )
    if rule in DIRECTIONS:
        wrong = [tuple(p.shape) for p in group["params"] if p.ndim not in (2, 3)]
        if wrong:
            raise UsageError(
                f"rule {rule} is for matrices; got parameters of shapes {wrong[:3]}",
                hint='give them rule "adamw", or let lowrank_kit.optim.parameter_groups(model) choose',
            )
