"""Bytes that NuMuon's steps send over the matrices of a Llama block, by way of distribution.

    python evals/training/traffic.py

Processes on one machine, over gloo; the bytes do not depend on the machine. Writes results-traffic.json.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lowrank_kit.optim import NuMuon
from lowrank_kit.report.environment import environment
from lowrank_kit.report.files import write_json
from lowrank_kit.report.tables import markdown_table

HERE = Path(__file__).parent
FRACTIONS = (0.05, 0.25, 0.5)
WAYS = ("gather", "owner", "sharded", "auto")
WIDTHS = (512, 1024, 2048)
WORLDS = (2, 4)


def shapes(width: int) -> list[tuple[int, int]]:
    """q, k, v, o, gate, up and down of a block."""
    mlp = -(-8 * width // 3 // 64) * 64
    return [*[(width, width)] * 4, *[(mlp, width)] * 2, (width, mlp)]


def worker(rank: int, world: int, folder: str) -> None:
    """Two steps of each setting; the bytes are those of the second, which starts from a basis."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    rows = []
    for width in WIDTHS[: None if world == 2 else 2]:
        for fraction in FRACTIONS:
            sent = {way: bytes_sent(shapes(width), mesh, fraction, way) for way in WAYS}
            rows.append(
                {"processes": world, "width": width, "rank fraction": fraction, "gather MB": sent["gather"] / 1e6}
                | {way: sent[way] / sent["gather"] for way in WAYS[1:]}
            )
    if rank == 0:
        Path(folder, f"{world}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def bytes_sent(sizes: list[tuple[int, int]], mesh: Any, fraction: float, way: str) -> int:
    """By all processes together, for one step."""
    torch.manual_seed(0)
    params = [nn.Parameter(distribute_tensor(torch.randn(size), mesh, [Shard(0)])) for size in sizes]
    optimizer = NuMuon(params, rank_schedule=f"fixed:{fraction}", distribution=way, health_every=0)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    sent = torch.tensor(optimizer.bytes_sent)
    dist.all_reduce(sent)
    return int(sent)


def main() -> None:
    """Run, print and write."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for world in WORLDS:
            torch.multiprocessing.spawn(worker, (world, folder), nprocs=world)
            rows += json.loads(Path(folder, f"{world}.json").read_text())
    print(markdown_table(rows))
    write_json(HERE / "results-traffic.json", {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
