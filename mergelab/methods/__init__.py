"""The merge methods: one row for everything known of each, and how users add their own."""

from mergelab.methods.ranges import Constraint, Range
from mergelab.methods.registry import register
from mergelab.methods.traits import ALWAYS, Traits

__all__ = ["ALWAYS", "Constraint", "Range", "Traits", "register"]
