"""NuMuon in a plain PyTorch loop: three lines make the optimizer, the rest is any training loop."""

from __future__ import annotations

import torch
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

    # Matrices go to NuMuon, embeddings, head and vectors to AdamW.
    groups = parameter_groups(model, rule="numuon", lr=4e-3, rank_schedule="cosine:1:0.25", total_steps=STEPS)
    optimizer = NuMuon(groups)

    batch = torch.randint(0, config.vocab_size, (4, 64))
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for step, loss in enumerate(main(), 1):
        print(f"step {step:2d}  loss {loss:.3f}")
