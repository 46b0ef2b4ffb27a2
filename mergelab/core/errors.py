"""The ways in which a run can end early, and the exit status of each.

Library code raises. Only `mergelab.cli` turns an exception into a message and an exit status.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import PurePath
from traceback import extract_tb

INTERRUPTED = 130
"""The exit status after Ctrl-C."""

LONGEST = 500
"""Characters of a library's message that are shown; the log has all of it."""

OF_CODE = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NameError, NotImplementedError, TypeError,
)  # fmt: skip
"""Exceptions that speak of code, and say little without the place where they were raised."""

UNFINISHED = (":", ",", " or", " and")
"""Ends of a line after which a sentence continues."""

PYDANTIC = re.compile(r"\d+ validation errors? for \S")
"""The first line of pydantic's messages; the fields and what is wrong with them follow."""


class MergelabError(Exception):
    """A failure whose message is meant for the user: short, and with a remedy."""

    exit_status = 1
    reported = False
    """Whether the command has printed it."""


class InputError(MergelabError):
    """The input is wrong. Nothing was started and nothing was changed."""

    exit_status = 2


class InputErrors(InputError):
    """Several errors, reported together.

    Args:
        messages: One text per error. A remedy is on separate lines.
    """

    def __init__(self, messages: list[str]):
        self.messages = messages
        super().__init__("\n".join(messages))


class StepError(MergelabError):
    """A step has failed after it was started."""

    exit_status = 1


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a message: what was kept, and how to resume. Not a MergelabError, because it must not be
    taken for the failure of a candidate or a run. The exit status is `INTERRUPTED`."""


class CommandFinished(SystemExit):
    """The end of a command that has reported everything. Not an Exception, so that Hydra prints nothing."""


@contextmanager
def os_errors_reported(what: str) -> Iterator[None]:
    """Turns an error of the operating system within the body into one with a message.

    Args:
        what: what the message names where the error has no file.
    Raises:
        MergelabError: with the file and the reason.
    """
    try:
        yield
    except OSError as e:
        if not e.strerror:
            raise
        raise MergelabError(f"{e.filename or what}: {e.strerror}") from e


def one_line(message: str) -> str:
    """A message of several lines as a single line, for a log."""
    return "; ".join(line.strip() for line in message.splitlines())


def first_line(e: BaseException) -> str:
    """What an exception says, on one line that is complete: never a type or a key alone.

    Messages of libraries are pages long, and in most of them the first line says what happened. Lines are
    added while the text ends in the middle of a sentence, as in those of huggingface_hub and pydantic. Where
    it says nothing without the code that raised it, such as a missing key, that place is added.
    """
    if isinstance(e, OSError) and e.strerror:
        return f"{e.strerror}: {e.filename}" if e.filename else e.strerror
    if isinstance(e, KeyError) and len(e.args) == 1 and " " not in str(e.args[0]):
        text = f"there is no entry {e.args[0]!r}"
    else:
        text = _first_sentence(str(e.args[0]) if isinstance(e, KeyError) and e.args else str(e))
    said = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    unsaid = isinstance(e, OF_CODE) or (isinstance(e, Exception) and " " not in said)
    place = _raised_in(e) if unsaid else ""
    return f"{said} ({place})" if said and place else said or place or type(e).__name__


def _first_sentence(message: str) -> str:
    """The first line of a message, with those that it cannot do without."""
    lines = [" ".join(line.split()) for line in message.splitlines() if line.strip()]
    if lines and PYDANTIC.match(lines[0]):
        said = [re.sub(r" \[type=.*", "", line) for line in lines[1:] if not line.startswith("For further")]
        return "; ".join(": ".join(said[i : i + 2]) for i in range(0, len(said), 2))
    text = ""
    for line, following in zip(lines, [*lines[1:], ""], strict=False):
        text = f"{text} {line}" if text else line
        if not (text.endswith(UNFINISHED) or following[:1].islower()):
            break
    return text


def _raised_in(e: BaseException) -> str:
    """The code that raised an exception: `transformers/cache_utils.py, line 7, in update`."""
    frames = extract_tb(e.__traceback__)
    if not frames:
        return ""
    file, line, function, _ = frames[-1]
    path = PurePath(file).parts
    packages = [i for i, part in enumerate(path) if part in ("site-packages", "dist-packages")]
    return f"{'/'.join(path[packages[-1] + 1 :] if packages else path[-2:])}, line {line}, in {function}"


def typed_line(e: BaseException) -> str:
    """The type of an exception and `first_line` of it."""
    kind, line = type(e).__name__, first_line(e)
    return kind if line == kind else f"{kind}: {line}"


def summary(e: BaseException) -> str:
    """The type of an exception and `first_line` of it, ending in a full stop."""
    message = typed_line(e)
    return message if message.endswith((".", "!", "?")) else f"{message}."


def flattened(e: BaseException) -> str:
    """The kind of an exception and its whole message on one line, for journals and logs."""
    return " ".join(f"{type(e).__name__}: {e}".split())


def closest(word: str, choices: Iterable[object], cutoff: float = 0.6) -> str | None:
    """The choice that `word` resembles most, or None where it resembles none: the rule for what is
    taken for a misspelling."""
    from difflib import get_close_matches

    folded = {str(c).replace("-", "_").lower(): str(c) for c in choices}
    near = get_close_matches(word.replace("-", "_").lower(), folded, n=1, cutoff=cutoff)
    return folded[near[0]] if near else None


def did_you_mean(word: str, choices: Iterable[object]) -> str:
    """` Did you mean 'x'?` for the choice closest to `word`, or an empty string."""
    near = closest(word, choices)
    return f" Did you mean '{near}'?" if near else ""


def none_of(value: object, choices: Collection[str]) -> str:
    """`'x' is none of a, b, c.`, and the closest choice."""
    return f"'{value}' is none of {', '.join(choices)}.{did_you_mean(str(value), choices)}"
