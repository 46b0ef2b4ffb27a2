"""The merge methods on plain tensors: `merge_tensors("ties", experts, {"weight": [1, 1]}, base=base)`.

`KERNELS` has them all by the names that mergekit gives them; see `mergelab.merging.kernels`.
"""

from mergelab.merging.kernels import (
    KERNELS,
    VERSION,
    Budget,
    Buffers,
    Group,
    merge,
    merge_into,
    merge_tensors,
)

__all__ = ["KERNELS", "VERSION", "Budget", "Buffers", "Group", "merge", "merge_into", "merge_tensors"]
