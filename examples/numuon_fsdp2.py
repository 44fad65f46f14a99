"""NuMuon on a model sharded by FSDP2, in a plain PyTorch loop: the same three lines, after `fully_shard`.

torchrun --nproc-per-node 2 examples/numuon_fsdp2.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from lowrank_kit import NuMuon, parameter_groups

STEPS = 20


def main() -> list[float]:
    """Overfit one batch, each process on its rows; returns the mean losses."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    mesh = init_device_mesh(device, (world,))

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).to(device)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    groups = parameter_groups(model, rule="numuon", lr=4e-3, rank_schedule="cosine:1:0.25", total_steps=STEPS)
    optimizer = NuMuon(groups)

    batch = torch.randint(0, config.vocab_size, (4 * world, 64))[4 * rank : 4 * rank + 4].to(device)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / world)
    if rank == 0:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {optimizer.bytes_sent:,} bytes sent by each for a step")
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
