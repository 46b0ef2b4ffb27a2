"""Reading the JSON files of a model folder. What is wrong becomes a finding, never an exception."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from mergelab.core.findings import Finding, error
from mergelab.core.run_dir import write_text

POINTER = b"version https://git-lfs"


def load_json(path: Path, key: str, remedy: str) -> tuple[Any, list[Finding]]:
    """The value in a JSON file, or None and a finding.

    Args:
        path: The file.
        key: The model's key in the configuration, for findings.
        remedy: What to do about a damaged file.
    """
    try:
        content = path.read_bytes()
        if content.startswith(codecs.BOM_UTF8):
            message = f"{path} begins with a byte order mark, which transformers and mergekit cannot read"
            return None, [error("corrupt", key, message, "Save it as UTF-8 without that mark.")]
        return json.loads(content.decode("utf-8")), []
    except OSError as e:
        return None, [error("unreadable", key, f"cannot read {path}: {reason(e)}")]
    except json.JSONDecodeError as e:
        if is_pointer(path):
            return None, [pointer(path, key)]
        return None, [error("corrupt", key, f"{path} is not JSON (line {e.lineno}: {e.msg})", remedy)]
    except (UnicodeDecodeError, RecursionError) as e:
        what = "UTF-8" if isinstance(e, UnicodeDecodeError) else "JSON"
        return None, [error("corrupt", key, f"{path} is not {what} ({reason(e)})", remedy)]


def is_pointer(path: Path) -> bool:
    """Whether Git LFS has left its pointer in the place of a file."""
    with path.open("rb") as f:
        return f.read(len(POINTER)) == POINTER


def pointer(path: Path, key: str) -> Finding:
    """The finding for such a file. To clone the repository again would bring the same."""
    message = f"{path} is a pointer of Git LFS to the file, not the file"
    return error("corrupt", key, message, "Run `git lfs pull` in its folder, or fetch the file from the hub.")


def reason(e: Exception) -> str:
    """The message of an exception, without the number and the path of an OSError."""
    return e.strerror or str(e) if isinstance(e, OSError) else str(e)


def write_as_read(path: Path, content: Any) -> None:
    """Write a file that was read by `load_json` and changed. NaN and Infinity stay as they are: transformers
    reads and writes them, although JSON does not know them."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
