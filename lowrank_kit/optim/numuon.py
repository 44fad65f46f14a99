"""NuMuon and its family behind one torch Optimizer: the rule of a parameter stands in its group.

Shape legend: the last two dimensions are a matrix [out, in], leading ones are a batch of matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lowrank_kit.errors import NonFiniteError, UsageError
from lowrank_kit.optim.groups import FUNCTION, POSITION, check_group, check_state, refuse_flat
from lowrank_kit.optim.rules import RULES, spectral_decay
from lowrank_kit.optim.schedule import RankFraction, fraction_at
from lowrank_kit.optim.spread import Processes, least_of_all, local, spread_like


class NuMuon(torch.optim.Optimizer):
    """Muon with a nuclear-norm budget: each step uses only the top-k singular directions of the momentum.

    M <- momentum M + (1 - momentum) G;  W <- (1 - lr wd) W - lr scale U_k V_k^T,  M = U S V^T,
    k = ceil(rank fraction * min(out, in)). The Frobenius norm of the step falls with sqrt(k): it is not scaled back.

    Every argument but `params` is the default of a group's key; groups may set their own, and `parameter_groups` makes
    them from a model. Arithmetic is float32 also for bfloat16 parameters, and float64 for
    float64 ones but in topk warm, krylov and filter.

    Args:
        params: parameters or groups.
        lr: learning rate.
        rule: numuon; muon (the polar factor of the whole momentum); adamw; sgd (momentum SGD). The first two take 2-D
            parameters and fused 3-D experts, an expert whose gradient is zero being left alone; the others anything.
        weight_decay: decoupled, before the step.
        spectral_decay: W <- W - lr spectral_decay polar(W) after the step: it lowers all singular values alike.
            Published for about the same effective rank: 0.8 with AdamW, 0.4 with Muon (arXiv 2610.11730).
        momentum: of the moving average; of sgd, M <- momentum M + G.
        nesterov: step along G + momentum (M - G) instead of M. None: on for muon, off for the others.
        rank_schedule: of numuon: see `RankSchedule.parse`, or a function of the progress `step / total_steps` in
            [0, 1]. A fraction of 0.9 or more takes the full polar factor, by Polar Express.
        total_steps: length of the schedule, in steps; needed by the rule numuon unless the schedule is fixed.
        rank_multiple: see `rank_of_fraction`.
        topk: how numuon finds the step: warm (subspace iteration from the step before), krylov (the paper's), exact,
            filter (no factorization).
        polar: how muon does: newton_schulz (five steps, singular values 0.7 to 1.2) or polar_express.
        scale: match_rms, 0.2 sqrt(max(out, in)): steps as large as AdamW's, so that one learning rate serves all;
            spectral, sqrt(out / in); none.
        momentum_dtype: float32, bfloat16 or float64.
        basis_dtype: of what `warm` keeps, float32 or bfloat16: in float32 at most 30 % of the momentum at rank fraction
            0.25, for sides of 768 and more.
        health_every: steps between two comparisons of one matrix of a group with the exact step; 0: never. The group's
            `lmo_ratio` is the last; below 0.99 `warm` raises the group's `oversampling`.
        betas, eps: of adamw.
        distribution: how a matrix that is spread over processes, a DTensor as FSDP2 makes it, is stepped: owner, one
            process gets it whole, by one all-to-all for all matrices of a shape, and spreads the step; sharded, of
            `warm`, nobody gets it; gather, everybody does; auto, sharded where that sends less than owner. Spectral
            decay takes owners, or gathers, whatever the step does.
        process_group: processes that hold the same parameters, as under DDP, and are to share the work of the matrix
            rules. None: each does all of it, and nothing is sent.

    Attributes:
        bytes_sent: by this process for the last step.

    Raises:
        UsageError: a group that cannot be served, a parameter in two groups, a state of another rule or shape.
        NonFiniteError: a gradient that is not finite; weights and momentum are left as they were.

    Source: NuMuon (arXiv 2603.03597); Muon (Jordan et al., 2024), its averaging momentum as in the re-implementations
    of NuMuon, without Nesterov; match_rms: Moonlight (arXiv 2502.16982), section 2.2; spectral: Yang, Simon, Bernstein
    (arXiv 2310.17813), condition 1. Deviations: `warm` in place of block Krylov, and rank_multiple.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-3,
        *,
        rule: str = "numuon",
        weight_decay: float = 0.0,
        spectral_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool | None = None,
        rank_schedule: str | RankFraction = "cosine:1:0.25",
        total_steps: int | None = None,
        rank_multiple: int = 16,
        topk: str = "warm",
        polar: str = "newton_schulz",
        scale: str = "match_rms",
        momentum_dtype: str = "float32",
        basis_dtype: str = "float32",
        health_every: int = 100,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        distribution: str = "auto",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        no_options = ("self", "params", "process_group", "__class__")
        options = {key: value for key, value in locals().items() if key not in no_options}
        self._processes = Processes(process_group)
        super().__init__(params, {**options, **POSITION})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; one that cannot be served is refused and not added."""
        params = param_group["params"]
        if not isinstance(params, set):  # which torch refuses: it has no order
            params = [params] if isinstance(params, Tensor) else list(params)
        param_group = {**param_group, "params": params}
        params = [p[1] if isinstance(p, tuple) else p for p in params]  # torch takes (name, parameter) too
        known = {id(p) for group in self.param_groups for p in group["params"]}
        twice = [p for i, p in enumerate(params) if id(p) in known or any(p is q for q in params[:i])]
        if twice:
            raise UsageError(
                f"{len(twice)} parameters are in two groups, or twice in one; the first has shape "
                f"{tuple(twice[0].shape)}",
                hint="model.parameters() names tied weights once; take each parameter out of all groups but one",
            )
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
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
        refuse_flat(self.param_groups)
        self._processes.sent = 0
        self._refuse_non_finite()
        # Before any weight moves: a function may give a fraction that is none.
        for group in self.param_groups:
            if group["rule"] == "numuon":
                progress = min(group["step"] / (group["total_steps"] or 1), 1.0)
                group["rank_fraction"] = fraction_at(group["rank_schedule"], progress)
        for group in self.param_groups:
            RULES[group["rule"]](group, [self.state[p] for p in group["params"]], self._processes)
            if group["spectral_decay"]:
                spectral_decay(group, self._processes)
            group["step"] += 1
        return loss

    @property
    def bytes_sent(self) -> int:
        return self._processes.sent

    def state_dict(self) -> dict[str, Any]:
        """As torch's; a rank schedule that is a function is not saved, only that there was one."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            if callable(group["rank_schedule"]):
                group["rank_schedule"] = FUNCTION
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every tensor keeps the dtype it was saved in, and a state that is not this one's is refused.

        Raises:
            UsageError: other groups, rules or shapes than this optimizer has.
        """
        check_state(self.param_groups, state_dict)
        schedules = [group["rank_schedule"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, schedule in zip(self.param_groups, schedules, strict=True):
            if group["rank_schedule"] == FUNCTION:
                group["rank_schedule"] = schedule
        order = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        for p, index in zip(order, indices, strict=True):
            for key, saved in state_dict["state"].get(index, {}).items():
                # torch casts to the dtype of the parameter: a float32 momentum would be rounded to bfloat16. And it
                # keeps what need not be cast, so that steps would change `state_dict`. Counters stay on the CPU.
                if isinstance(saved, Tensor):
                    here = saved.to(device=p.device if saved.ndim else "cpu", copy=True)
                    self.state[p][key] = spread_like(p, here, self._processes) if saved.ndim else here

    def _refuse_non_finite(self) -> None:
        named = [(group, i) for group in self.param_groups for i, p in enumerate(group["params"]) if p.grad is not None]
        grads = [local(group["params"][i].grad) for group, i in named]
        # The norm first: one number to look at. Squares of huge entries overflow it, so its verdict is looked into.
        filled = [grad for grad in grads if grad.numel()]
        found = []
        if filled and not torch.nn.utils.get_total_norm(filled).isfinite():
            found = [place for place, grad in zip(named, grads, strict=True) if not grad.isfinite().all()]
        # Where one process finds something in its shards all stop, and none waits for the others.
        spread = next((p for group in self.param_groups for p in group["params"] if isinstance(p, DTensor)), None)
        if spread is None and not found:
            return
        if spread is not None and least_of_all(-float(bool(found)), spread, self._processes) == 0:
            return
        if not found:
            what = "the gradient of a parameter, in the shard of another process,"
        else:
            group, i = found[0]
            name = f"{group['param_names'][i]}, " if "param_names" in group else ""
            what = f"the gradient of a parameter ({name}shape {tuple(group['params'][i].shape)})"
        raise NonFiniteError(
            f"{what} is not finite at step {self.param_groups[0]['step']}; weights and momentum are as they were "
            "before it",
            hint="lower the learning rate, or resume from the last checkpoint",
        )
