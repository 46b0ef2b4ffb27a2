"""monitor: what runs, here and on a cluster, until Ctrl-C."""

from __future__ import annotations

from mergelab.core.run_dir import RunDir
from mergelab.jobs import Step, register
from mergelab.schema import Run


def execute(run: Run, run_dir: RunDir) -> str:
    """Show it; the run's own folder is not used, and does not exist.

    Raises:
        InputError: where the settings are wrong.
    """
    from mergelab.monitor.render import watch

    watch(run.monitor)
    return ""


STEP = register(
    Step(
        "monitor",
        execute,
        settings="monitor",
        read_only=True,
        recorded=False,
        keeps_folder=False,
        on_login_node=True,
    )
)
