"""Where a model is: in a folder, or on the hub, of which the whole or the headers alone are wanted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from lowrank_kit.checkpoint.headers import (
    INDEX_FILE,
    SINGLE_FILE,
    ShardFile,
    check_against_index,
    checked_shard,
    read_index,
    read_shards,
    refuse_link_out,
    shard_files,
)
from lowrank_kit.errors import LowRankError, UsageError

CONFIG_FILE = "config.json"

# "name" or "organisation/name", as the hub allows them. Nothing that starts like a path.
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)?")

# Weights, config, tokenizer: no pickles, no code, no copies in other formats.
HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
HUB_IGNORED = ["*/*", "consolidated*"]
# Requests to the hub at the same time, as its own client makes them.
_REQUESTS = 8


def resolve_model(model: str) -> Path:
    """The folder of a model: the folder itself, or a snapshot of a model on the hub.

    Args:
        model: a folder, or a hub id such as "gpt2" or "Qwen/Qwen3-0.6B".

    Raises:
        UsageError: neither.
        LowRankError: a file in the folder is a symbolic link out of it.
    """
    if (folder := _local_folder(model)) is None:
        with _told_by_the_hub(model):
            folder = Path(snapshot_download(model, allow_patterns=HUB_PATTERNS, ignore_patterns=HUB_IGNORED))
    _refuse_links_out(folder)
    return folder


def model_name(model: str | Path) -> str:
    """What a model is called in cards: the last part of a folder's path, or the name on the hub."""
    return Path(model).absolute().name if Path(model).is_dir() else str(model)


def resolve_config(model: str) -> Path:
    """The folder of a model, where of a model on the hub config.json may be all there is.

    Args, Raises:
        As in `resolve_model`.
    """
    if (folder := _local_folder(model)) is None:
        with _told_by_the_hub(model):
            # The newest where there is a network, else the one in the cache.
            folder = Path(hf_hub_download(model, CONFIG_FILE)).parent
    _refuse_links_out(folder)
    return folder


def resolve_shards(model: str, folder: Path) -> dict[str, ShardFile]:
    """The headers of a model; weights on the hub are not downloaded.

    Args:
        model: as in `resolve_model`.
        folder: from `resolve_config`.

    Raises:
        UsageError: no safetensors, or not to be had.
        LowRankError: damaged files.
    """
    if _local_folder(model) is None and not _all_there(folder):
        with _told_by_the_hub(model):
            return _hub_shards(model, folder)
    return read_shards(folder)


def _local_folder(model: str) -> Path | None:
    """The folder of that name; None for what may be on the hub."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise UsageError(f"{model} is a file, a model is a folder", hint=f"give its folder: {path.parent}")
    if not HUB_ID.fullmatch(model):
        raise UsageError(f"no such model folder: {model}", hint="give a folder that save_pretrained wrote, or a hub id")
    return None


@contextmanager
def _told_by_the_hub(model: str) -> Iterator[None]:
    try:
        yield
    except LowRankError:
        raise
    # Offline, not found, private, disk full: the hub client has no common base class, and the user one question.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UsageError(
            f"no such model folder, and not to be had from the hub: {model} ({reason})",
            hint="check the path; a private model needs `hf auth login`; offline, only models in the cache are found",
        ) from error


def _refuse_links_out(folder: Path) -> None:
    """Of the files that are read or copied; shards in folders below are seen when they are read."""
    for pattern in HUB_PATTERNS:
        for path in folder.glob(pattern):
            if path.is_symlink():
                refuse_link_out(folder, path.name)


def _all_there(folder: Path) -> bool:
    """Whether a snapshot in the cache has all shards."""
    if (folder / SINGLE_FILE).is_file():
        return True
    return (folder / INDEX_FILE).is_file() and all((folder / f).is_file() for f in read_index(folder).values())


def _hub_shards(model: str, folder: Path) -> dict[str, ShardFile]:
    """Headers of the commit that a snapshot's folder is named after, by requests for the beginnings of the files."""
    commit = folder.name
    siblings = HfApi().model_info(model, revision=commit, files_metadata=True).siblings or []
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in siblings}
    if SINGLE_FILE in sizes:
        return {SINGLE_FILE: _hub_shard(model, commit, sizes, SINGLE_FILE)}
    if INDEX_FILE not in sizes:
        raise UsageError(
            f"{model}: no {SINGLE_FILE} and no {INDEX_FILE} in this repository of the hub",
            hint="download it and convert it to safetensors: from_pretrained, then save_pretrained",
        )
    weight_map = read_index(Path(hf_hub_download(model, INDEX_FILE, revision=commit)).parent)
    files = shard_files(model, weight_map, sizes.__contains__)
    with ThreadPoolExecutor(_REQUESTS) as pool:
        shards = dict(zip(files, pool.map(partial(_hub_shard, model, commit, sizes), files), strict=True))
    check_against_index(model, shards.values(), weight_map)
    return shards


def _hub_shard(model: str, commit: str, sizes: dict[str, int], file: str) -> ShardFile:
    tensors = HfApi().parse_safetensors_file_metadata(model, file, revision=commit).tensors
    table = {name: {"dtype": t.dtype, "shape": t.shape, "data_offsets": t.data_offsets} for name, t in tensors.items()}
    end = max((t.data_offsets[1] for t in tensors.values()), default=0)
    # The client does not tell how long the header is; the tensors reach to the end of the file.
    return checked_shard(f"{model}/{file}", file, table, begin=max(8, sizes[file] - end), nbytes=sizes[file])
