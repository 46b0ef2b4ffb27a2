"""Reading the JSON files of a model folder. What is wrong becomes a finding, never an exception."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mergelab.core.findings import Finding, error


def load_json(path: Path, key: str, remedy: str) -> tuple[Any, list[Finding]]:
    """The value in a JSON file, or None and a finding.

    Args:
        path: The file.
        key: The model's key in the configuration, for findings.
        remedy: What to do about a damaged file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8")), []
    except OSError as e:
        return None, [error("unreadable", key, f"cannot read {path}: {reason(e)}")]
    except json.JSONDecodeError as e:
        return None, [error("corrupt", key, f"{path} is not JSON (line {e.lineno}: {e.msg})", remedy)]
    except (UnicodeDecodeError, RecursionError) as e:
        return None, [error("corrupt", key, f"{path} is not JSON ({reason(e)})", remedy)]


def reason(e: Exception) -> str:
    """The message of an exception, without the number and the path of an OSError."""
    return e.strerror or str(e) if isinstance(e, OSError) else str(e)
