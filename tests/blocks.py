"""The code blocks of a page: `python tests/blocks.py docs/guide/python.md` prints its Python."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path


def blocks(page: Path, language: str = "python") -> list[str]:
    """The blocks of a language, in order."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}(?: [^\n]*)?\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """The arguments of every mergelab command on a page, in order."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", "").splitlines()
    typed = [re.split(r"^python -m mergelab\b|&& python -m mergelab\b", line) for line in lines]
    return [shlex.split(parts[1], comments=True) for parts in typed if len(parts) == 2]


def files(page: Path) -> dict[str, str]:
    """The files that a page shows: blocks with a title, or whose first line is a comment with a path in
    `my_conf/`."""
    text = page.read_text(encoding="utf-8")
    titled = re.findall(r'^```\w+ title="(my_conf/[^"]+)"\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)
    commented = re.findall(r"^```\w+\n(?=# (my_conf/\S+)\n)(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return dict(titled + commented)


def write_files(page: Path, root: Path) -> None:
    """Write them into a folder."""
    for path, text in files(page).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    print("\n".join(blocks(Path(sys.argv[1]))))
