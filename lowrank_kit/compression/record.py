"""What a compression says of itself: compression.json, config.json and the model card."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lowrank_kit.checkpoint.card import compressed_card
from lowrank_kit.checkpoint.folder import CONFIG_FILE, REPORT_FILE
from lowrank_kit.checkpoint.hub import model_name
from lowrank_kit.checkpoint.quantizer import QUANT_METHOD, needed_version
from lowrank_kit.compression.forms import TITLES
from lowrank_kit.compression.objectives import OBJECTIVES
from lowrank_kit.compression.plan import Plan
from lowrank_kit.compression.recipe import RECIPE_FILE, write_recipe
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.compression.texts import Texts
from lowrank_kit.compression.work import Kept
from lowrank_kit.report.environment import environment
from lowrank_kit.report.files import write_json, write_text


def make_report(
    plan: Plan,
    model: str,
    texts: Texts | None,
    kept: Kept,
    seconds: dict[str, float],
    *,
    device: str = "auto",
    dtype: str = "float32",
) -> dict[str, Any]:
    """The contents of compression.json.

    Args:
        plan: as it was made.
        model: as the user named it.
        texts: what was read, if anything was.
        kept: what the matrices became.
        seconds: what each part took.
        device, dtype: of the runs.
    """
    told = kept.told()
    rows = []
    for planned in plan.matrices:
        name = planned.stored.matrix.name
        piece = told["pieces"].get(name, {})
        made = {
            "kept_energy": piece.get("kept_energy"),
            "relative_error": told["errors"].get(name),
            "seconds": piece.get("seconds"),
        }
        rows.append({**planned.row(), **made})
    return {
        "model": model,
        "command": command_line(model, plan.settings, device=device, dtype=dtype),
        "settings": asdict(plan.settings),
        "totals": plan.totals(),
        "calibration": texts and texts.record(),
        "check": texts and told["losses"],
        "refined": told["refined"],
        "matrices": rows,
        "seconds": seconds,
        "environment": environment(),
    }


def command_line(model: str, settings: CompressSettings, *, device: str = "auto", dtype: str = "float32") -> str:
    """The command that does the same again; in the folder that it made, if the recipe there is needed."""
    words = ["lowrank", "compress", model]
    for field in fields(CompressSettings):
        value, option = getattr(settings, field.name), f"--{field.name.replace('_', '-')}"
        if field.name == "keeps":
            words += ["--recipe", RECIPE_FILE] * bool(value)
        elif isinstance(value, tuple):
            words += [word for one in value for word in (option, one)]
        elif value != field.default and field.name != "time":
            words += [option, str(value)]
    words += ["--device", device] * (device != "auto") + ["--dtype", dtype] * (dtype != "float32")
    return shlex.join([*words, "-o", "OUTPUT"])


def write_documents(folder: Path, plan: Plan, report: dict[str, Any]) -> None:
    """Config, report and model card."""
    config = dict(plan.checkpoint.config)
    if matrices := plan.quantization_config():
        config["quantization_config"] = {
            "quant_method": QUANT_METHOD,
            "format_version": needed_version(matrices),
            "matrices": matrices,
        }
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    write_json(folder / REPORT_FILE, report)
    if plan.settings.keeps:
        write_recipe(folder, plan.settings.keeps)
    card = compressed_card(
        base_model=model_name(report["model"]),
        summary=size_rows(plan.totals()),
        matrices=role_rows(report["matrices"]),
        how=_how(plan.settings, report),
    )
    write_text(folder / "README.md", card)


def _how(settings: CompressSettings, report: dict[str, Any]) -> dict[str, Any]:
    check, text = report["check"] or {}, report["calibration"]
    forms = dict.fromkeys(row["form"] for row in report["matrices"] if row["rank"] is not None)
    refined = report["refined"].items()
    return {
        "budget": settings.budget_words,
        "objective": f"{settings.objective} ({OBJECTIVES[settings.objective].title})",
        "allocation": settings.allocation,
        "form": "; ".join(f"{form} ({TITLES[form]})" for form in forms) or None,
        "refined": ", ".join(f"{stage}: {r['before']:.4g} to {r['after']:.4g}" for stage, r in refined) or None,
        "calibration": text and "{source}, {tokens:,} tokens, sha256 {sha256}".format(**text),
        "loss on check text": check.get("loss_compressed")
        and "{loss_dense:.4f} dense, {loss_compressed:.4f} compressed, in nats per token".format(**check),
        "seed": settings.seed,
        "command": f"`{report['command']}`" if not Path(report["model"]).is_dir() else None,
        "lowrank-kit": report["environment"].get("lowrank-kit"),
    }


def size_rows(totals: dict[str, Any]) -> list[dict[str, Any]]:
    """Kept and removed of the matrices and of the whole model, in numbers; of the files in bytes."""
    pairs = {
        "matrices (numbers)": ("matrix_numbers_before", "matrix_numbers_after"),
        "model (numbers)": ("model_numbers_before", "model_numbers_after"),
        "files (bytes)": ("bytes_before", "bytes_after"),
    }
    return [
        {
            "": name,
            "dense": totals[before],
            "compressed": totals[after],
            "kept %": round(100 * totals[after] / totals[before], 1),
            "removed %": round(100 - 100 * totals[after] / totals[before], 1),
        }
        for name, (before, after) in pairs.items()
    ]


def role_rows(matrices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per role: how many, shape, lowest and highest rank, mean error, and why some stay dense."""
    rows = []
    for role in dict.fromkeys(m["role"] for m in matrices):
        here = [m for m in matrices if m["role"] == role]
        ranks = sorted({m["rank"] for m in here if m["rank"] is not None})
        errors = [m["relative_error"] for m in here if m.get("relative_error") is not None]
        rows.append(
            {
                "role": role,
                "matrices": sum(m.get("experts") or 1 for m in here),
                "out x in": ", ".join(dict.fromkeys(f"{m['out']} x {m['in']}" for m in here)),
                "rank": "-".join(dict.fromkeys(str(rank) for rank in (ranks[:1] + ranks[-1:]))) or None,
                "dense": sum(m.get("experts") or 1 for m in here if m["rank"] is None),
                "error": sum(errors) / len(errors) if errors else None,
                "note": "; ".join(dict.fromkeys(m["note"] for m in here if m["note"])),
            }
        )
    return rows
