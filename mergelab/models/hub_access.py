"""Why a model of the hub is not on this machine, and how to get it."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Future, wait

from mergelab.core.findings import Finding, Severity
from mergelab.models.resolver import Source

PROBE_SECONDS = 5.0
"""How long the hub may take to say whether repositories are there."""

Answer = tuple[str, str, str]
"""A code, what is the matter, and what to do; {ids} and {are} are filled in later."""

READY = "not-downloaded"
"""The code of what is on the hub, and may be downloaded."""

FETCH = "Fetch first, all at once by the same command with job=fetch, or:"
ELSEWHERE = "On a machine with internet, then copy its cache here (or share it through HF_HOME):"

SILENT = (
    "unreachable",
    "neither a folder nor in the hub's cache, and the hub does not answer: {ids}",
    ELSEWHERE,
)
OFFLINE = (
    "unreachable",
    "neither a folder nor in the hub's cache, and HF_HUB_OFFLINE forbids to ask the hub: {ids}",
    "Unset HF_HUB_OFFLINE, or fetch elsewhere and copy the cache here (or share it through HF_HOME):",
)


def ask(absent: list[Source], severity: Severity, *, gated: bool) -> list[Finding]:
    """Why models are not here, and how to get them; asks the hub once, for seconds at most.

    Args:
        absent: hub models without a folder.
        severity: error where they are needed now, warning where a plan can do without.
        gated: the family is known to ask for an accepted licence.
    """
    return findings(zip(absent, answers(absent), strict=True), severity, gated=gated)


def findings(answered: Iterable[tuple[Source, Answer]], severity: Severity, *, gated: bool) -> list[Finding]:
    """What `answers` comes to, one finding for all that it is true of. (Arguments as for `ask`.)"""
    alike: dict[Answer, list[Source]] = {}
    for s, answer in answered:
        alike.setdefault(answer, []).append(s)
    return [_finding(answer, those, severity, gated) for answer, those in alike.items()]


def _finding(answer: Answer, those: list[Source], severity: Severity, gated: bool) -> Finding:
    code, message, remedy = answer
    lines = [remedy]
    if code in (READY, "unreachable", "gated"):
        if gated and code != "gated":
            lines.insert(0, "They may be gated: accept the licence on their pages, then `hf auth login`.")
        lines += [f"  {s.download}" for s in those]
    ids, are = ", ".join(dict.fromkeys(s.path for s in those)), "is" if len(those) == 1 else "are"
    places = ", ".join(s.place for s in those)
    told = message.replace("{ids}", ids).replace("{are}", are)
    return Finding(severity, code, places, told, "\n".join(lines))


def answers(sources: list[Source]) -> list[Answer]:
    """What the hub says of each, all asked at once; SILENT where it says nothing in time. The code is
    READY where it lets us download.

    In daemon threads, for neither a name server nor `auth_check` can be given a timeout, and
    the process must not wait for them at its end either.
    """
    futures: list[Future[Answer]] = []
    for s in sources:
        future: Future[Answer] = Future()
        threading.Thread(target=_answer, args=(future, s), daemon=True).start()
        futures.append(future)
    wait(futures, timeout=PROBE_SECONDS)
    return [f.result() if f.done() else SILENT for f in futures]


def _answer(future: Future[Answer], s: Source) -> None:
    try:
        future.set_result(_probe(s))
    except Exception as e:
        future.set_exception(e)


def _probe(s: Source) -> Answer:
    """What the hub says of one repository."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo = s.path.partition("+")[0]
    try:
        HfApi().model_info(repo, revision=s.revision, timeout=PROBE_SECONDS)
        HfApi().auth_check(repo)
    except GatedRepoError:
        return (
            "gated",
            "{ids} {are} gated, and this login has no access",
            "Accept the licence on the model's page at the hub, then `hf auth login`, and:",
        )
    except RevisionNotFoundError:
        return (
            "no-revision",
            f"{{ids}} has no revision '{s.revision}'",
            "Look it up on its page at the hub.",
        )
    except (RepositoryNotFoundError, HFValidationError):
        return (
            "no-repository",
            "there is no such folder, and the hub has no {ids}, or keeps it private",
            "Check the name; for a private model: hf auth login",
        )
    except HfHubHTTPError as e:
        status = e.response.status_code
        return (
            "unreachable",
            f"not on this machine, and the hub answers with HTTP {status}: {{ids}}",
            ELSEWHERE,
        )
    except OfflineModeIsEnabled:
        return OFFLINE
    except (OSError, ValueError):  # ValueError: an answer that is not the hub's, as of a captive portal
        return SILENT
    except Exception as e:
        # The hub's client lets its HTTP library's own errors through, and they share no base with ours.
        if type(e).__module__.startswith(("httpx", "httpcore", "requests")):
            return SILENT
        raise
    return (READY, "not on this machine yet: {ids}", FETCH)
