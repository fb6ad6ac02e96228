"""Documents as they are run: their fenced blocks, the commands shown in them, and what those print.

A block of Python or TOML whose first line is `# name.py` or `# name.toml` is that file. Any other Python is run, in the
order of the page. A block of `console` holds commands behind `$ ` and what they print; a block of text with the title
`printed` is what the Python before it prints. A block whose title begins with `not run: ` is not run, and says why.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass

NOT_RUN = "not run: "
_FENCE = re.compile(r"^( *)```([\w-]+)([^\n]*)\n(.*?)^\1```", re.M | re.S)
_TITLE = re.compile(r'title="([^"]*)"')
_FILE = re.compile(r"# ([\w/]+\.(?:py|toml))\n")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, title, code, and the line of the page where it begins."""

    language: str
    title: str
    code: str
    line: int

    @property
    def is_run(self) -> bool:
        return not self.title.startswith(NOT_RUN)

    @property
    def file(self) -> str | None:
        """Return the name of the file that the block is."""
        named = _FILE.match(self.code) if self.language in ("python", "toml") else None
        return named[1] if named else None


@dataclass(frozen=True)
class Command:
    """A command and the lines shown below it."""

    text: str
    shown: list[str]


def read_blocks(text: str, language: str | None = None) -> list[Block]:
    """Return a document's blocks, of one language or all."""
    found = []
    for match in _FENCE.finditer(text):
        title = _TITLE.search(match[3])
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(match[2], title[1] if title else "", textwrap.dedent(match[4]), line))
    return [block for block in found if language in (None, block.language)]


def read_commands(console: str) -> list[Command]:
    """Return the commands of a console block; one that ends in a backslash goes on in the next line."""
    found: list[Command] = []
    for line in console.splitlines():
        if found and found[-1].text.endswith("\\"):
            found[-1] = Command(found[-1].text[:-1] + line.strip(), [])
        elif line.startswith("$ "):
            found.append(Command(line[2:], []))
        else:
            found[-1].shown.append(line)
    return found


def mask_numbers(lines: list[str]) -> list[str]:
    """Return lines with a # for each number: figures differ by machine and timing, what is said about them does not."""
    return [re.sub(r"[\d.,+-]+", "#", " ".join(line.split())) for line in lines if line.strip()]
