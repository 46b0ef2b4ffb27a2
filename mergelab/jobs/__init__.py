"""Jobs: lists of steps, what each step declares of itself, and how they are run."""

from mergelab.jobs.step import STEPS, Step, register, steps_of

__all__ = ["STEPS", "Step", "register", "steps_of"]
