"""Documents: their fenced blocks, the commands in them, and the output of the commands.

A block of Python or TOML whose first line is `# name.py` or `# name.toml` is that file. Other Python blocks run in the
order of the page. A `console` block has commands after `$ ` and their output; a text block with the title `printed` is
the output of the Python block before it. A block whose title begins with `not run: ` does not run; its title has the
reason.
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
        """Return the file name of the block."""
        named = _FILE.match(self.code) if self.language in ("python", "toml") else None
        return named[1] if named else None


@dataclass(frozen=True)
class Command:
    """A command and the lines shown below it."""

    text: str
    shown: list[str]


def read_blocks(text: str, language: str | None = None) -> list[Block]:
    """Return the blocks of a document, of one language or of all."""
    found = []
    for match in _FENCE.finditer(text):
        title = _TITLE.search(match[3])
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(match[2], title[1] if title else "", textwrap.dedent(match[4]), line))
    return [block for block in found if language in (None, block.language)]


def read_commands(console: str) -> list[Command]:
    """Return the commands of a console block; a backslash at the end of a line continues a command."""
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
    """Return lines with # in place of each number, because numbers depend on machine and time."""
    return [re.sub(r"[\d.,+-]+", "#", " ".join(line.split())) for line in lines if line.strip()]
