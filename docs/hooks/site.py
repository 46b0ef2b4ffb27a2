"""mkdocs hooks: fill in what is generated or included."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import reference


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page."""
    if str(reference.ROOT) not in sys.path:  # mkdocs resets it after it has imported the hooks
        sys.path.insert(0, str(reference.ROOT))
    return reference.filled(reference.included(markdown))
