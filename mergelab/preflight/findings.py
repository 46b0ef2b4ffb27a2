"""What preflight has to say: findings, all of them at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from mergelab.errors import InputErrors

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, doubtful or worth knowing."""

    severity: Severity
    code: str
    """What kind of finding; `allow=[code]` turns such errors into warnings."""
    place: str
    """The key or the file."""
    message: str
    """What is there, with the value, and what would be right."""
    remedy: str = ""

    def text(self) -> str:
        """One or two lines for the terminal."""
        line = f"{self.place}: {self.message} [{self.code}]"
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


def settle(findings: Iterable[Finding], allow: Iterable[str]) -> list[Finding]:
    """Each finding once, in order; errors whose code is in `allow` become warnings."""
    allowed = set(allow)
    out: dict[Finding, None] = {}
    for f in findings:
        if f.severity == "error" and f.code in allowed:
            f = Finding("warning", f.code, f.place, f.message, f.remedy)
        out[f] = None
    return list(out)


def stop_on_errors(findings: Iterable[Finding]) -> None:
    """Raise one exception that lists every error.

    Raises:
        InputErrors: when there is at least one finding of severity error.
    """
    errors = [f for f in findings if f.severity == "error"]
    if errors:
        raise InputErrors([f.text() for f in errors])
