"""Methods that see tensors as directions with a length: slerp, nuslerp, multislerp, karcher.

What they need of a whole tensor are norms and dot products, each a way over the chunks. The
formulas stand in `conf/method/*.yaml`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergelab.merging.kernels.tensor_group import Chunk, Group, Parameters, SecondPass


def norm(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """The Euclidean norm."""
    return torch.linalg.vector_norm(x, dim=dim, keepdim=keepdim)  # type: ignore[no-any-return]


def slerp(group: Group, p: Parameters) -> SecondPass:
    """Along the arc from the base to the expert (Shoemake 1985,
    https://doi.org/10.1145/325334.325242); along the line where |cos| > 0.9995."""
    t = group.scalar(p["t"])

    def lengths(chunk: Chunk) -> Tensor:
        return torch.stack([norm(chunk.base), norm(chunk.experts[0])])

    length = group.norms(lengths)
    length = torch.where(length > 1e-8, length, 1)

    def cosine(chunk: Chunk) -> Tensor:
        return chunk.base.div_(length[0]).mul_(chunk.experts[0].div_(length[1])).sum()

    dot = group.sums(cosine).clamp(-1, 1)
    straight = dot.abs() > 0.9995
    theta = torch.acos(torch.where(straight, 0, dot))
    sine = torch.sin(theta)
    first = torch.where(straight, 1 - t, torch.sin((1 - t) * theta) / sine)
    second = torch.where(straight, t, torch.sin(t * theta) / sine)
    return SecondPass(lambda chunk: chunk.base.mul_(first).add_(chunk.experts[0].mul_(second)))


def nuslerp(group: Group, p: Parameters) -> SecondPass:
    """Along the arc between two experts, or between their task vectors where there is a base:
    whole tensors, rows (`nuslerp_flatten: false`) or columns (`nuslerp_row_wise: true` besides)."""
    total = sum(p["weight"])
    t = 0.5 if abs(total) < 1e-6 else p["weight"][1] / total
    by_column = p["nuslerp_row_wise"] and not p["nuslerp_flatten"] and len(group.shape) > 1
    by_row = not p["nuslerp_flatten"] and not by_column
    width = group.row if by_row else group.numel // group.shape[0] if by_column else 1

    def pair(chunk: Chunk) -> list[Tensor]:
        vectors = chunk.deltas() if group.base is not None else chunk.experts
        if not (by_row or by_column):
            return list(vectors)
        return [v.view(-1, width).transpose(0, -1) if by_column else v.view(-1, width) for v in vectors]

    def lengths(vectors: Sequence[Tensor]) -> Tensor:
        return torch.stack([norm(v, dim=-1, keepdim=True) for v in vectors])

    def cosine(vectors: Sequence[Tensor], length: Tensor) -> Tensor:
        length = length.clamp(min=1e-7)
        return torch.sum((vectors[0] / length[0]) * (vectors[1] / length[1]), dim=-1, keepdim=True)

    def arc(vectors: Sequence[Tensor], dot: Tensor) -> Tensor:
        dot = dot.clamp(-1, 1)
        parallel = (1 - dot.square()) <= 1e-16
        theta = torch.acos(torch.where(parallel, 0, dot))
        first, second = vectors
        bent = (torch.sin((1 - t) * theta) * first + torch.sin(t * theta) * second) / torch.sin(theta)
        return torch.where(parallel, (1 - t) * first + t * second, bent)

    dot: Tensor | None = None
    if not by_row:
        length = group.norms(lambda chunk: lengths(pair(chunk)), width)
        dot = group.sums(lambda chunk: cosine(pair(chunk), length), width)

    def combine(chunk: Chunk) -> Tensor:
        vectors = pair(chunk)
        merged = arc(vectors, dot if dot is not None else cosine(vectors, lengths(vectors)))
        merged = (merged.transpose(0, -1) if by_column else merged).reshape(-1)
        return merged + chunk.base if group.base is not None else merged

    return SecondPass(combine, width)


def multislerp(group: Group, p: Parameters) -> SecondPass:
    """Barycentric interpolation on a sphere, around the base where there is one.

    https://goddard.blog/posts/multislerp-wow-what-a-cool-idea

    Where no expert differs from the base, the base is what comes out (mergekit raises).
    """
    if group.count == 1:
        return SecondPass(lambda chunk: chunk.experts[0])
    eps = p["eps"]
    weights = torch.tensor(p["weight"], dtype=group.dtype, device=group.buffers.device)
    if p["normalize_weights"]:
        weights = weights / weights.sum()
    column = weights.view(-1, 1)

    def vectors(chunk: Chunk) -> Tensor:
        return chunk.deltas() if group.base is not None else chunk.experts

    def back(chunk: Chunk, merged: Tensor) -> Tensor:
        return merged + chunk.base if group.base is not None else merged

    lengths = group.norms(lambda chunk: norm(vectors(chunk), dim=-1, keepdim=True))
    if group.base is not None and not bool(lengths.any()):
        return SecondPass(lambda chunk: chunk.base)

    def units(chunk: Chunk) -> Tensor:
        return vectors(chunk).div_(lengths + eps)

    def middle(chunk: Chunk) -> tuple[Tensor, Tensor]:
        unit = units(chunk)
        return unit, (unit * column).sum(0)

    size = group.norms(lambda chunk: norm(middle(chunk)[1]))
    if float(size) < eps:
        if group.count == 2:
            return SecondPass(lambda chunk: back(chunk, (vectors(chunk) * column).sum(0)))
        raise ValueError("the weighted directions cancel out; choose other weights")

    dots = group.sums(lambda chunk: _times(*_scaled(middle(chunk), size)))

    def tangent(chunk: Chunk) -> tuple[Tensor, Tensor]:
        unit, mean = _scaled(middle(chunk), size)
        return mean, ((unit - dots * mean) * column).sum(0)

    slope = group.norms(lambda chunk: norm(tangent(chunk)[1])) + eps
    length = (lengths.squeeze(-1) * weights).sum()

    def combine(chunk: Chunk) -> Tensor:
        mean, direction = tangent(chunk)
        merged = mean * torch.cos(slope) + direction * (torch.sin(slope) / slope)
        return back(chunk, merged * length)

    return SecondPass(combine)


def _scaled(middle: tuple[Tensor, Tensor], size: Tensor) -> tuple[Tensor, Tensor]:
    unit, mean = middle
    return unit, mean / size


def _times(unit: Tensor, mean: Tensor) -> Tensor:
    return (unit * mean).sum(-1, keepdim=True)


@dataclass(frozen=True)
class Round:
    """One round of the iteration for a Karcher mean, as the numbers that decide it."""

    pulls: list[tuple[Tensor, Tensor] | None]
    """For each expert the dot product with the mean and the factor of its direction; None where
    it is there already."""
    length: Tensor
    """Of the tangent."""
    size: Tensor | None
    """Of the mean after the step, by which it is divided; None where it is too small."""


def karcher(group: Group, p: Parameters) -> SecondPass:
    """The point on the sphere nearest to all directions, at their mean length (Wang, Ye and Yin
    2026, https://arxiv.org/abs/2603.04972).

    The mean is not kept between the ways over the chunks: it follows from a few numbers a round.
    """
    if group.count == 1:
        return SecondPass(lambda chunk: chunk.experts[0])
    tol, share = p["tol"], 1.0 / group.count
    lengths = group.norms(lambda chunk: norm(chunk.experts, dim=1))
    valid = [q for q in range(group.count) if float(lengths[q]) > tol]
    if not valid:
        return SecondPass(lambda chunk: torch.zeros_like(chunk.experts[0]))
    alpha = share / sum([share] * len(valid))

    def units(chunk: Chunk) -> list[Tensor]:
        return [chunk.experts[q].div_(lengths[q]) for q in valid]

    def start(unit: list[Tensor], size: Tensor | None) -> Tensor:
        mean = torch.zeros_like(unit[0])
        for u in unit:
            mean += alpha * u
        return mean if size is None else mean.div_(size) if float(size) >= tol else unit[0].clone()

    first = group.norms(lambda chunk: norm(start(units(chunk), None)))
    rounds: list[Round] = []

    def tangent(unit: list[Tensor], mean: Tensor, pulls: list[tuple[Tensor, Tensor] | None]) -> Tensor:
        out = torch.zeros_like(mean)
        for u, pull in zip(unit, pulls, strict=True):
            if pull is not None:
                out += pull[1] * (u - pull[0] * mean)
        return out

    def mean_of(unit: list[Tensor]) -> Tensor:
        mean = start(unit, first)
        for r in rounds:
            mean = step(unit, mean, r.pulls, r.length)
            mean = mean / r.size if r.size is not None else mean
        return mean

    def step(unit: list[Tensor], mean: Tensor, pulls: list[tuple[Tensor, Tensor] | None],
             length: Tensor) -> Tensor:  # fmt: skip
        moved: Tensor = torch.cos(length) * mean + torch.sin(length) * (tangent(unit, mean, pulls) / length)
        return moved

    def over(of: Callable[[list[Tensor], Tensor], Tensor]) -> Callable[[Chunk], Tensor]:
        def with_mean(chunk: Chunk) -> Tensor:
            unit = units(chunk)
            return of(unit, mean_of(unit))

        return with_mean

    for _ in range(int(p["max_iter"])):
        dots = group.sums(over(lambda unit, mean: torch.stack([torch.dot(mean, u) for u in unit])))
        pulls = [_pull(dot, alpha, tol) for dot in dots.clamp(-1.0, 1.0)]

        def slope(
            unit: list[Tensor], mean: Tensor, pulls: list[tuple[Tensor, Tensor] | None] = pulls
        ) -> Tensor:
            return norm(tangent(unit, mean, pulls))

        length = group.norms(over(slope))
        if float(length) < tol:
            break

        def moved(unit: list[Tensor], mean: Tensor, pulls: list[tuple[Tensor, Tensor] | None] = pulls,
                  length: Tensor = length) -> Tensor:  # fmt: skip
            return norm(step(unit, mean, pulls, length))

        size = group.norms(over(moved))
        rounds.append(Round(pulls, length, size if float(size) > tol else None))

    scale = group.scalar(0)
    for length in lengths:
        scale = scale + share * length

    def combine(chunk: Chunk) -> Tensor:
        return scale * mean_of(units(chunk))

    return SecondPass(combine)


def _pull(dot: Tensor, alpha: float, tol: float) -> tuple[Tensor, Tensor] | None:
    theta = torch.arccos(dot)
    return None if float(theta) < tol else (dot, alpha * (theta / torch.sin(theta)))
