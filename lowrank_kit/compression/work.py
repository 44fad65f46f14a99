"""The work folder of a compression: what is done, for whom, and nobody else at the same time.

It lies beside the output under the output's name with `.partial`, and is gone once the output is there.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import safe_open
from torch import Tensor

from lowrank_kit.checkpoint.folder import REPORT_FILE
from lowrank_kit.checkpoint.writer import is_damaged, write_tensors
from lowrank_kit.compression.fold import Folded
from lowrank_kit.compression.piece import Piece
from lowrank_kit.compression.plan import Plan, PlannedMatrix
from lowrank_kit.compression.refine import Refined
from lowrank_kit.compression.sections import Section
from lowrank_kit.config import settings_difference
from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.processes import on_first
from lowrank_kit.report.files import finite, told_if_not_made, write_json, write_text

logger = logging.getLogger(__name__)

MANIFEST, LOCK, LOG, WHOLE = "manifest.json", "lock", "progress.jsonl", "whole"
# What a name in a section's file is of: a matrix, or a parameter that refinement trained.
_PIECE, _OTHER = "piece", "other"


class WorkFolder:
    """What a compression keeps until its output is whole.

    Args:
        output: folder that is to be made.
    """

    def __init__(self, output: Path) -> None:
        self.output = output.absolute()
        self.path = self.output.with_name(f"{self.output.name}.partial")
        self.survey, self.sections, self.result = (self.path / name for name in ("survey", "sections", "result"))

    @property
    def log(self) -> Path:
        """JSON lines of the progress."""
        return self.path / LOG

    def manifest(self) -> dict[str, Any] | None:
        """What is done here, if something has been begun.

        Raises:
            LowRankError: it cannot be read.
        """
        path = self.path / MANIFEST
        if not path.exists():
            return None
        try:
            return dict(json.loads(path.read_text()))
        except ValueError as error:
            raise LowRankError(f"{path}: not valid JSON: {error}", hint=f"remove {self.path} and begin anew") from error

    @contextmanager
    def open(self, *, resume: bool) -> Iterator[None]:
        """Inside, this compression alone works here; what is done stays after an error, and a folder with nothing goes.

        Args:
            resume: whether to go on with what an earlier run has left.

        Raises:
            UsageError: the output is taken or cannot be made, another compression works here, or an earlier run has
                left something and is not to be resumed.
        """
        with ExitStack() as stack:
            on_first(lambda: self._enter(stack, resume))
            yield

    def _enter(self, stack: ExitStack, resume: bool) -> None:
        with told_if_not_made(self.output):
            if not self.is_whole():
                _refuse_taken(self.output)
            absent = [parent for parent in self.path.parents if not parent.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(
                f"{self.output}: another process is at work on this output (it holds {self.path / LOCK})",
                hint="wait for it, or choose another output folder",
            ) from None
        stack.callback(lock.release)
        stack.push(partial(self._leave, absent))
        if not resume and self._anything():
            raise UsageError(
                f"{self.path}: an earlier compression has left {self._told()}",
                hint=f"--resume goes on with it; to begin anew, remove {self.path}",
            )
        if not self._anything():
            (self.path / MANIFEST).unlink(missing_ok=True)
            self.log.unlink(missing_ok=True)
        self._drop_damaged()

    def _leave(self, absent: list[Path], kind: type[BaseException] | None, *_: object) -> None:
        """After an error, say how to go on; where there is nothing to go on with, leave nothing."""
        if self._anything():
            if kind is not None:
                logger.warning("%s are kept in %s: the same with --resume goes on", self._told(), self.path)
            return
        shutil.rmtree(self.path, ignore_errors=True)
        for parent in absent:
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()

    def begin(self, fingerprint: Mapping[str, Any], choice: Mapping[str, Any]) -> None:
        """Say what is done here, or make sure that it is what was begun.

        Args:
            fingerprint: all that decides the bytes of the output.
            choice: what was chosen for it.

        Raises:
            UsageError: something else was begun here; told is what differs.
        """
        wanted = json.loads(json.dumps(finite(dict(fingerprint))))
        found = self.manifest()
        if found is None:
            write_json(self.path / MANIFEST, {"fingerprint": wanted, "choice": choice})
            return
        differences = [
            f"{part}, {line}"
            for part, now in wanted.items()
            for line in settings_difference(found["fingerprint"].get(part, {}), now)
        ]
        if differences:
            raise UsageError(
                f"{self.path}: an earlier compression with other settings is unfinished: {'; '.join(differences[:5])}"
                + (f"; and {len(differences) - 5} more" if len(differences) > 5 else ""),
                hint=f"the same settings to go on with it; to begin anew, remove {self.path}",
            )

    def is_whole(self) -> bool:
        """Whether the result is whole, and has not its name yet."""
        return (self.path / WHOLE).exists()

    def finish(self) -> dict[str, Any]:
        """Give the result its name, and remove everything else; what compression.json says."""
        write_text(self.path / WHOLE, "")
        if not self.result.exists():
            pass  # a run that was killed since has done it
        elif self.output.is_dir():  # keep the folder itself: somebody may stand in it
            for entry in self.result.iterdir():
                entry.replace(self.output / entry.name)
        else:
            self.result.replace(self.output)
        # Last what says that it is whole: a run that goes on from anything less would find the output taken.
        for entry in sorted(self.path.iterdir(), key=lambda entry: (entry.name == WHOLE, entry.name == LOCK)):
            _remove(entry)
        shutil.rmtree(self.path, ignore_errors=True)
        return dict(json.loads((self.output / REPORT_FILE).read_text()))

    def _anything(self) -> bool:
        """Whether something is here that a resumed run need not do again."""
        return any(folder.exists() and any(folder.glob("*.safetensors")) for folder in (self.survey, self.sections))

    def _drop_damaged(self) -> None:
        """What a disk has damaged since is made again."""
        for path in [path for folder in (self.survey, self.sections) for path in folder.glob("*.safetensors")]:
            if is_damaged(path):
                logger.warning("%s is damaged, and its part is made again", path)
                path.unlink()

    def _told(self) -> str:
        count = len(list(self.sections.glob("*.safetensors")))
        return f"{count} finished parts" if count else "its beginnings"


class Kept:
    """What became of the sections of a model, in the files of a work folder.

    Args:
        work: the folder.
        planned: name -> plan of each matrix that gets a rank.
        sections: in their order; what a later one has of a matrix or parameter is what holds.
    """

    def __init__(self, work: WorkFolder, planned: Mapping[str, PlannedMatrix], sections: Sequence[Section]) -> None:
        self.work, self.planned, self._sections = work, planned, list(sections)

    @property
    def sections(self) -> list[Section]:
        """Those that are done."""
        return [section for section in self._sections if self.has(section)]

    def add(self, section: Section) -> None:
        """One more section, after all others."""
        self._sections.append(section)

    def has(self, section: Section) -> bool:
        """Whether a section is done."""
        return self._file(section).exists()

    def keep(self, section: Section, made: Folded) -> None:
        """Keep what became of a section."""
        tensors: dict[str, Tensor] = {f"{_OTHER}|{name}": tensor for name, tensor in made.others.items()}
        pieces = {}
        for name, piece in made.pieces.items():
            tensors |= {f"{_PIECE}|{name}|{leaf}": tensor for leaf, tensor in piece.tensors.items()}
            pieces[name] = {
                "rank": piece.planned.rank,
                "form": piece.planned.form,
                "leaves": list(piece.tensors),
                "kept_energy": piece.kept_energy,
                "seconds": round(piece.seconds, 4),
            }
        told = {
            "pieces": pieces,
            "others": list(made.others),
            "refined": {stage: refined.record() for stage, refined in made.refined.items()},
            "errors": made.errors,
            "losses": made.losses,
        }
        on_first(lambda: write_tensors(self._file(section), tensors, {"told": json.dumps(told)}))

    def get(self, section: Section) -> Folded:
        """What became of a section."""
        told, made = self._told(section), Folded()
        with safe_open(self._file(section), framework="pt") as file:
            for name, row in told["pieces"].items():
                leaves = {leaf: file.get_tensor(f"{_PIECE}|{name}|{leaf}").clone() for leaf in row["leaves"]}
                made.pieces[name] = Piece(self._planned(name, row), leaves, row["kept_energy"], row["seconds"])
            made.others = {name: file.get_tensor(f"{_OTHER}|{name}").clone() for name in told["others"]}
        made.refined = {stage: Refined(**record) for stage, record in told["refined"].items()}
        made.errors, made.losses = told["errors"], told["losses"]
        return made

    def told(self) -> dict[str, dict[str, Any]]:
        """Everything but the tensors, of all sections: pieces, refined, errors and losses."""
        every: dict[str, dict[str, Any]] = {"pieces": {}, "refined": {}, "errors": {}, "losses": {}}
        for section in self.sections:
            told = self._told(section)
            for kind, found in every.items():
                found |= told[kind]
        return every

    def as_made(self, plan: Plan) -> Plan:
        """The plan with the ranks and forms that matrices got."""
        made = {name: self._planned(name, row) for name, row in self.told()["pieces"].items()}
        return replace(plan, matrices=tuple(made.get(m.stored.matrix.name, m) for m in plan.matrices))

    def places(self, plan: Plan) -> dict[str, tuple[Path, str]]:
        """Name of a tensor in the output -> file and name there, of all that is not as it was.

        Args:
            plan: as made.
        """
        on_disk, places = plan.checkpoint.disk_names(), {}
        made = {m.stored.matrix.name: m for m in plan.matrices if m.rank is not None}
        for section in self.sections:
            told, path = self._told(section), self._file(section)
            for name, row in told["pieces"].items():
                for leaf in row["leaves"]:
                    places[f"{made[name].disk_path}.{leaf}"] = (path, f"{_PIECE}|{name}|{leaf}")
            for name in told["others"]:
                owner = name.removesuffix(".bias").removesuffix(".B")
                layer = made.get(owner)
                target = on_disk[name] if layer is None else layer.disk_path + name.removeprefix(owner)
                places[target] = (path, f"{_OTHER}|{name}")
        return places

    def read(self, places: Mapping[str, tuple[Path, str]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors at some places, one at a time.

        Args:
            places: name in the output -> file and name there.
        """
        for name, (path, key) in places.items():
            with safe_open(path, framework="pt") as file:
                yield name, file.get_tensor(key).clone()

    def _planned(self, name: str, row: Mapping[str, Any]) -> PlannedMatrix:
        return replace(self.planned[name], rank=row["rank"], form=row["form"])

    def _told(self, section: Section) -> dict[str, Any]:
        with safe_open(self._file(section), framework="pt") as file:
            return dict(json.loads(file.metadata()["told"]))

    def _file(self, section: Section) -> Path:
        return self.work.sections / f"{section.index:05d}.safetensors"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _refuse_taken(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file, a folder is wanted", hint="choose another output folder")
    if output.is_dir() and not os.access(output, os.W_OK):
        raise UsageError(f"{output} may not be written to", hint="choose an output where you may write")
    if output.is_dir() and (count := sum(1 for _ in output.iterdir())):
        raise UsageError(f"{output}: the output folder is not empty ({count} entries)", hint="choose a new folder")
