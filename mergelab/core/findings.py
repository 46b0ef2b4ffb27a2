"""What preflight has to say: findings, all of them at once."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import asdict, dataclass
from typing import Literal

from mergelab.core.errors import InputErrors

Severity = Literal["error", "warning", "note"]

MAY_PASS = (
    "activation", "architecture", "config", "disk", "extra-tensor", "filter", "heads", "layer-settings",
    "no-effect", "norm", "pickled", "range", "rope", "same-experts", "softcap", "tokenizer", "unknown-key",
    "vocabulary",
)  # fmt: skip
"""Codes of errors about which the user may know better: the merge would run all the same."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, doubtful or worth knowing."""

    severity: Severity
    code: str
    """What kind of finding."""
    place: str
    """The key or the file; several, separated by commas, where the same is true of all."""
    message: str
    """What is there, with the value, and what would be right."""
    remedy: str = ""

    def text(self) -> str:
        """For the terminal: a line, and the remedy below. The code stands in brackets where
        `allow=[code]` lets the error pass."""
        code = f" [{self.code}]" if self.severity == "error" and self.code in MAY_PASS else ""
        line = f"{self.place}: {self.message}{code}"
        return f"{line}\n{self.remedy}" if self.remedy else line

    def json(self) -> dict[str, str]:
        """As plan.json has it."""
        return asdict(self)


def error(code: str, place: str, message: str, remedy: str = "") -> Finding:
    """A finding that keeps the run from starting."""
    return Finding("error", code, place, message, remedy)


def warning(code: str, place: str, message: str, remedy: str = "") -> Finding:
    """A finding that somebody should look at."""
    return Finding("warning", code, place, message, remedy)


def note(code: str, place: str, message: str, remedy: str = "") -> Finding:
    """A finding that is good to know."""
    return Finding("note", code, place, message, remedy)


def apply_allow(findings: Iterable[Finding], allow: Iterable[str]) -> list[Finding]:
    """Each finding once, in order, with all the places where it holds.

    Errors whose code is in `allow` become warnings, where the merge would run all the same.
    """
    allowed = {*allow} & {*MAY_PASS}
    alike: dict[tuple[Severity, str, str, str], dict[str, None]] = {}
    for f in findings:
        severity = "warning" if f.severity == "error" and f.code in allowed else f.severity
        alike.setdefault((severity, f.code, f.message, f.remedy), {})[f.place] = None
    return [
        Finding(s, code, ", ".join(at), message, remedy) for (s, code, message, remedy), at in alike.items()
    ]


def stop_on_errors(findings: Iterable[Finding]) -> None:
    """Raise one exception that lists every error.

    Raises:
        InputErrors: when there is at least one finding of severity error.
    """
    errors = [f for f in findings if f.severity == "error"]
    if errors:
        raise InputErrors([f.text() for f in errors])


def more_differ(differ: Sized) -> str:
    """The end of a message that has named the first of several differences."""
    return f", and {len(differ) - 1:,} more differ" if len(differ) > 1 else ""


def first_few(names: Iterable[str], limit: int = 3) -> str:
    """`a, b, c and 9 more`."""
    listed = list(names)
    more = f" and {len(listed) - limit:,} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
