"""Make the pictures of the front page from real runs: `python docs/images/make.py`.

`terminal.svg` is what `python -m mergelab` prints, `search.png` the fitness plot of `-m search=cma`, both on
the tiny family.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from pathlib import Path

from rich.console import Console

import mergelab

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Run both and keep their pictures."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        console = Console(record=True, width=84, color_system="truecolor", file=io.StringIO())
        console.print("[bold green]$[/] python -m mergelab")
        mergelab.run(mergelab.compose(), console=console)
        (HERE / "terminal.svg").write_text(console.export_svg(title="mergelab"), encoding="utf-8")
        mergelab.search(mergelab.compose("search=cma"), folder="search", console=False)
        shutil.copyfile("search/report/fitness.png", HERE / "search.png")


if __name__ == "__main__":
    main()
