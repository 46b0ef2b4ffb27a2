"""What the tests of a real cluster share."""

from slurm_together import deeds, ended, shared, undisturbed  # noqa: F401 (fixtures)
