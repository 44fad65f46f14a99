"""Several processes at one compression: each has its share of the text, and of the matrices to decompose.

Process p of P has sequences p, p + P, p + 2 P and so on of every text. Sums over the text are summed over the
processes, so that all of them know the same; what is decomposed by one is told to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from lowrank_kit.errors import UsageError
from lowrank_kit.linalg.gram import zero_gram
from lowrank_kit.processes import are_connected, gathered, num_processes, process_index, summed

T = TypeVar("T")


def share_of(ids_NT: Tensor) -> Tensor:
    """The sequences of this process.

    Raises:
        UsageError: fewer sequences than processes.
    """
    if len(ids_NT) < num_processes():
        raise UsageError(
            f"{len(ids_NT)} sequences of text do not divide over {num_processes()} processes",
            hint="fewer processes, or more of --calibration-blocks, --check-blocks and --refine-blocks",
        )
    return ids_NT[process_index() :: num_processes()]


def own_of(chosen_B: Tensor) -> Tensor:
    """Places in the share of this process, of the sequences among some that it has."""
    mine = chosen_B[chosen_B % num_processes() == process_index()]
    return mine // num_processes()


def place_of(index: int) -> int:
    """Number of a sequence of this process's share among all."""
    return process_index() + index * num_processes()


def total(value: float) -> float:
    """A number, summed over the processes."""
    return float(summed(torch.tensor(value, dtype=torch.float64)).item())


def agreed(found: bool) -> bool:
    """Whether all processes say so."""
    return all(gathered(found))


def sum_grams(grams: dict[str, Tensor], counts: dict[str, int], sides: Mapping[str, int], device: torch.device) -> None:
    """Sum Grams and the tokens in them over the processes, in place; one without a token is not there afterwards.

    Args:
        grams: key -> upper triangle; of a process without a token for it absent.
        counts: key -> tokens.
        sides: key -> side, of all that there may be, in the same order on all processes.
        device: of the Grams.
    """
    if not are_connected():
        return
    tokens = summed(torch.tensor([counts.get(key, 0) for key in sides])).tolist()
    for (key, side), count in zip(sides.items(), tokens, strict=True):
        if count:
            grams[key] = summed(grams[key] if key in grams else zero_gram(side, device))
            counts[key] = count


def spread(costs: Mapping[str, int], work: Callable[[str], T]) -> Iterator[tuple[str, T]]:
    """Do a piece of work for each name, on one process each; all get all results, in the order of the names.

    Args:
        costs: name -> what it costs, in any unit.
        work: name -> result, which may be sent.
    """
    if not are_connected():
        yield from ((name, work(name)) for name in costs)
        return
    loads = [0] * num_processes()
    mine: list[str] = []
    for name in sorted(costs, key=lambda name: -costs[name]):  # the dearest first, to whom has least
        owner = loads.index(min(loads))
        loads[owner] += costs[name]
        mine += [name] * (owner == process_index())
    every: dict[str, T] = {}
    for done in gathered({name: work(name) for name in mine}):
        every |= done
    yield from ((name, every[name]) for name in costs)
