"""Why a hub model is not on this machine, and how to get it."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Future, wait

from mergelab.core.findings import Finding, Severity
from mergelab.models.resolver import Source

PROBE_SECONDS = 5.0
"""How long the hub may take to say whether repositories exist."""

Answer = tuple[str, str, str]
"""A code, a message and a remedy; {ids} and {are} in the message are filled in later."""

READY = "not-downloaded"
"""The code of a model that is on the hub and may be downloaded."""

FETCH = "Fetch first: run the same command with job=fetch, or:"
ELSEWHERE = "Fetch on a machine with internet access and copy its cache here (or share it by HF_HOME):"

SILENT = (
    "unreachable",
    "neither a folder nor in the hub's cache, and the hub does not answer: {ids}",
    ELSEWHERE,
)
OFFLINE = (
    "unreachable",
    "neither a folder nor in the hub's cache, and HF_HUB_OFFLINE forbids asking the hub: {ids}",
    "Unset HF_HUB_OFFLINE, or fetch elsewhere and copy the cache here (or share it by HF_HOME):",
)


def ask(absent: list[Source], severity: Severity, *, gated: bool) -> list[Finding]:
    """Why models are not on this machine, and how to get them. Asks the hub once, for seconds at most.

    Args:
        absent: Hub models without a folder.
        severity: An error if they are needed now, a warning if they are only planned with.
        gated: Whether the family is known to require an accepted licence.
    """
    return findings(zip(absent, answers(absent), strict=True), severity, gated=gated)


def findings(answered: Iterable[tuple[Source, Answer]], severity: Severity, *, gated: bool) -> list[Finding]:
    """The result of `answers` as findings, one for all models with the same answer; see `ask`."""
    alike: dict[Answer, list[Source]] = {}
    for s, answer in answered:
        alike.setdefault(answer, []).append(s)
    return [_finding(answer, group, severity, gated) for answer, group in alike.items()]


def _finding(answer: Answer, sources: list[Source], severity: Severity, gated: bool) -> Finding:
    code, message, remedy = answer
    lines = [remedy]
    if code in (READY, "unreachable", "gated"):
        if gated and code != "gated":
            lines.insert(0, "They may be gated: accept the licence on their pages, then `hf auth login`.")
        lines += [f"  {s.download}" for s in sources]
    ids, are = ", ".join(dict.fromkeys(s.path for s in sources)), "is" if len(sources) == 1 else "are"
    keys = ", ".join(s.key for s in sources)
    text = message.replace("{ids}", ids).replace("{are}", are)
    return Finding(severity, code, keys, text, "\n".join(lines))


def answers(sources: list[Source]) -> list[Answer]:
    """The hub's answer for each source, all asked at once.

    The threads are daemons because neither name resolution nor `auth_check` accepts a timeout, and the
    process must not wait for them when it ends.

    Returns:
        One answer per source: its code is READY if the download is allowed, and it is SILENT if the hub
        did not answer in time.
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
    """The hub's answer for one repository."""
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
            "See the list of revisions on its page at the hub.",
        )
    except (RepositoryNotFoundError, HFValidationError):
        return (
            "no-repository",
            "there is no such folder, and the hub has no {ids}, or it is private",
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
    except (
        OSError,
        ValueError,
    ):  # ValueError: the answer is not the hub's, but for example a captive portal's
        return SILENT
    except Exception as e:
        # The hub's client passes on its HTTP library's own errors, which have no common base class.
        if type(e).__module__.startswith(("httpx", "httpcore", "requests")):
            return SILENT
        raise
    return (READY, "not on this machine yet: {ids}", FETCH)
