"""NuMuon in transformers' Trainer, through its hook for optimizers that need the whole model."""

from __future__ import annotations

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lowrank_kit.optim import NuMuonFactory

STEPS = 20


def main() -> list[float]:
    """Overfit one batch; returns the losses."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    batch = [{"input_ids": row, "labels": row} for row in torch.randint(0, config.vocab_size, (4, 64))]

    # The learning rate of the matrices; the Trainer's scheduler moves that of every group.
    options = {"rule": "numuon", "lr": 4e-3, "rank_schedule": "cosine:1:0.25", "total_steps": STEPS}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                folder,
                max_steps=STEPS,
                per_device_train_batch_size=4,
                logging_steps=1,
                disable_tqdm=True,
                report_to=[],
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=batch,
            optimizer_cls_and_kwargs=(NuMuonFactory, options),
        )
        trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    for step, loss in enumerate(main(), 1):
        print(f"step {step:2d}  loss {loss:.3f}")
