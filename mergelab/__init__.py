"""mergelab: compose, check, run, evaluate and record merges of large language models.

From the command line `python -m mergelab --help`; from Python:

    import mergelab

    run = mergelab.compose("method=ties", "experts.math.weight=0.4")   # what the command composes
    mergelab.plan(run).findings                                        # what would go wrong
    result = mergelab.run(run, "out")                                  # merge, check, evaluate, report
    result.fitness, result.model
    mergelab.merge("recipe.yaml", "merged")                            # a file of mergekit's
    mergelab.evaluate("merged", ["gsm8k"], limit=100)
    study = mergelab.search(run, space={"experts.*.weight": (0, 1.5)}, budget=60)
    study.best, study.dataframe()

`mergelab.kernels.merge_tensors` merges plain tensors. Importing mergelab loads neither torch nor Hydra;
what needs them does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mergelab import kernels as kernels
    from mergelab.api import compose as compose
    from mergelab.api import evaluate as evaluate
    from mergelab.api import merge as merge
    from mergelab.api import plan as plan
    from mergelab.api import run as run
    from mergelab.api import search as search
    from mergelab.core.errors import InputError, InputErrors, MergelabError, StepError
    from mergelab.optimization.study import Candidate as Candidate
    from mergelab.optimization.study import Study as Study
    from mergelab.preflight import Finding as Finding
    from mergelab.preflight import Plan as Plan
    from mergelab.result import Result as Result
    from mergelab.result import Score as Score
    from mergelab.schema import Run as Run

_HOMES = {
    "mergelab.api": ("compose", "plan", "run", "merge", "evaluate", "search"),
    "mergelab.schema": ("Run",),
    "mergelab.preflight": ("Plan", "Finding"),
    "mergelab.result": ("Result", "Score"),
    "mergelab.optimization.study": ("Study", "Candidate"),
    "mergelab.core.errors": ("MergelabError", "InputError", "InputErrors", "StepError"),
}
"""Where the public names are defined: each is imported when it is first used."""

__all__ = [
    "Candidate", "Finding", "InputError", "InputErrors", "MergelabError", "Plan", "Result", "Run", "Score",
    "StepError", "Study", "__version__", "compose", "evaluate", "kernels", "merge", "plan", "run", "search",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return import_module("mergelab.kernels")
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'mergelab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
