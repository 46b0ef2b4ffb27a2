"""What a step declares of itself, and the registry of steps.

A step is one file with one `register(Step(...))`: ours are in `mergelab/steps/`, a user's in `steps/` of
`--config-dir`, and an installed package names its modules as entry points of the group `mergelab.steps`. A
job is a YAML file in `conf/job/` that lists steps by name. Whoever has to know something of a job asks its
steps; no step is known by its name elsewhere.

The files of steps are imported to read what they declare, so that they import torch and the like only
within their functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from mergelab.core.errors import did_you_mean
from mergelab.core.registry import Registry

if TYPE_CHECKING:
    from mergelab.core.findings import Finding
    from mergelab.core.run_dir import RunDir
    from mergelab.schema import Run


def _no_findings(run: Run) -> Iterable[Finding]:
    return ()


def _always(run: Run, run_dir: RunDir) -> bool:
    return True


@dataclass(frozen=True)
class Step:
    """One step of a job: what it does, and what has to be known of it before it runs."""

    name: str
    execute: Callable[[Run, RunDir], str]
    """Does the work. It gets the run and its folder, leaves files there, and returns a line on the result."""
    needs: str | None = None
    """The step whose files it reads, and that has to come before it."""
    settings: str | type[Any] | None = None
    """The section of `Run` that it reads; or a dataclass, which becomes the section of the step's name."""
    findings: Callable[[Run], Iterable[Finding]] = _no_findings
    """What can be said against its settings before anything starts."""
    applies: Callable[[Run, RunDir], bool] = _always
    """Whether it has something to do, asked when its turn has come; a step that has not is skipped."""
    read_only: bool = False
    """It only reads. An OSError is then an error of the input, and a job of such steps alone leaves a folder
    in which another run may work."""
    recorded: bool = True
    """Its results go to trackers such as W&B."""
    keeps_folder: bool = True
    """False: it leaves nothing behind, not even a folder. A job of such steps alone gets none."""
    examines: bool = False
    """It examines the run's models before anything is written. All runs of a grid are examined before the
    first one starts."""
    on_login_node: bool = False
    """It runs where the command is given, whatever the hardware."""
    elsewhere: bool = False
    """It speaks of a run that may take place elsewhere: what this machine lacks is a warning."""
    online: bool = False
    """It talks to the hub, even where every model is on this machine."""
    merges: bool = False
    """It writes the run's model."""
    measures: bool = False
    """It measures models as `eval` says."""
    loads_models: bool = False
    """It loads models, whatever `eval` says."""
    asks_models: bool = False
    """It has models continue texts."""

    @property
    def section(self) -> str | None:
        """The section of `Run` that has its settings."""
        return self.settings if isinstance(self.settings, str) or self.settings is None else self.name


def _ours() -> tuple[str, ...]:
    folder = Path(__file__).resolve().parents[1] / "steps"
    return tuple(f"mergelab.steps.{m.name}" for m in iter_modules([str(folder)]))


STEPS: Registry[Step] = Registry("steps", "step", ours=_ours())

RENAMED = {"inspect": "check"}
"""Names that steps had until 0.1, and what they are called now."""


def register(step: Step) -> Step:
    """Make a step known by its name."""
    return STEPS.add(step.name, step)


def current_names(names: Sequence[str]) -> list[str]:
    """The names of a job's steps as they are called now.

    Until 0.1 the step that compares models was `inspect`, and the one that reads a merged model back was
    `check`: after `merge`, where there is no `verify`, it still is.
    """
    out = [RENAMED.get(n, n) for n in names]
    if "merge" in out and "verify" not in out and "check" in out[out.index("merge") :]:
        out[out.index("check", out.index("merge"))] = "verify"
    return out


def renamed(names: Sequence[str]) -> dict[str, str]:
    """The names of a job's steps that are those of 0.1, each with what it is called now."""
    return {old: new for old, new in zip(names, current_names(names), strict=True) if old != new}


def steps_of(run: Run) -> list[Step]:
    """The steps of the run's job, in order; names that no step has are left out (see `wrong_steps`)."""
    return named(run.job.steps)


def without_folder(steps: Sequence[Step]) -> bool:
    """Whether a job of these steps leaves nothing behind, and so gets no folder."""
    return bool(steps) and not any(s.keeps_folder for s in steps)


def named(names: Sequence[str]) -> list[Step]:
    """The steps of these names, in order."""
    return [STEPS.get(n) for n in current_names(names) if n in STEPS]


def wrong_steps(names: Sequence[str]) -> str | None:
    """Why these steps cannot be run in this order, or None."""
    choices = f"There are {', '.join(STEPS.names())}."
    if not names:
        return f"it is empty. {choices}"
    now = current_names(names)
    for i, name in enumerate(now):
        if name not in STEPS:
            return f"'{name}' is not a step.{did_you_mean(name, STEPS.names())} {choices}"
        needed = STEPS.get(name).needs
        if needed is not None and needed not in now[:i]:
            return f"'{name}' has to come after '{needed}', in {[*names]}"
    return None


def merges(run: Run) -> bool:
    """Whether the job writes a merged model."""
    return any(s.merges for s in steps_of(run))


def measures(run: Run) -> bool:
    """Whether the job, or the search that it is the job of, measures models."""
    from mergelab import evaluation  # late: composing does not need it

    asked = run.search.name != "none" or any(s.measures for s in steps_of(run))
    return asked and evaluation.measures_anything(run.eval)


def loads_models(run: Run) -> bool:
    """Whether the job loads models to measure them, or to ask them."""
    return measures(run) or any(s.loads_models for s in steps_of(run))


def asks_models(run: Run) -> bool:
    """Whether the job has models continue texts."""
    return any(s.asks_models for s in steps_of(run))


def unread_settings(run: Run) -> Iterator[tuple[str, str]]:
    """The sections of steps that are not in the job, and in them the keys that are not as by default."""
    read = {s.section for s in steps_of(run)}
    for section in dict.fromkeys(STEPS.get(n).section for n in STEPS.names()):
        if section is not None and section not in read and (own := getattr(run, section, None)) is not None:
            default = type(own)()
            for key, value in vars(own).items():
                if value != getattr(default, key):
                    yield section, key
