"""`Run`: the one typed object that a command line composes to, and its parts.

Plain dataclasses. OmegaConf validates every file under `conf/` and every override against them,
so a field documented here is the whole documentation of that key. Values that may be a number,
a gradient or a mapping are `Any` here and checked in `mergelab.recipes.recipe`.

(No `from __future__ import annotations` in these modules: OmegaConf reads the types at run time.)
"""

from mergelab.schema.evaluation import Evaluation
from mergelab.schema.experts import Expert, Method
from mergelab.schema.hardware import Hardware, SchedulerChoice, Slurm
from mergelab.schema.models import Checkpoint, Model, Skill
from mergelab.schema.run import Composition, Run, identity_of, settings_of, with_overrides
from mergelab.schema.search import Fidelity, Search
from mergelab.schema.steps import Analyze, Check, Evaluate, Extract, Fetch, Generate, Job, Monitor, Publish
from mergelab.schema.tracking import Tracking

__all__ = [
    "Analyze", "Check", "Checkpoint", "Composition", "Evaluate", "Evaluation", "Expert", "Extract", "Fetch",
    "Fidelity", "Generate", "Hardware", "Job", "Method", "Model", "Monitor", "Publish", "Run",
    "SchedulerChoice", "Search", "Skill", "Slurm", "Tracking", "identity_of", "settings_of", "with_overrides",
]  # fmt: skip
