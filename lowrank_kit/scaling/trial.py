"""One size trained at several learning rates, one after another or all at once as an ensemble.

The members of an ensemble start from the same weights and read the same batches. Every parameter of theirs is one
tensor with a leading dimension of members, and one forward pass, one backward pass and one step of the optimizer serve
all of them. A step is linear in its rate, so each member goes its own share of a step of rate 1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from lowrank_kit.errors import NonFiniteError, UsageError
from lowrank_kit.optim import NuMuon, parameter_groups
from lowrank_kit.optim.rules import MATRIX_RULES, RULES
from lowrank_kit.scaling.mup import Group, MuP

# Of the steps, the last, over which the loss is taken in the mean.
LAST_SHARE = 1 / 8
# Numbers of the matrices of a block below which an ensemble is faster: see evals/scaling. From here on the time goes
# into arithmetic, of which it saves nothing.
ENSEMBLE_BELOW = 500_000


@dataclass(frozen=True)
class TrialSettings:
    """How a model is trained.

    Args:
        optimizer: numuon, muon, adamw or sgd, for the matrices; AdamW steps what is no matrix.
        adamw_share: of the learning rate, for what is no matrix.
        steps: of the optimizer.
        batch_size: sequences in a step.
        warmup: share of the steps; a cosine to 0 follows.
        weight_decay: decoupled, of the base.
        clip: largest gradient norm; 0: no clipping.
        rank: schedule, of numuon.
        topk: of numuon, see `NuMuon`.
    """

    optimizer: str = "numuon"
    adamw_share: float = 1.0
    steps: int = 100
    batch_size: int = 8
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    rank: str = "cosine:1:0.25"
    topk: str = "warm"

    def __post_init__(self) -> None:
        if self.optimizer not in RULES:
            raise UsageError(f'no optimizer "{self.optimizer}"', hint=", ".join(RULES))
        for name, value, least in (("steps", self.steps, 1), ("batch size", self.batch_size, 1)):
            if value < least:
                raise UsageError(f"{name} must be at least {least}, got {value}")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"the share of warmup must be in [0, 1), got {self.warmup:g}")
        if self.adamw_share <= 0:
            raise UsageError(f"the share of AdamW must be above 0, got {self.adamw_share:g}")
        if self.weight_decay < 0 or self.clip < 0:
            raise UsageError(f"no negative weight decay or clip: {self.weight_decay:g}, {self.clip:g}")

    def rate(self, step: int) -> float:
        """Share of the peak learning rate, step 0 being the first."""
        warm = round(self.warmup * self.steps)
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, self.steps - warm))


def draw_batches(blocks: Tensor, settings: TrialSettings, seed: int) -> Tensor:
    """Batches in the order they are trained on, the same for all sizes: int64 [steps, batch size, T].

    Args:
        blocks: int [N, T] token ids; where there are fewer than are needed, all are taken again in another order.
        seed: of the order.
    """
    wanted = settings.steps * settings.batch_size
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(len(blocks), generator=generator) for _ in range(math.ceil(wanted / len(blocks)))]
    return blocks[torch.cat(rounds)[:wanted]].long().unflatten(0, (settings.steps, settings.batch_size))


def train_rates(
    model: PreTrainedModel,
    rule: MuP | None,
    batches: Tensor,
    rates: Sequence[float],
    settings: TrialSettings,
    *,
    ensemble: bool | None = None,
) -> list[float]:
    """The loss at the end of training at each learning rate, inf where it diverged.

    Args:
        model: its first weights; it is left as it is.
        rule: that it is scaled by; None trains every parameter at the rate itself.
        batches: int64 [steps, batch size, T].
        rates: peak learning rates of the base.
        settings: of the training.
        ensemble: all rates at once; None where that is faster, by the size of the model.

    Returns:
        Means over the last eighth of the steps, nats per token.
    """
    if ensemble is None:
        ensemble = len(rates) > 1 and ensemble_pays(model)
    if ensemble:
        losses = _train_ensemble(model, rule, batches, rates, settings)
    else:
        losses = torch.stack([_train_one(model, rule, batches, rate, settings) for rate in rates], dim=1)
    last = losses[-max(1, round(LAST_SHARE * len(losses))) :].mean(dim=0).tolist()
    return [loss if math.isfinite(loss) else math.inf for loss in last]


def ensemble_pays(model: PreTrainedModel) -> bool:
    """Whether its blocks are so small that time goes into calls, and can be stacked: fused experts cannot."""
    groups = parameter_groups(model, rule="muon", lr=1.0)
    matrices = [p for group in groups if group["rule"] in MATRIX_RULES for p in group["params"]]
    if not matrices or any(p.ndim > 2 for p in matrices):
        return False
    return sum(p.numel() for p in matrices) / model.config.get_text_config().num_hidden_layers < ENSEMBLE_BELOW


def _train_one(
    model: PreTrainedModel, rule: MuP | None, batches: Tensor, rate: float, settings: TrialSettings
) -> Tensor:
    """Losses [steps]; inf from where it diverged on."""
    model = copy.deepcopy(model).train()
    optimizer = NuMuon(_groups(model, rule, rate, settings))
    schedule = LambdaLR(optimizer, settings.rate)
    folds = {name: 1.0 if rule is None else rule.fold(name) for name, _ in model.named_parameters()}
    losses = torch.full((len(batches),), math.inf, dtype=torch.float64)
    for step, ids in enumerate(batches):
        loss = _next_token_loss(model(input_ids=ids, use_cache=False).logits, ids)
        model.zero_grad()
        loss.backward()
        losses[step] = loss.detach()
        _clip({name: p.grad[None] for name, p in model.named_parameters() if p.grad is not None}, folds, settings.clip)
        try:
            optimizer.step()
        except NonFiniteError:
            losses[step:] = math.inf
            break
        schedule.step()
    return losses


def _train_ensemble(
    model: PreTrainedModel, rule: MuP | None, batches: Tensor, rates: Sequence[float], settings: TrialSettings
) -> Tensor:
    """Losses [steps, members]; those of a member are inf from where it diverged on."""
    stacked = {
        name: p.detach().repeat(len(rates), *[1] * p.ndim).requires_grad_() for name, p in model.named_parameters()
    }
    groups = _groups(model, rule, 1.0, settings)
    for group in groups:
        group["params"] = [stacked[name] for name in group["param_names"]]
    optimizer = NuMuon(groups)
    schedule = LambdaLR(optimizer, settings.rate)
    folds = {name: 1.0 if rule is None else rule.fold(name) for name in stacked}
    shares = torch.tensor(rates, dtype=model.dtype, device=batches.device)
    members = torch.arange(len(rates), device=batches.device)
    model.train()

    def forward(parameters: dict[str, Tensor], ids: Tensor) -> Tensor:
        outputs = functional_call(model, parameters, kwargs={"input_ids": ids, "use_cache": False})
        return _next_token_loss(outputs.logits, ids)

    losses = torch.full((len(batches), len(rates)), math.inf, dtype=torch.float64, device=batches.device)
    for step, ids in enumerate(batches):
        found = vmap(forward, in_dims=(0, None), randomness="same")(stacked, ids)
        optimizer.zero_grad()
        found.sum().backward()
        losses[step, members] = found.detach().double()
        sound = _finite(stacked)
        if not sound.all():
            losses[-1, members[~sound]] = math.inf
            members = members[sound]
            _drop(optimizer, stacked, sound)
        if not len(members):
            break
        _clip({name: p.grad for name, p in stacked.items() if p.grad is not None}, folds, settings.clip)
        _step(optimizer, stacked, shares[members])
        schedule.step()
    return losses


def _next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _finite(stacked: dict[str, Tensor]) -> Tensor:
    """Whose gradients are finite: bool [members]."""
    grads = [p.grad for p in stacked.values() if p.grad is not None]
    return torch.stack([grad.flatten(1).isfinite().all(dim=1) for grad in grads]).all(dim=0)


def _drop(optimizer: NuMuon, stacked: dict[str, Tensor], keep: Tensor) -> None:
    """Take members that diverged out of the ensemble."""
    for group in optimizer.param_groups:
        for place, name in enumerate(group["param_names"]):
            before = stacked[name]
            after = before.detach()[keep].requires_grad_()
            after.grad = None if before.grad is None else before.grad[keep]
            # One counter of steps serves all members, the rest is by member.
            state = optimizer.state.pop(before, {})
            optimizer.state[after] = {key: value[keep] if value.ndim else value for key, value in state.items()}
            group["params"][place] = stacked[name] = after


@torch.no_grad()
def _step(optimizer: NuMuon, stacked: dict[str, Tensor], shares: Tensor) -> None:
    before = {name: p.clone() for name, p in stacked.items()}
    optimizer.step()
    for name, p in stacked.items():
        p.copy_(torch.lerp(before[name], p, shares.view(-1, *[1] * (p.ndim - 1)).expand_as(p)))


@torch.no_grad()
def _clip(grads: dict[str, Tensor], folds: dict[str, float], most: float) -> None:
    """Scale gradients [members, ...] down, in place, member by member: as `MuP.clip_grad_norm_` does."""
    if not most:
        return
    norms = [torch.linalg.vector_norm(grad.flatten(1), dim=1) * folds[name] for name, grad in grads.items()]
    total = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    share = (most / (total + 1e-6)).clamp(max=1.0)
    for grad in grads.values():
        grad.mul_(share.view(-1, *[1] * (grad.ndim - 1)))


def _groups(model: PreTrainedModel, rule: MuP | None, rate: float, settings: TrialSettings) -> list[Group]:
    options: dict[str, Any] = {}
    if settings.optimizer == "numuon":
        # No comparisons with the exact step: what is done about them is done for a group, so for all members.
        options = {"rank_schedule": settings.rank, "topk": settings.topk, "total_steps": settings.steps}
        options["health_every"] = 0
    options |= {"adamw_lr": rate * settings.adamw_share, "weight_decay": settings.weight_decay}
    groups = parameter_groups(model, rule=settings.optimizer, lr=rate, **options)
    return groups if rule is None else rule.scaled(groups)
