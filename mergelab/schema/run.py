"""`Run`: one composed experiment, and what it was composed from."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Dict, Iterable, List, Optional, Tuple

from mergelab.schema.conditions import DECIDED_BY_FILE
from mergelab.schema.evaluation import Evaluation
from mergelab.schema.experts import Expert, Method
from mergelab.schema.fields import limited, setting
from mergelab.schema.hardware import Hardware
from mergelab.schema.models import Model
from mergelab.schema.search import Search
from mergelab.schema.steps import Analyze, Check, Evaluate, Extract, Fetch, Generate, Job, Monitor, Publish
from mergelab.schema.tracking import Tracking


@dataclass(frozen=True)
class Composition:
    """What a Run was composed from."""

    overrides: Tuple[str, ...] = ()
    """As they were typed."""
    choices: Dict[str, str] = field(default_factory=dict)
    """The chosen option of each group."""
    config_dir: Optional[str] = None
    """The user's own folder of groups."""
    code: Dict[str, str] = field(default_factory=dict)
    """The digest of each Python file in it, by its path there."""


@dataclass
class Run:
    """One composed experiment."""

    model: Model = field(default_factory=Model)
    experts: Dict[str, Expert] = setting({}, no_effect=[DECIDED_BY_FILE])
    """Who takes part, by role."""
    method: Method = field(default_factory=Method)
    hardware: Hardware = field(default_factory=Hardware)
    eval: Evaluation = field(default_factory=Evaluation)
    job: Job = field(default_factory=Job)
    tracking: Tracking = field(default_factory=Tracking)
    search: Search = field(default_factory=Search)
    check: Check = field(default_factory=Check)
    evaluate: Evaluate = field(default_factory=Evaluate)
    generate: Generate = field(default_factory=Generate)
    fetch: Fetch = field(default_factory=Fetch)
    publish: Publish = field(default_factory=Publish)
    extract: Extract = field(default_factory=Extract)
    analyze: Analyze = field(default_factory=Analyze)
    monitor: Monitor = field(default_factory=Monitor)
    seed: int = limited(0, at_least=0, at_most=2**32 - 1)
    """The seed of everything random: the masks of DARE and DELLA, few-shot choices."""
    output: Optional[str] = None
    """Where the merged model goes. Null: `model/` in the run's folder."""
    allow: List[str] = field(default_factory=list)
    """Codes of findings to let pass, as shown in brackets, when you know better."""
    composition: Optional[Composition] = field(
        default=None, compare=False, repr=False, metadata={"omegaconf_ignore": True}
    )
    """What it was composed from. Not a setting, and without influence on a result."""

    @property
    def overrides(self) -> List[str]:
        """What was typed to compose it."""
        return list(self.composition.overrides) if self.composition else []


def identity_of(run: Run) -> Dict[str, Any]:
    """The settings by which the same command is recognised, and the code that its `--config-dir` brings.
    Settings that earlier versions did not have count only where they are set, so that what was begun by
    those is still found."""
    out = settings_of(run)
    if not run.eval.options:
        del out["eval"]["options"]
    if run.hardware.scheduler is None:
        del out["hardware"]["scheduler"]
    if run.composition is not None and run.composition.code:
        out["code"] = dict(run.composition.code)
    return out


def settings_of(run: Run) -> Dict[str, Any]:
    """Every setting of a run, as nested mappings: all that decides what comes of it."""
    out = asdict(run)
    del out["composition"]
    return out


def with_overrides(run: Run, overrides: Iterable[str]) -> Run:
    """The run with other arguments recorded as those that it was composed from."""
    return replace(run, composition=replace(run.composition or Composition(), overrides=tuple(overrides)))
