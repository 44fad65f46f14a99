"""Where a case is tried: folders that it may not change, room to work, and an end within a minute."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cli.main import run
from tests.pages import write_pages
from tests.process import same_process

SECONDS = 60  # that a case may take
CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
# Where a command line may not reach: all that lies there is compared before and after.
READ_ONLY = "given"


class TooSlowError(BaseException):
    """No `Exception`: nothing between here and the property shall take it for an error of its own."""


@contextlib.contextmanager
def in_time(seconds: int = SECONDS) -> Iterator[None]:
    """Inside, what hangs ends in an error."""

    def stop(*_: Any) -> None:
        raise TooSlowError(f"no end after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def told(arguments: list[str], *, codes: tuple[int, ...] = (0, 1, 2, 3, 4)) -> int:
    """Run a command line in this process; its exit code, after seeing that an error is one, and no bug."""
    out, err = io.StringIO(), io.StringIO()
    with same_process(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), in_time():
        code = run(arguments)
    text = err.getvalue()
    assert code in codes, (code, text)
    assert "Traceback" not in text, text
    assert "this is a bug" not in text, text
    if code not in (0, 4) and not text.startswith("Usage:"):  # a verb without arguments shows its help
        assert len(re.findall("^error: ", text, re.MULTILINE)) == 1, text
    return code


class Place:
    """Folders to fuzz: a tiny model and what the verbs made of it, and room to work.

    Args:
        folder: empty.
    """

    def __init__(self, folder: Path) -> None:
        self.given, self.work = folder / READ_ONLY, folder / "work"
        self.given.mkdir()
        (self.given / "config.json").write_text(json.dumps(CONFIG))
        self.text = str(write_pages(self.given / "pages.jsonl", num_pages=40))
        text = ["--text", self.text, "--block-tokens", "16", "--device", "cpu", "-q"]
        dense, factors, pivoted, spectra = (
            str(self.given / name) for name in ("dense", "factors", "pivoted", "spectra")
        )
        train = ["train", "--model-config", str(self.given / "config.json"), "--vocab-size", "280", "--steps", "2"]
        compress = ["compress", dense, "--keep", "0.5", "--objective", "whiten", "--calibration-blocks", "4"]
        compress += ["--check-blocks", "2", "--align", "1", *text]
        for line in (
            [*train, "--batch-size", "2", *text, "-o", dense],
            [*compress, "-o", factors],
            [*compress, "--form", "pivoted", "-o", pivoted],
            ["analyze", dense, "-q", "-o", spectra],
        ):
            assert told(line) == 0, line
        out = io.StringIO()
        with same_process(), contextlib.redirect_stdout(out):
            assert run(["eval", dense, factors, "--part", "heldout", "--blocks", "1", "--json", *text]) == 0
        (self.given / "eval.json").write_text(out.getvalue())
        self._begin([*train, "--batch-size", "2", "--save-every", "1", *text])
        self.before = self._listing()

    def _begin(self, line: list[str]) -> None:
        """A run that was killed when all but the last was done."""
        begun = self.given / "begun"
        assert told([*line, "-o", str(begun)]) == 0
        record = json.loads((begun / "run.json").read_text())
        (begun / "run.json").write_text(json.dumps({**record, "finished": False}))
        (begun / "model.safetensors").unlink()

    def fresh(self) -> Path:
        """The room to work, empty."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        return self.work

    def untouched(self) -> None:
        """See that what was given is as it was, and that no temporary is left."""
        assert self._listing() == self.before
        left = [path for path in self.work.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".saving")]
        assert not left

    def _listing(self) -> dict[str, tuple[int, int]]:
        return {
            str(path.relative_to(self.given)): (path.stat().st_size, path.stat().st_mtime_ns)
            for path in self.given.rglob("*")
            if path.is_file()
        }
