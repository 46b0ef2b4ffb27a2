"""Searches as `slurm_driver` runs them, each a fork of this process."""

from __future__ import annotations

import gc

import cma  # noqa: F401 (with nevergrad, most of what a search imports)
import nevergrad  # noqa: F401
import slurm_driver
from forks import serve

if __name__ == "__main__":
    gc.freeze()
    if arguments := serve():
        slurm_driver.main(arguments)
