"""Experts of low rank: for each factorized projection two stacked 3-D factors instead of one fused 3-D weight.

Shape legend: N tokens, K experts of a token, E experts, O out, I in, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Names of the fused weights that transformers' experts have, and what their factors' names begin with: another word,
# or transformers would take the factors for the weight when it renames and converts what is saved and loaded.
PROJECTIONS = {"gate_up_proj": "gate_up", "up_proj": "up", "down_proj": "down"}
# Of one part of one expert's sentinel. Not one number: older releases of transformers squeeze what they split.
SENTINEL = (2, 2)


class LowRankStack(nn.Module):
    """The factors of one projection of all experts: W_e = B_e A_e, with A [E, R, I] and B [E, O, R].

    Args:
        num_experts: E.
        in_features: I.
        out_features: O.
        rank: R, one for all experts.
    """

    is_transposed = False

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.rank = rank
        self.A = nn.Parameter(torch.zeros(num_experts, rank, in_features, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(num_experts, out_features, rank, dtype=dtype, device=device))

    def forward(self, expert: int, x: Tensor) -> Tensor:
        """B_e A_e x for x [..., I]."""
        return nn.functional.linear(nn.functional.linear(x, self.A[expert]), self.B[expert])

    def dense_weight(self) -> Tensor:
        """B A, [E, O, I], in the dtype of the factors."""
        return self.B @ self.A

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        experts, out, rank = self.B.shape
        return f"experts={experts}, in_features={self.A.shape[2]}, out_features={out}, rank={rank}"


class LowRankExperts(nn.Module):
    """Takes the place of a family's fused experts, with its gating, and any of its projections factorized.

    Stored are `gate_up.A`, `gate_up.B` and so on, dense projections as they were, and of each factorized one a sentinel
    under the name of the weight: it makes a loader without lowrank-kit stop at a shape mismatch instead of filling in
    random weights, and goes through transformers' conversions as the weight would.

    Args:
        experts: the fused experts, of whom `why_dense` has nothing to say; their weights are taken over.
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        own = self.__dict__.keys()
        self.__dict__.update({name: value for name, value in experts.__dict__.items() if name not in own})
        kind: Any = type(experts)
        self.gating: Callable[[nn.Module, Tensor], Tensor] = kind._apply_gate
        for name, child in experts.named_children():
            self.add_module(name, child)
        for name, parameter in experts.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in experts.named_buffers(recurse=False):
            self.register_buffer(name, buffer)

    def factorize(self, projection: str, rank: int) -> LowRankStack:
        """Put empty factors in the place of a weight, with its dtype and device.

        Args:
            projection: one of `PROJECTIONS` that is dense.
            rank: of the factors.
        """
        weight = self.get_parameter(projection)
        num_experts, out_features, in_features = weight.shape
        form: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        stack = LowRankStack(num_experts, in_features, out_features, rank, **form)
        delattr(self, projection)
        self.add_module(PROJECTIONS[projection], stack)
        self.register_buffer(projection, torch.zeros(sentinel_shape(projection), **form))
        return stack

    def _apply_gate(self, inner: Tensor) -> Tensor:
        return self.gating(self, inner)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum over the experts of each token, [N, I], for hidden states [N, I], their experts and weights [N, K]."""

        def project(projection: str, expert: int, x: Tensor) -> Tensor:
            return expert_linear(self, projection, expert, x)

        return run_experts(self, hidden_states, top_k_index, top_k_weights, project)


def run_experts(
    experts: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    project: Callable[[str, int, Tensor], Tensor],
) -> Tensor:
    """Forward of fused experts, dense or of low rank, expert by expert.

    Args:
        experts: of whom `why_dense` has nothing to say, or `LowRankExperts`.
        hidden_states: [N, I].
        top_k_index: [N, K]; what is no number of an expert is left out.
        top_k_weights: [N, K].
        project: (name of the projection, expert, [tokens, in]) -> [tokens, out]; `expert_linear`, or around it.
    """
    total = torch.zeros_like(hidden_states)
    for expert, token, slot in expert_tokens(experts, top_k_index):
        inner = expert_inner(experts, expert, hidden_states[token], project)
        output = project("down_proj", expert, inner) * top_k_weights[token, slot, None]
        total.index_add_(0, token, output.to(total.dtype))
    return total


def expert_tokens(experts: Any, top_k_index: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Every expert that a token goes to, the numbers of those tokens, and the places of the expert among theirs."""
    for expert in top_k_index.unique().tolist():
        if 0 <= expert < experts.num_experts:
            token, slot = torch.where(top_k_index == expert)
            yield expert, token, slot


def expert_inner(experts: Any, expert: int, x: Tensor, project: Callable[[str, int, Tensor], Tensor]) -> Tensor:
    """What the down projection of an expert reads, [tokens, in], for x [tokens, I]."""
    if hasattr(experts, "gate_up_proj"):
        return experts._apply_gate(project("gate_up_proj", expert, x))
    return experts.act_fn(project("up_proj", expert, x))


def expert_linear(experts: nn.Module, projection: str, expert: int, x: Tensor) -> Tensor:
    """One projection of one expert, [..., out], of x [..., in]."""
    stack = getattr(experts, PROJECTIONS[projection], None)
    if isinstance(stack, LowRankStack):
        return stack(expert, x)
    return nn.functional.linear(x, getattr(experts, projection)[expert])


def sentinel_shape(projection: str) -> tuple[int, int, int]:
    """Shape of what stands in the model for the weight: of one expert, with as many parts as the weight is made of."""
    rows, columns = SENTINEL
    return (1, rows * (2 if projection == "gate_up_proj" else 1), columns)


def why_dense(experts: nn.Module) -> str:
    """Why a module with fused experts cannot be factorized; "" if it can."""
    if not (hasattr(experts, "is_transposed") and hasattr(experts, "_apply_gate") and hasattr(experts, "num_experts")):
        return "experts with a forward of their own"
    if experts.is_transposed:
        return "experts stored transposed"
    if getattr(experts, "has_bias", False):
        return "experts with biases"
    if not getattr(experts, "is_concatenated", True):
        return "experts with gate and up interleaved"
    if getattr(experts, "has_post_expert_norm", False):
        return "experts with a norm"
    names = {name for name, _ in experts.named_parameters(recurse=False)}
    if names not in ({"gate_up_proj", "down_proj"}, {"up_proj", "down_proj"}):
        return "experts with other weights than gate_up_proj or up_proj, and down_proj"
    return ""
