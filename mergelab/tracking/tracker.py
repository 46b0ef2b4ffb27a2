"""Recording a run in Weights & Biases, or nowhere."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergelab.core.errors import InputError, none_of
from mergelab.core.findings import Finding, error
from mergelab.schema import Tracking
from mergelab.tracking import wandb_run
from mergelab.tracking.base import Tracker
from mergelab.tracking.secrets import error_line, scrub
from mergelab.tracking.wandb_mode import has_key, server_name

NAMES = ("none", "wandb")


@contextmanager
def track(
    settings: Tracking,
    config: Mapping[str, Any],
    folder: Path,
    *,
    name: str,
    job_type: str | None = None,
    run_id: str | None = None,
    one_of_many: bool = False,
) -> Iterator[Tracker]:
    """Record what happens inside the `with`. An exception passes through and marks the run as failed.

    W&B's own environment variables are respected: WANDB_MODE always, WANDB_PROJECT and WANDB_NAME if the
    run does not set these values.

    Args:
        settings: The section `tracking`.
        config: Shown beside the metrics, without secrets.
        folder: W&B's files are written to `folder/wandb`.
        name: The name of the run.
        job_type: The type of the run, for W&B's filters.
        run_id: If W&B has a run with this id, it is continued.
        one_of_many: Whether there are several runs, so that WANDB_NAME does not apply.

    Raises:
        InputError: `settings.name` is unknown.
    """
    if settings.name not in NAMES:
        raise InputError(f"tracking.name: {none_of(settings.name, NAMES)}")
    default = settings.project == Tracking.project
    project = os.environ.get("WANDB_PROJECT", settings.project) if default else settings.project
    about = {
        "project": project,
        "entity": settings.entity,
        "group": settings.group,
        "tags": list(settings.tags) or None,
        "name": name if one_of_many else os.environ.get("WANDB_NAME", name),
        "job_type": job_type,
        "id": run_id,
        "resume": "allow" if run_id else None,
        "config": scrub(config),
    }
    root = folder.resolve()
    # Tables wait for their upload in W&B's data folder, which otherwise is in the home directory.
    with _default_environment("WANDB_DATA_DIR", str(root / "wandb")):
        tracker = Tracker()
        if settings.name == "wandb":
            tracker = wandb_run.start(settings, {**scrub(about, by_name=False), "dir": str(root)})
        try:
            yield tracker
        except BaseException as e:
            tracker.finish(getattr(e, "exit_status", 1))
            raise
        tracker.finish(0)


def findings(settings: Tracking) -> Iterator[Finding]:
    """What is wrong with the settings; nothing if a run may start."""
    if settings.name != "wandb":
        return
    try:
        import wandb

        wandb.Settings(project=settings.project, run_tags=tuple(settings.tags))  # checks them
        inherited = wandb.setup(wandb.Settings(silent=True)).settings
    except ImportError as e:
        message = f"wandb cannot be imported ({e}); `pip install wandb`, or tracking=none"
        yield error("setting", "tracking.name", message)
        return
    except Exception as e:
        yield error("setting", "tracking", f"W&B refuses these settings: {error_line(e)}")
        return
    if settings.mode == inherited.mode == "online" and not has_key(inherited.base_url):
        where = server_name(inherited.base_url)
        message = f"no API key for {where}; run `wandb login`, set WANDB_API_KEY, or use mode=auto"
        yield error("setting", "tracking.mode", message)


@contextmanager
def _default_environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable inside the block, unless the user has set it."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
