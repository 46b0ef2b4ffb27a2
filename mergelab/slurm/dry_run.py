"""Whether a cluster would take a task, asked before anything is submitted."""

from __future__ import annotations

import tempfile
from pathlib import Path

from mergelab.core.errors import InputError
from mergelab.schema import Slurm
from mergelab.slurm import client
from mergelab.slurm.batch_dir import write_script
from mergelab.slurm.client import SlurmLimitReached, SlurmRejected, SlurmUnavailable


def check(settings: Slurm, ranks: int, array: bool) -> None:
    """Ask the cluster whether it would take such a task.

    Raises:
        InputError: with its answer, or where there is no Slurm.
    """
    if (lacks := client.missing()) is not None:
        raise InputError(
            f"hardware: it names a Slurm cluster, and there is no {lacks} on this machine\n"
            "Start it on a login node, or choose hardware=cpu, gpu or gpus."
        )
    with tempfile.TemporaryDirectory() as aside:
        place = Path(aside) / "test"
        place.mkdir()
        path = write_script(
            place, settings, "mergelab-test", ["true"], tasks=2 if array else None, ranks=ranks
        )
        try:
            _check_time(settings)
            client.submit(path, test=True)
        except SlurmRejected as e:
            raise InputError(f"hardware.slurm: {e}\nIt is what sbatch says to {_asked(settings)}.") from None
        except (SlurmUnavailable, SlurmLimitReached):
            pass  # it will be asked again when it matters, and waited for


def _check_time(s: Slurm) -> None:
    """A task that asks for more time than its partition gives would wait for ever."""
    if s.time is not None:
        partition, limit = client.longest(s.partition)
        if client.minutes(str(s.time)) > client.minutes(limit):
            raise InputError(
                f"hardware.slurm.time: {s.time} is more than the {limit} of partition {partition}\n"
                "Lower it, or name another partition: hardware.slurm.partition=NAME"
            )


def _asked(s: Slurm) -> str:
    told = {k: getattr(s, k) for k in ("partition", "account", "qos", "constraint", "time", "memory", "gpus")}
    return ", ".join([f"{k}={v}" for k, v in told.items() if v] + [f"cpus={s.cpus}"])
