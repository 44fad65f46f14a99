"""The fenced blocks of a page of Markdown, and the commands in those for a shell."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "evals" / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Args:
        page: file that it is in.
        line: of its first line in the file, from 1.
        language: the word after the fence.
        text: between the fences.
    """

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        """Where it is, for a message."""
        return f"{self.page.name}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a block for a shell.

    Args:
        place: where it is.
        words: without what goes around it.
        variables: set for it, in front of it.
        output: file that it is written to with >, "" for none.
    """

    place: str
    words: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()
    output: str = ""

    @property
    def text(self) -> str:
        """The words with single spaces."""
        return " ".join(self.words)


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text()
    return [Block(page, text.count("\n", 0, found.start()) + 2, found[1], found[2]) for found in FENCE.finditer(text)]


def commands(block: Block) -> Iterator[Command]:
    """The commands of a block, in order: comments left out, continued lines joined, a && b as two.

    Raises:
        ValueError: a pipe, a command in the background, or anything else of a shell that is not understood here.
    """
    line = block.line
    for text in block.text.replace("\\\n", "\0").splitlines():
        place = f"{block.page.name}:{line}"
        line += 1 + text.count("\0")
        lexer = shlex.shlex(text.replace("\0", " "), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, "&&"]:
            if word == "&&":
                if words:
                    yield _command(place, words)
                words = []
            elif set(word) <= set("();<|&") and word:
                raise ValueError(f"{place}: {word} of the shell is not understood by this test")
            else:
                words.append(word)


def _command(place: str, words: list[str]) -> Command:
    output = ""
    if ">" in words:
        cut = words.index(">")
        (output,) = words[cut + 1 :]
        words = words[:cut]
    count = next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words))
    variables = tuple((name, value) for name, _, value in (word.partition("=") for word in words[:count]))
    # The folder of a virtual environment that a page has made, README's way of not asking for it to be activated.
    program = words[count].removeprefix(".venv/bin/")
    return Command(place, (program, *words[count + 1 :]), variables, output)


def links(page: Path) -> list[str]:
    """Where the links of a page lead, those to the web left out."""
    text = FENCE.sub("", page.read_text())
    return [target for target in LINK.findall(text) if "://" not in target]


def anchors(page: Path) -> set[str]:
    """The names of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def headers(text: str) -> list[tuple[str, ...]]:
    """The headings of the tables that a verb has printed: lines above one of dashes."""
    lines = text.splitlines()
    return [
        tuple(above.split())
        for above, below in pairwise(lines)
        if below.strip() and set(below.split()) and set(below) <= {"-", " "} and "-" in below
    ]
