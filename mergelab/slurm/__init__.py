"""Slurm, as one of the schedulers of `mergelab.scheduling`."""
