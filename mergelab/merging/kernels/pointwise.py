"""Methods that weigh entries, tensors or rows against each other: linear, passthrough, nearswap,
Model Stock, SCE, RAM and Arcee fusion. The formulas stand in `conf/method/*.yaml`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mergelab.merging.kernels.order_statistics import (
    Scanned,
    bits,
    largest,
    locate,
    magnitudes,
    ordered,
    signed_value,
    split,
    value,
)
from mergelab.merging.kernels.sparsifiers import shrink
from mergelab.merging.kernels.spherical import norm
from mergelab.merging.kernels.task_vectors import elect
from mergelab.merging.kernels.tensor_group import Chunk, Group, Parameters, SecondPass


def linear(group: Group, p: Parameters) -> SecondPass:
    """Weighted average (Wortsman et al. 2022, https://arxiv.org/abs/2203.05482)."""
    weights = torch.tensor(p["weight"], dtype=group.dtype, device=group.buffers.device)
    total = weights.sum(dim=0, keepdim=True)

    def combine(chunk: Chunk) -> Tensor:
        result = group.buffer("result", chunk.numel).zero_()
        for tensor, weight in zip(chunk.experts, weights[:, None], strict=True):
            result.addcmul_(tensor, weight)
        return result.div_(total) if p["normalize"] else result

    return SecondPass(combine)


def passthrough(group: Group, p: Parameters) -> SecondPass:
    """The one expert, or `scale` times it."""
    (scale,) = p["scale"]

    def combine(chunk: Chunk) -> Tensor:
        expert = chunk.experts[0]
        return expert if scale is None else expert.mul_(scale)

    return SecondPass(combine)


def nearswap(group: Group, p: Parameters) -> SecondPass:
    """Go from the base to the expert, the further the nearer they are.

    https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001
    """

    def combine(chunk: Chunk) -> Tensor:
        expert = chunk.experts[0]
        share = torch.sub(chunk.base, expert, out=group.buffer("share", chunk.numel)).abs_()
        share.clamp_(min=1e-6).reciprocal_().mul_(p["t"]).clamp_(min=0, max=1)
        expert.mul_(share)
        return expert.add_(share.neg_().add_(1).mul_(chunk.base))

    return SecondPass(combine)


def model_stock(group: Group, p: Parameters) -> SecondPass:
    """Interpolate between base and mean by the angle between task vectors (Jang et al. 2024,
    https://arxiv.org/abs/2403.19522), tensor by tensor or with `filter_wise` row by row."""
    width = group.row if p["filter_wise"] else 1
    pairs = [(a, b) for a in range(group.count) for b in range(a + 1, group.count)]

    def rows(x: Tensor) -> Tensor:
        return x.view(-1, group.row) if p["filter_wise"] else x

    def products(chunk: Chunk) -> tuple[list[Tensor], list[Tensor]]:
        """The norm of each task vector, and the dot product of each pair."""
        deltas = [rows(x) for x in chunk.deltas()]
        norms = [norm(x, dim=-1) for x in deltas]
        return norms, [(deltas[a] * deltas[b]).sum(dim=-1) for a, b in pairs]

    def ratio(norms: list[Tensor], dots: list[Tensor]) -> Tensor:
        """How far to go from the base to the mean of the experts."""
        cosines = [
            (dot / (norms[a] * norms[b]).clamp(min=1e-6)).clamp(-1, 1)
            for dot, (a, b) in zip(dots, pairs, strict=True)
        ]
        cosine = torch.stack(cosines).mean(dim=0).unsqueeze(-1)
        denominator = 1 + (group.count - 1) * cosine
        singular = denominator.abs() < 1e-6  # opposing task vectors: stay at the base
        t: Tensor = (group.count * cosine) / torch.where(singular, 1, denominator)
        return torch.where(singular, torch.zeros_like(t), t)

    whole: Tensor | None = None
    if not p["filter_wise"]:
        norms = group.norms(lambda chunk: torch.stack(products(chunk)[0]))
        dots = group.sums(lambda chunk: torch.stack(products(chunk)[1]))
        whole = ratio(list(norms), list(dots))

    def combine(chunk: Chunk) -> Tensor:
        mean = group.buffer("mean", chunk.numel).zero_()
        for expert in chunk.experts:
            mean += expert
        mean = rows(mean.div_(group.count))
        t = whole if whole is not None else ratio(*products(chunk))
        return mean.mul_(t).add_((1 - t) * rows(chunk.base))

    return SecondPass(combine, width)


def sce(group: Group, p: Parameters) -> SecondPass:
    """Select, calculate, erase (Wan et al. 2024, https://arxiv.org/abs/2408.07990)."""
    if not group.count:
        return SecondPass(lambda chunk: chunk.base)
    select = _most_varied(group, p["select_topk"]) if p["select_topk"] < 1 else None

    def selected(chunk: Chunk) -> Tensor:
        deltas = chunk.deltas()
        if select is not None:
            deltas.mul_(select(chunk, deltas))
        return deltas

    squares = group.sums(lambda chunk: selected(chunk).square_().sum(dim=1))
    energy = squares / group.numel
    total = float(energy.sum())
    weights = energy / total if abs(total) >= 1e-6 else torch.ones_like(energy) / group.count
    weights = weights[:, None]

    def combine(chunk: Chunk) -> Tensor:
        d = selected(chunk)
        mixed, sign, share = (group.buffer(name, chunk.numel) for name in ("mixed", "sign", "share"))
        elect(d, mixed, sign)
        scaled = torch.mul(d, weights, out=group.buffer("scaled", *d.shape))
        torch.sum(scaled, 0, out=mixed).mul_(sign)
        torch.sum(d.gt_(0).mul_(weights), 0, out=share)
        return mixed.div_(share.clamp_(min=1e-6)).add_(chunk.base)

    return SecondPass(combine)


def _most_varied(group: Group, share: float) -> Callable[[Chunk, Tensor], Tensor]:
    """SCE's selection: of the entries in which the experts differ, the share that differs most.

    The k entries of largest variance over the experts, k = share * (number of variances that are
    not 0); among equal ones the earliest. Variances are kept where there is memory to spare.

    Returns:
        from a chunk and its task vectors to the mask [n], 1 or 0; a buffer.
    """
    kept: dict[int, Tensor] = {}
    fits = group.numel * group.dtype.itemsize <= group.spare

    def variance(chunk: Chunk, deltas: Tensor) -> Tensor:
        """[n], of the population, computed in float64 and rounded once."""
        if chunk.start in kept:
            return kept[chunk.start]
        wide = [group.buffer(f"wide{i}", chunk.numel, dtype=torch.float64) for i in range(5)]
        x, mean, squares, step, share = wide
        mean.zero_()
        squares.zero_()
        for n, delta in enumerate(deltas, start=1):  # Welford 1962, as torch does it
            torch.sub(x.copy_(delta), mean, out=step)
            mean.add_(torch.div(step, n, out=share))
            squares.add_(step.mul_(x.sub_(mean)))
        out = group.buffer("variance", chunk.numel)
        out.copy_(squares.div_(group.count))
        if fits:
            kept[chunk.start] = out.clone()
        return out

    def scan() -> Iterator[tuple[int, list[Tensor]]]:
        pieces = kept.items() if kept else ((c.start, variance(c, c.deltas())) for c in group.chunks())
        for start, piece in pieces:
            yield start, [magnitudes(piece, out=piece)]  # there is nothing below 0: they stay as they are

    varied = int(group.total(lambda chunk: torch.count_nonzero(variance(chunk, chunk.deltas()))))
    k = int(torch.tensor(varied) * share)  # a product in float32, as in mergekit
    if k == 0:
        return lambda chunk, deltas: torch.zeros((), dtype=group.dtype, device=deltas.device)
    (cut,) = largest(Scanned(scan, bits(group.dtype)), [k], group.numel)
    bound, below = value(cut.key, group.dtype), value(cut.key - 1, group.dtype)

    def mask(chunk: Chunk, deltas: Tensor) -> Tensor:
        found, out = variance(chunk, deltas), group.buffer("chosen", chunk.numel)
        for part, into, least in zip(
            split(found, chunk.start, cut.last),
            split(out, chunk.start, cut.last),
            (below, bound),
            strict=True,
        ):
            torch.gt(part, least, out=into)
        return out

    return mask


def ram(group: Group, p: Parameters) -> SecondPass:
    """Average where several experts changed an entry, keep what one alone changed (Yuan et al. 2026,
    https://arxiv.org/abs/2601.13572)."""
    return _ram(group, p["epsilon"], None)


def ramplus_tl(group: Group, p: Parameters) -> SecondPass:
    """RAM, in which what one expert alone changed grows with its overlap elsewhere in the tensor."""
    if not group.count:
        return SecondPass(lambda chunk: chunk.base)

    def counts(chunk: Chunk) -> Tensor:
        """Entries that each expert changed together with others, and alone: [2, experts]."""
        changed = _changes(group, chunk, p["epsilon"]).ne(0)
        several = changed.sum(dim=0)
        return torch.stack([(changed & (several > 1)).sum(dim=1), (changed & (several == 1)).sum(dim=1)])

    shared, alone = group.total(counts).long()
    rho = shared / alone.clamp(min=p["epsilon"])
    grown = 1 + p["r"] * rho.clamp(min=0, max=p["alpha"])
    return _ram(group, p["epsilon"], grown.to(group.dtype))


def _changes(group: Group, chunk: Chunk, epsilon: float) -> Tensor:
    """The task vectors, [experts, n], with 0 for what is no larger than epsilon."""
    deltas = chunk.deltas()
    shrink(deltas, epsilon)
    return deltas


def _ram(group: Group, epsilon: float, alone: Tensor | None) -> SecondPass:
    if not group.count:
        return SecondPass(lambda chunk: chunk.base)

    def combine(chunk: Chunk) -> Tensor:
        d = _changes(group, chunk, epsilon)
        changed = torch.ne(d, 0, out=group.buffer("changed", *d.shape))
        several = torch.sum(changed, 0, out=group.buffer("several", chunk.numel))
        if alone is not None:
            single = torch.eq(several, 1, out=group.buffer("single", chunk.numel))
            # 1 where several changed it, what `alone` says where one did
            torch.mul(single, alone[:, None], out=changed)
            d.mul_(changed.add_(single.neg_().add_(1)))
        d.div_(several.clamp_(min=1))
        return torch.sum(d, 0, out=several).add_(chunk.base)

    return SecondPass(combine)


def arcee_fusion(group: Group, p: Parameters) -> SecondPass:
    """Take over the entries whose importance stands out: |difference| times the divergence of the
    row's softmax, above median + 1.5 * (third - first quartile). https://arcee.ai

    The quartiles are exact; mergekit takes them from a random million of entries where there are more.
    """
    quarters = [int(q * (group.numel - 1)) for q in (0.25, 0.5, 0.75)]

    def importance(chunk: Chunk) -> Tensor:
        expert, base = (x.view(-1, group.row) for x in (chunk.experts[0], chunk.base))
        p, q = F.softmax(expert, dim=-1) + 1e-8, F.softmax(base, dim=-1) + 1e-8
        divergence = torch.sum(p * torch.log(p / q), dim=-1, keepdim=True)
        return (expert - base).abs() * divergence

    def scan() -> Iterator[tuple[int, list[Tensor]]]:
        for chunk in group.chunks(group.row):
            yield chunk.start, [ordered(importance(chunk).view(-1))]

    (found,) = locate(scan, [quarters], bits(group.dtype), signed=True)
    first, median, third = (signed_value(at.key, group.dtype) for at in found)
    bound = (median + 1.5 * (third - first)).to(group.buffers.device)

    def combine(chunk: Chunk) -> Tensor:
        mask = importance(chunk).ge_(bound).view(-1)
        return chunk.experts[0].sub_(chunk.base).mul_(mask).add_(chunk.base)

    return SecondPass(combine, group.row)
