"""Which rule steps which parameter: matrices by the matrix rule, everything else by AdamW."""

from __future__ import annotations

from typing import Any

from torch import nn

from lowrank_kit.matrices import find_matrices


def parameter_groups(
    model: nn.Module,
    *,
    rule: str,
    lr: float,
    adamw_lr: float | None = None,
    weight_decay: float = 0.0,
    **options: Any,
) -> list[dict[str, Any]]:
    """Groups for `NuMuon`: matrices, then embeddings, head and routers (AdamW), then vectors (AdamW, no weight decay).

    Args:
        model: a transformers model; tied parameters appear once.
        rule: numuon, muon or adamw, for the matrices.
        lr: learning rate of the matrices.
        adamw_lr: learning rate of all that is no matrix; None is `lr`.
        weight_decay: of matrices, embeddings, head and routers.
        options: further options of the matrix group, as `rank_schedule` and `total_steps`.

    Returns:
        Groups with their names under `name`; empty ones are left out.
    """
    matrices = {matrix.parameter for matrix in find_matrices(model)}
    other_lr = lr if adamw_lr is None else adamw_lr
    groups: dict[str, dict[str, Any]] = {
        "matrices": {"params": [], "rule": rule, "lr": lr, "weight_decay": weight_decay, **options},
        "embeddings": {"params": [], "rule": "adamw", "lr": other_lr, "weight_decay": weight_decay},
        "vectors": {"params": [], "rule": "adamw", "lr": other_lr, "weight_decay": 0.0},
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # The biases of fused experts are stacked to 2-D, and vectors all the same.
            vector = parameter.ndim < 2 or name.endswith("bias")
            kind = "matrices" if name in matrices else "vectors" if vector else "embeddings"
            groups[kind]["params"].append(parameter)
    return [{"name": name, **group} for name, group in groups.items() if group["params"]]
