"""A model as one ONNX graph, from tokens to logits, checked with onnxruntime; layers of low rank stay two products.

The graph has no cache of keys and values: it scores whole sequences, and generates by running them again.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_kit.checkpoint.beside import copy_beside
from lowrank_kit.checkpoint.card import graph_card
from lowrank_kit.checkpoint.folder import CONFIG_FILE
from lowrank_kit.checkpoint.loading import load_model
from lowrank_kit.device import DTYPES
from lowrank_kit.errors import CheckFailedError, LowRankError, UsageError, need_packages
from lowrank_kit.layers.experts import PROJECTIONS, LowRankExperts, LowRankStack, expert_inner
from lowrank_kit.matrices import find_matrices
from lowrank_kit.report.files import write_text
from lowrank_kit.serving.exports.base import Exported, ExportSettings, Kind, Request

GRAPH_FILE = "model.onnx"
INPUTS, OUTPUT = ("input_ids", "attention_mask"), "logits"
# Sequences and tokens of the sequences that the graph is checked on; the first of several begins with padding.
CHECKED = ((1, 5), (3, 12), (2, 1))
# Largest difference of logits, over the largest logit: some roundings of the number format.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2}


class Logits(nn.Module):
    """What the graph is of: the logits of all tokens, without a cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [batch, sequence, vocabulary] for tokens and mask [batch, sequence]."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def write_onnx(request: Request, folder: Path) -> Exported:
    """Write the graph, config.json and the tokenizer, and run the graph beside the model.

    Raises:
        LowRankError: a model that torch cannot make a graph of.
        CheckFailedError: the graph has other logits than the model.
    """
    checkpoint = request.checkpoint
    dtype = DTYPES.get(request.settings.dtype, torch.float32)
    model = load_model(checkpoint, device=torch.device("cpu"), dtype=dtype).eval()
    _batch_experts(model)
    difference = _write_graph(model, folder / GRAPH_FILE)
    copy_beside(checkpoint.path, folder)
    write_text(folder / CONFIG_FILE, json.dumps(checkpoint.config, indent=2) + "\n")
    nbytes = sum(file.stat().st_size for file in folder.glob(f"{GRAPH_FILE}*"))
    shapes = ", ".join(f"{batch} x {length}" for batch, length in _checked(model))
    return Exported(
        card=graph_card(base_model=request.name, graph=GRAPH_FILE, inputs=INPUTS, output=OUTPUT),
        result={"bytes_before": checkpoint.nbytes, "bytes_after": nbytes, "largest_difference": difference},
        notes=[
            f"checked with onnxruntime on {shapes} tokens: logits differ by {difference:.1e} of the largest",
            f"inputs {' and '.join(INPUTS)} [batch, sequence], output {OUTPUT}; no cache of keys and values",
        ],
    )


def check_onnx(settings: ExportSettings) -> None:
    """Refuse what onnxruntime cannot run, and missing packages.

    Raises:
        UsageError: one of these.
    """
    need_packages(["onnx", "onnxscript", "onnxruntime"], extra="onnx", wanted_by="--to onnx")
    if DTYPES.get(settings.dtype, torch.float32) not in TOLERANCE:
        raise UsageError(
            f"onnxruntime on a CPU has no products of {settings.dtype}", hint="--dtype float32, or float16"
        )


def _write_graph(model: PreTrainedModel, path: Path) -> float:
    """Write the graph; the largest difference of its logits."""
    sides = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    ids, mask = (torch.ones(2, 8, dtype=torch.int64) for _ in INPUTS)  # one tensor would be one input
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch about itself
        try:
            program = torch.onnx.export(
                Logits(model).eval(),
                (ids, mask),
                dynamo=True,
                dynamic_shapes=(sides, sides),
                input_names=list(INPUTS),
                output_names=[OUTPUT],
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise LowRankError(
                f"torch {torch.__version__} makes no graph of {type(model).__name__}: {_reason(error)}",
                hint="another --to, or a newer torch and onnxscript",
            ) from error
    assert program is not None
    for part in _parts(program.model):
        part.metadata_props.clear()  # names of files on this machine, for each operation
    program.save(str(path))
    return _compare(model, path)


def _batch_experts(model: PreTrainedModel) -> None:
    """Have experts run without asking which of them tokens go to: a graph is the same for all tokens."""
    for module in model.modules():
        if isinstance(module, LowRankExperts):
            module.forward = partial(batched_experts, module)  # type: ignore[method-assign]
    # Those that are dense, as transformers itself does it.
    if any(matrix.expert is not None for matrix in find_matrices(model)):
        model.set_experts_implementation("batched_mm")


def batched_experts(experts: LowRankExperts, x_NI: Tensor, index_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """What `LowRankExperts` gives, with the factors gathered for each token and expert of it.

    Shape legend: N tokens, K experts of a token, I in.
    """
    index, slots = index_NK.reshape(-1), index_NK.shape[1]

    def project(projection: str, _: int, x: Tensor) -> Tensor:
        stack = getattr(experts, PROJECTIONS[projection], None)
        for weight in (stack.A, stack.B) if isinstance(stack, LowRankStack) else (getattr(experts, projection),):
            x = torch.bmm(weight[index], x[..., None])[..., 0]
        return x

    inner = expert_inner(experts, 0, x_NI.repeat_interleave(slots, dim=0), project)
    output = project("down_proj", 0, inner) * weights_NK.reshape(-1, 1)
    return output.view(-1, slots, x_NI.shape[-1]).sum(1).to(x_NI.dtype)


def _reason(error: BaseException) -> str:
    """What was wrong in the first place, without torch's pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _parts(model: Any) -> Iterator[Any]:
    """All of an onnx_ir model that carries notes."""
    yield model
    yield model.graph
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph.all_nodes():
        yield node
        yield from node.outputs


def _checked(model: PreTrainedModel) -> list[tuple[int, int]]:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or max(CHECKED)[1]
    return [(batch, min(length, longest)) for batch, length in CHECKED]


def _compare(model: PreTrainedModel, path: Path) -> float:
    """Largest difference of the graph's logits from the model's, over the largest logit.

    Raises:
        CheckFailedError: more than rounding.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    random = torch.Generator().manual_seed(0)
    vocabulary, worst = model.get_input_embeddings().weight.shape[0], 0.0
    for batch, length in _checked(model):
        ids = torch.randint(vocabulary, (batch, length), generator=random)
        mask = torch.ones_like(ids)
        mask[0, : length // 3] = 0 if batch > 1 else 1
        with torch.no_grad():
            wanted = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        (found,) = session.run([OUTPUT], dict(zip(INPUTS, (ids.numpy(), mask.numpy()), strict=True)))
        seen = mask.bool()
        difference = (torch.from_numpy(found)[seen].double() - wanted[seen].double()).abs().max()
        worst = max(worst, (difference / wanted[seen].double().abs().max().clamp(min=1e-30)).item())
    if not worst <= TOLERANCE[model.dtype]:
        raise CheckFailedError(
            f"the graph has other logits than the model: they differ by {worst:.2g} of the largest, "
            f"{TOLERANCE[model.dtype]:.2g} is rounding",
            hint="--dtype float32, or another --to",
        )
    return worst


KIND = Kind(write=write_onnx, check=check_onnx)
