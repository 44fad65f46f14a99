"""What a user sees of the models of a hub; a process of its own, for the hub's address is read at the first import.

`python -m tests.checkpoint.hub_client`, with HF_ENDPOINT; prints one JSON document.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from typing import Any
from urllib.request import urlopen

from cli.main import run
from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.errors import LowRankError

BAD = ("tests/gated", "tests/missing", "tests/pickled", "tests/incomplete", "tests/damaged")
PLAN = ["--keep", "0.5", "--objective", "plain", "--dry-run", "--json", "--device", "cpu"]


def described(checkpoint: Checkpoint) -> dict[str, Any]:
    """What is known of a checkpoint."""
    headers = {name: [h.dtype, list(h.shape), h.file, h.nbytes, h.offset] for name, h in checkpoint.headers.items()}
    return {"headers": headers, "nbytes": checkpoint.nbytes}


def opened(how: str, model: str) -> dict[str, Any]:
    """What is known of a model, what of it is in the cache, how many tensors can be read; or the error."""
    try:
        checkpoint = getattr(Checkpoint, how)(model)
    except LowRankError as error:
        return {"error": str(error), "code": error.exit_code}
    told = described(checkpoint) | {"files": sorted(path.name for path in checkpoint.path.iterdir())}
    try:
        return told | {"read": len(list(checkpoint.tensors()))}
    except LowRankError as error:
        return told | {"read": str(error)}


def planned(model: str, allocation: str) -> dict[str, Any]:
    """Of `lowrank compress --dry-run --json`."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run(["compress", model, "--allocation", allocation, *PLAN]) == 0
    return json.loads(out.getvalue())


def ask_hub(path: str) -> Any:
    """Of the server for tests: what it sent, or that it stops."""
    with urlopen(f"{os.environ['HF_ENDPOINT']}/{path}") as answer:
        return json.loads(answer.read())


def main() -> None:
    """All of it, in one process."""
    foreign: dict[str, Any] = {how: opened(how, "tests/foreign") for how in ("open", "open_headers")}
    foreign["sent"] = [file for file in ask_hub("sent") if file.endswith(".safetensors")]
    told: dict[str, Any] = {model: opened("open_headers", model) for model in ("tests/sharded", "tests/single", *BAD)}
    told["foreign"] = foreign
    told["sent"] = ask_hub("sent")
    told["plans"] = {allocation: planned("tests/sharded", allocation) for allocation in ("uniform", "erank")}
    told["downloaded"] = opened("open", "tests/single")
    before = ask_hub("sent")
    told["cached"] = opened("open_headers", "tests/single")
    assert ask_hub("sent") == before
    ask_hub("stop")
    told["unreachable"] = opened("open_headers", "tests/single")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
