"""What a compressed model says of itself goes along with its training."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import PreTrainedModel

from lowrank_kit.checkpoint.card import trained_card
from lowrank_kit.checkpoint.folder import REPORT_FILE
from lowrank_kit.checkpoint.hub import model_name, resolve_config
from lowrank_kit.checkpoint.quantizer import QUANT_METHOD
from lowrank_kit.report.files import write_text
from lowrank_kit.training.settings import TrainSettings


def take_along(settings: TrainSettings, model: PreTrainedModel, output: Path) -> None:
    """Put compression.json and a model card into the folder of a run that trains a compressed model; else do nothing.

    Ranks and forms stay, and so does what text the compression has read, which `lowrank eval` does not score on.

    Args:
        settings: of the run.
        model: that it trains.
        output: folder of the run.
    """
    quantization = getattr(model.config, "quantization_config", None)
    if settings.model is None or getattr(quantization, "quant_method", None) != QUANT_METHOD:
        return
    base = resolve_config(settings.model)
    report = base / REPORT_FILE
    if report.is_file():
        shutil.copyfile(report, output / REPORT_FILE)
    card = trained_card(
        base_model=model_name(settings.model), adapters=settings.lora is not None, reported=report.is_file()
    )
    write_text(output / "README.md", card)
