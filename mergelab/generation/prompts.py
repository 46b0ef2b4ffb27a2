"""Prompts, from a file or from a pipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO

from mergelab.core.errors import InputError


def wrong(prompt: object) -> str | None:
    """What is wrong with a prompt by itself, or None."""
    if not isinstance(prompt, str):
        return f"{prompt!r} is not a text"
    if not prompt.strip():
        return "it is empty"
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes that the terminal or the shell could not decode
        return f"{prompt!r} is not UTF-8"
    return None


def of_file(path: str) -> list[str]:
    """The prompts in a file: the key `prompt` of each line where its name ends in `.jsonl`, else the lines
    themselves. Blank lines are skipped.

    Raises:
        InputError: where the file cannot be read, has no prompt, or has a wrong one, with the line's number.
    """
    file = Path(path).expanduser()
    try:
        content = file.read_bytes()
    except OSError as e:
        raise InputError(f"cannot read {file}: {e.strerror}") from None
    return _of_bytes(content, str(file), json_lines=file.suffix.lower() == ".jsonl")


def of_pipe(pipe: IO[bytes]) -> list[str]:
    """The lines that come through a pipe until it is closed.

    Raises:
        InputError: where all lines are blank, or one is not UTF-8.
    """
    return _of_bytes(pipe.read(), "standard input", json_lines=False)


def _of_bytes(content: bytes, source: str, *, json_lines: bool) -> list[str]:
    """The prompts in a text. Only line feeds end a line because a prompt may contain other separators."""
    found = []
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8").removesuffix("\r")
        except UnicodeDecodeError:
            raise InputError(f"{source}, line {number} is not UTF-8") from None
        if line.strip():
            found.append(_of_json(line, f"{source}, line {number}") if json_lines else line)
    if not found:
        raise InputError(f"{source} has no prompt")
    return found


def _of_json(line: str, source: str) -> str:
    """The prompt in a line of JSON."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as e:
        raise InputError(f"{source} is not JSON: {e.msg} (column {e.colno})") from None
    except RecursionError:
        raise InputError(f"{source} is JSON that is nested too deeply") from None
    if not isinstance(value, dict) or "prompt" not in value:
        raise InputError(f"{source} is not an object with the key 'prompt'")
    if problem := wrong(value["prompt"]):
        raise InputError(f"{source}, the key 'prompt': {problem}")
    return str(value["prompt"])
