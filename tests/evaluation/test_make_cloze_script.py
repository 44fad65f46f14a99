from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from lowrank_kit.data.corpus import load_corpus
from lowrank_kit.evaluation.cloze import make_cloze

SCRIPT = Path(__file__).parents[2] / "evals" / "make_cloze.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_the_questions_are_from_the_held_out_part(tmp_path: Path, tiny_texts: list[str]) -> None:
    source = tmp_path / "text"
    source.mkdir()
    lines = [line for text in tiny_texts for line in text.splitlines() if line.strip()]
    for number in range(60):
        # Each file is the lines in another order.
        (source / f"{number}.txt").write_text(
            "\n".join(lines[number % 30 :] + lines[: number % 30]) + f"\n# {number}\n"
        )
    done = run("--text", source, "-o", tmp_path / "tasks", "--name", "mine", "--items", 20, "--seed", 3)
    assert (done.returncode, done.stderr) == (0, "")
    assert "20 questions from" in done.stdout
    corpus = load_corpus(str(source))
    assert corpus.sha256 in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "tasks" / "mine.jsonl").read_text().splitlines()]
    assert rows == make_cloze(corpus.heldout, num_items=20, seed=3)


def test_an_error_is_one_message_with_the_exit_code_and_writes_nothing(tmp_path: Path) -> None:
    done = run("--text", tmp_path / "absent", "-o", tmp_path / "tasks")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no such text source")
    assert "hint:" in done.stderr
    assert not (tmp_path / "tasks").exists()
