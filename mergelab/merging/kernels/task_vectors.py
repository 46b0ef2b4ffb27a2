"""Methods on task vectors: sparsify, let signs vote, combine. A method is a choice of the first two.

    tau_i  = sparsify(theta_i - theta_base)
    d_i    = w_i * tau_i
    theta  = theta_base + lambda * sum_A d_i / sum_A w_i      (the division only if `normalize`)

A holds all experts, or with `consensus` those whose sign is that of sum_i d_i, entry by entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergelab.merging.kernels.drop import Drop
from mergelab.merging.kernels.sparsifiers import sparsifier
from mergelab.merging.kernels.tensor_group import Chunk, Group, Kernel, Parameters, SecondPass

SMALL = 1e-8
"""A sum of weights below this is not divided by; mergekit's bound."""


def kernel(sparsify: str | None, *, consensus: bool) -> Kernel:
    """The kernel of a method.

    Args:
        sparsify: a name in `SPARSIFIERS`; None: nothing is dropped.
        consensus: whether signs vote.
    """

    def prepare(group: Group, p: Parameters) -> SecondPass:
        if not group.count:
            return SecondPass(lambda chunk: chunk.base)
        weights = torch.tensor(p["weight"], dtype=group.dtype, device=group.buffers.device)
        prune = sparsifier(sparsify, group, p) if sparsify else None
        total = weights.sum()
        total = torch.ones_like(total) if float(total.abs()) < SMALL else total

        def combine(chunk: Chunk) -> Tensor:
            deltas = chunk.deltas()
            if prune:
                prune.apply(chunk, deltas)
            deltas.mul_(weights[:, None])
            if consensus:
                mixed = vote(group, deltas, weights if p["normalize"] else None)
            else:
                mixed = torch.sum(deltas, 0, out=group.buffer("mixed", chunk.numel))
                if p["normalize"]:
                    mixed.div_(total)
            if p["lambda"] != 1:
                mixed.mul_(p["lambda"])
            return mixed.add_(chunk.base)

        drop = prune.drop if prune else Drop()
        if drop is None or group.loops is None:
            return SecondPass(combine, prune.width if prune else 1)
        into = group.loops.finish(
            group, drop, weights, combine, consensus=consensus, normalize=p["normalize"],
            total=float(total), scale=p["lambda"],
        )  # fmt: skip
        return SecondPass(combine, prune.width if prune else 1, into)

    return prepare


def vote(group: Group, d: Tensor, weights: Tensor | None) -> Tensor:
    """The sum of what has the elected sign, entry by entry: the sign of the sum, + where that is 0.

    Args:
        d: [experts, n], weighted; overwritten.
        weights: [experts]: divide by the sum of those that agree, 1 where none does. None: do not.
    Returns:
        [n], a buffer.

    Multiplying by the elected sign turns what agrees positive; what is left then is its magnitude.
    """
    n = d.shape[1]
    mixed, sign = group.buffer("mixed", n), group.buffer("sign", n)
    elect(d, mixed, sign)
    torch.sum(d, 0, out=mixed).mul_(sign)
    if weights is not None:
        divisor = torch.sum(d.gt_(0).mul_(weights[:, None]), 0, out=group.buffer("divisor", n))
        divisor.add_(torch.eq(divisor, 0, out=sign))
        mixed.div_(divisor)
    return mixed


def elect(d: Tensor, scratch: Tensor, sign: Tensor) -> None:
    """Put the elected sign, 1 or -1, into `sign` [n], and into `d` [experts, n] the magnitudes of
    what agrees with it, 0 for the rest."""
    torch.ge(torch.sum(d, 0, out=scratch), 0, out=sign).mul_(2).sub_(1)
    d.mul_(sign).relu_()


task_arithmetic = kernel(None, consensus=False)
ties = kernel("magnitude", consensus=True)
dare_linear = kernel("random", consensus=False)
dare_ties = kernel("random", consensus=True)
della_linear = kernel("ranked", consensus=False)
della = kernel("ranked", consensus=True)
breadcrumbs = kernel("outliers", consensus=False)
breadcrumbs_ties = kernel("outliers", consensus=True)
