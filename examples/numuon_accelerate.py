"""NuMuon with accelerate: the plain loop, with what accelerate adds."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from lowrank_kit import NuMuon, parameter_groups

STEPS = 20


def main() -> list[float]:
    """Overfit one batch; returns the losses."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    rows = TensorDataset(torch.randint(0, config.vocab_size, (4, 64)))

    # The groups before prepare(), so that the names are the model's own.
    groups = parameter_groups(model, rule="numuon", lr=4e-3, rank_schedule="cosine:1:0.25", total_steps=STEPS)
    accelerator = Accelerator()
    model, optimizer, loader = accelerator.prepare(model, NuMuon(groups), DataLoader(rows, batch_size=4))

    losses = []
    for _ in range(STEPS):
        for (tokens,) in loader:
            loss = model(input_ids=tokens, labels=tokens).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for step, loss in enumerate(main(), 1):
        print(f"step {step:2d}  loss {loss:.3f}")
