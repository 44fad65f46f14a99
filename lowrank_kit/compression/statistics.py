"""What the inputs of the matrices look like on real text: one Gram for each input that is read.

Shape legend: I in, N tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank_kit.data.blocks import TokenBlocks
from lowrank_kit.errors import LowRankError
from lowrank_kit.matrices import Matrix


def input_grams(
    model: nn.Module, matrices: Iterable[Matrix], blocks: TokenBlocks, *, batch_size: int = 8
) -> dict[str, Tensor]:
    """Gram H = sum over tokens of x x^T of every input that a matrix reads.

    Products are made in float32 or better and summed in float64. Matrices that share their input share its Gram.

    Args:
        model: a causal LM; runs on the device it is on.
        matrices: the plain (not fused expert) matrices wanted.
        blocks: calibration text, without padding.
        batch_size: sequences in a forward pass.

    Returns:
        `Matrix.shares_input` -> [I, I] float64 on the CPU.

    Raises:
        LowRankError: NaN or Inf in an input, or no input at all, with the matrix named.
    """
    readers = {matrix.shares_input: matrix.name for matrix in matrices}
    grams: dict[str, Tensor] = {}
    device = next(model.parameters()).device
    ids = blocks.ids
    with _hooks(model, readers, grams), torch.inference_mode():
        for start in tqdm(range(0, len(ids), batch_size), desc="calibration", unit="batch", disable=None):
            batch = ids[start : start + batch_size].to(device=device, dtype=torch.int64)
            model(input_ids=batch, use_cache=False)
    unread = [name for key, name in readers.items() if key not in grams]
    if unread:
        raise LowRankError(
            f"the calibration text reached {len(readers) - len(unread)} of {len(readers)} inputs, not {unread[0]}",
            hint="more text: --calibration-blocks; or --objective plain, which needs none",
        )
    return {key: gram.cpu() for key, gram in grams.items()}


@contextmanager
def _hooks(model: nn.Module, readers: dict[str, str], grams: dict[str, Tensor]) -> Iterator[None]:
    """Add the inputs of the named modules to `grams`; model and training mode are as before afterwards."""
    with ExitStack() as stack:
        for key, name in readers.items():
            handle = model.get_submodule(name).register_forward_pre_hook(_adder(grams, key, name))
            stack.callback(handle.remove)
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            yield
        finally:
            # Not module.train(), which would set the children too.
            for module in training:
                module.training = True


def _adder(grams: dict[str, Tensor], key: str, name: str) -> Any:
    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x_NI = args[0].reshape(-1, args[0].shape[-1])
        x_NI = x_NI.float() if x_NI.dtype in (torch.float16, torch.bfloat16) else x_NI
        product = x_NI.mT @ x_NI
        # Not finite where an activation is not, nor where the square of one is too large.
        if not product.isfinite().all():
            raise LowRankError(
                f"NaN or Inf in the input of {name}: {int((~x_NI.isfinite()).sum())} of {x_NI.numel()} activations, "
                f"the others up to {x_NI.nan_to_num(0, 0, 0).abs().max():.3g}",
                hint="try --dtype float32; if the dense model itself gives NaN on this text, it is broken",
            )
        product = product.to(torch.float64 if product.device.type != "mps" else torch.float32)
        grams[key] = grams[key].add_(product) if key in grams else product

    return add
