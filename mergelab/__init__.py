"""mergelab: compose, check, run, evaluate and record merges of large language models."""

__version__ = "0.1.0"
