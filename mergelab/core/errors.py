"""The ways in which a run can end early, and the exit status of each.

Library code raises. Only `mergelab.cli` turns an exception into a message and an exit status.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

INTERRUPTED = 130
"""The exit status after Ctrl-C."""


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
    """The first line of an exception's message, or its type if the message is empty.

    Messages of transformers are pages long.
    """
    return (str(e).strip().splitlines() or [type(e).__name__])[0].strip()


def typed_line(e: BaseException) -> str:
    """The type of an exception and the first line of its message."""
    kind, line = type(e).__name__, first_line(e)
    return kind if line == kind else f"{kind}: {line}"


def summary(e: BaseException) -> str:
    """The type of an exception and the first line of its message, ending in a full stop."""
    message = typed_line(e)
    return message if message.endswith((".", "!", "?")) else f"{message}."


def flattened(e: BaseException) -> str:
    """The kind of an exception and its whole message on one line, for journals and logs."""
    return " ".join(f"{type(e).__name__}: {e}".split())


def did_you_mean(word: str, choices: object) -> str:
    """` Did you mean 'x'?` for the choice closest to `word`, or an empty string."""
    from difflib import get_close_matches

    names = [str(c) for c in choices]  # type: ignore[attr-defined]
    folded = {n.replace("-", "_").lower(): n for n in names}
    near = get_close_matches(word.replace("-", "_").lower(), folded, n=1, cutoff=0.6)
    return f" Did you mean '{folded[near[0]]}'?" if near else ""


def none_of(value: object, choices: Collection[str]) -> str:
    """`'x' is none of a, b, c.`, and the closest choice."""
    return f"'{value}' is none of {', '.join(choices)}.{did_you_mean(str(value), choices)}"
