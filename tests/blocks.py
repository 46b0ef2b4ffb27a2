"""The code blocks of a page: `python tests/blocks.py docs/python.md` prints its Python."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def blocks(page: Path, language: str = "python") -> list[str]:
    """The blocks of a language, in order."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


if __name__ == "__main__":
    print("\n".join(blocks(Path(sys.argv[1]))))
