"""`mup.json`: what a model was scaled from, beside its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from lowrank_kit.config import settings_difference
from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.report.files import write_json
from lowrank_kit.scaling.mup import MuP

SIDECAR = "mup.json"
# Of a config's dictionary, what does not say how large the model is.
_NOT_SIZES = ("transformers_version", "_name_or_path", "architectures", "dtype")


def save_rule(rule: MuP, folder: Path) -> None:
    """Write the sidecar of a model folder."""
    write_json(folder / SIDECAR, _record(rule))


def load_rule(folder: Path) -> MuP:
    """The rule that a model folder was trained by.

    Raises:
        UsageError: no sidecar.
        LowRankError: one that cannot be read.
    """
    told = _read(folder)
    try:
        base, target = (CONFIG_MAPPING[told[name]["model_type"]](**told[name]) for name in ("base", "target"))
        return MuP(base, target, **{name: told[name] for name in ("optimizer", "depth", "form")})
    except (KeyError, TypeError) as error:
        raise LowRankError(f"{folder / SIDECAR}: not the sidecar of a scaled model: {error!r}") from error


def check_rule(rule: MuP | None, folder: Path) -> None:
    """Refuse to go on by another rule than a run was started with.

    Raises:
        UsageError: the sidecar says otherwise; with the difference.
    """
    if rule is None:
        return
    told, now = _read(folder), _record(rule)
    difference = [
        f"{part}: {line}" for part in ("base", "target") for line in settings_difference(told.get(part, {}), now[part])
    ]
    if difference:
        raise UsageError(
            f"{folder} was trained from another base or to another target: {'; '.join(difference)}",
            hint="--mup-base as it was, or a new folder",
        )


def _record(rule: MuP) -> dict[str, Any]:
    return {
        "base": _sizes(rule.base),
        "target": _sizes(rule.target),
        "optimizer": rule.optimizer,
        "depth": rule.depth,
        "form": rule.form,
        "width_ratio": rule.width_ratio,
        "depth_ratio": rule.depth_ratio,
    }


def _sizes(config: PreTrainedConfig) -> dict[str, Any]:
    told = json.loads(config.to_json_string(use_diff=True))
    return {name: value for name, value in told.items() if name not in _NOT_SIZES}


def _read(folder: Path) -> dict[str, Any]:
    try:
        told = json.loads((folder / SIDECAR).read_text())
    except FileNotFoundError:
        raise UsageError(f"{folder} has no {SIDECAR}: it was not trained with --mup-base") from None
    except ValueError as error:
        raise LowRankError(f"{folder / SIDECAR} is no JSON: {error}") from None
    return dict(told)
