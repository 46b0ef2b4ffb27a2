"""`eval.kind=none`: nothing is measured."""

from __future__ import annotations

from mergelab.evaluation.kind import EvaluationKind, Split, register
from mergelab.evaluation.measures import Measure
from mergelab.schema import Run


class Nothing(EvaluationKind):
    """No measures."""

    measures_nothing = True

    def measures(self, run: Run, split: Split) -> list[Measure]:
        """None on any split."""
        return []

    def is_local(self, run: Run) -> bool:
        """It reads nothing."""
        return True


register("none", Nothing())
