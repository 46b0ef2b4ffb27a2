"""What the random methods keep, and what makes up for what they drop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from kernel_cases import BF16, FP16, FP32, FP64, WHOLE, chunks_of, draw, ours, same, task
from kernel_cases import one_thread as one_thread  # a fixture
from torch import Tensor

DARE = ["dare_linear", "dare_ties"]
DELLA = ["della_linear", "della"]


def distinct(rows: int, width: int, seed: int = 0) -> Tensor:
    """Magnitudes 1 to `width` in every row, in any order, of any sign."""
    g = torch.Generator().manual_seed(seed)
    size = torch.rand(rows, width, generator=g).argsort(dim=1).float() + 1
    return size * (torch.randint(0, 2, (rows, width), generator=g) * 2 - 1)


def pruned(method: str, delta: Tensor, **settings: Any) -> Tensor:
    """One task vector after the drop: on a base of zeros, with weight 1, it is the result."""
    named = {k: settings.pop(k) for k in ("name", "keys", "seed", "dtype", "spare") if k in settings}
    p = {k: [v] if k in ("density", "epsilon") else v for k, v in settings.items()}
    c = task(method, 1, **({"weight": [1.0]} | p))
    return ours(c, [delta], torch.zeros_like(delta), **named)


def masks(method: str, deltas: Sequence[Tensor], keys: Sequence[str], **settings: Any) -> dict[str, Tensor]:
    """What is kept of each expert, by its key."""
    c = task(method, len(deltas), **settings)
    one_hot = [[float(i == j) for j in range(len(deltas))] for i in range(len(deltas))]
    return {
        k: ours(c, deltas, torch.zeros_like(deltas[0]), keys=keys, weight=w) != 0
        for k, w in zip(keys, one_hot, strict=True)
    }


@pytest.mark.parametrize("method", DARE + DELLA)
@pytest.mark.parametrize("rescale_to", ["l1", "density"])
def test_what_is_kept_does_not_depend_on_chunks(
    method: str, rescale_to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shape in ((48, 70), (5, 3, 70), (600,)):
        delta = distinct(1, math.prod(shape)).view(shape)
        p: dict[str, Any] = {"density": 0.5, "epsilon": 0.2, "rescale": True, "rescale_to": rescale_to}
        chunks_of(1 << 18, monkeypatch)
        whole = pruned(method, delta, **p) != 0
        assert 0.4 < whole.double().mean() < 0.6
        for size in (1000, 64, 7):  # shorter than a row, too
            chunks_of(size, monkeypatch)
            for spare in (0, 1 << 28):
                assert torch.equal(pruned(method, delta, spare=spare, **p) != 0, whole), f"{shape} {size}"


@pytest.mark.parametrize("method", DARE + DELLA)
def test_what_is_kept_does_not_depend_on_the_order_of_the_experts(method: str) -> None:
    deltas = {k: distinct(24, 32, seed) for seed, k in enumerate("abc")}
    density, epsilon = {"a": 0.3, "b": 0.5, "c": 0.7}, {"a": 0.1, "b": 0.2, "c": 0.05}
    found = []
    for order in ("abc", "cab", "bca"):
        p = {"density": [density[k] for k in order], "epsilon": [epsilon[k] for k in order]}
        found.append(masks(method, [deltas[k] for k in order], tuple(order), **p))
    assert all(torch.equal(found[0][k], other[k]) for other in found for k in "abc")
    alone = masks(method, [deltas["b"]], ("b",), density=[0.5], epsilon=[0.2])
    assert torch.equal(found[0]["b"], alone["b"])
    assert not torch.equal(found[0]["a"], found[0]["b"])


@pytest.mark.parametrize("method", DARE + DELLA)
def test_what_is_kept_does_not_depend_on_the_arithmetic_or_the_files(method: str) -> None:
    delta = distinct(24, 100)
    p: dict[str, Any] = {"density": 0.5, "epsilon": 0.2}
    whole = pruned(method, delta, **p) != 0
    for dtype in (FP32, FP64):
        for stored in (BF16, FP16, FP32, FP64):  # whole numbers up to 100 are exact in each
            assert torch.equal(pruned(method, delta.to(stored), dtype=dtype, **p) != 0, whole)


@pytest.mark.parametrize("method", DARE + DELLA)
def test_what_is_kept_depends_on_seed_tensor_and_expert(method: str) -> None:
    delta = distinct(24, 32)
    p: dict[str, Any] = {"density": 0.5, "epsilon": 0.2}
    first = pruned(method, delta, **p)
    assert torch.equal(pruned(method, delta, seed=0, name="layer", keys=("0",), **p), first)
    for other in ({"seed": 1}, {"name": "other"}, {"keys": ("math",)}):
        assert not torch.equal(pruned(method, delta, **other, **p) != 0, first != 0), other


@pytest.mark.parametrize("method", DARE)
def test_dare_keeps_the_share_that_density_says(method: str) -> None:
    deltas, keys = [torch.ones(400, 500)] * 4, ("a", "b", "c", "d")
    density = [0.01, 0.1, 0.5, 0.9]
    for (k, kept), p in zip(masks(method, deltas, keys, density=density).items(), density, strict=True):
        n = kept.numel()
        assert abs(int(kept.sum()) - p * n) < 4 * math.sqrt(p * (1 - p) * n), k


@pytest.mark.parametrize("method", DARE + DELLA)
def test_l1_gives_each_task_vector_its_norm_back(method: str) -> None:
    for shape, density in (((24, 100), 0.5), ((500,), 0.3), ((4, 5, 30), 0.7)):
        delta = distinct(1, math.prod(shape)).view(shape)
        p: dict[str, Any] = {"density": density, "epsilon": 0.2}
        after = pruned(method, delta, rescale=True, rescale_to="l1", **p)
        without = pruned(method, delta, **p)
        assert torch.equal(after != 0, without != 0)
        assert float(after.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-6)
        factor = after[without != 0] / without[without != 0]
        assert torch.allclose(factor, factor[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", DARE)
@pytest.mark.parametrize("density", [0.1, 0.37, 0.9])
def test_dare_divides_by_the_density(method: str, density: float) -> None:
    delta = distinct(24, 100)
    after = pruned(method, delta, density=density, rescale=True, rescale_to="density")
    kept = pruned(method, delta, density=density) != 0
    assert torch.allclose(after, torch.where(kept, delta / density, 0.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties"])
def test_what_is_trimmed_can_be_divided_by_the_density_too(method: str) -> None:
    delta = distinct(24, 100)
    after = pruned(method, delta, density=0.25, rescale=True, rescale_to="density")
    kept = pruned(method, delta, density=0.25) != 0
    assert int(kept.sum()) == 600
    assert torch.equal(after, torch.where(kept, delta * 4, 0.0))


def share(size: Tensor, density: float, epsilon: float) -> Tensor:
    """By definition: what is kept of each entry of a row, by the middle of the ranks that it shares."""
    below = (size[..., None, :] < size[..., :, None]).sum(dim=-1)
    equal = (size[..., None, :] == size[..., :, None]).sum(dim=-1)
    rank = below + (equal - 1) / 2
    return density - epsilon + 2 * epsilon * rank.double() / (size.shape[-1] - 1)


ROWS = {
    "distinct": distinct(1, 101),
    "tied": torch.tensor([[1.0] * 20 + [-2.0] * 30 + [3.0] + [-4.0] * 20 + [4.0] * 30]),
    "constant": torch.full((1, 101), -0.5),
    "pairs": torch.arange(2.0, 104).div(2, rounding_mode="floor")[None],
    "two": torch.tensor([[2.0, -1.0]]),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("method", DELLA)
def test_della_divides_by_the_probability_of_the_rank(method: str, rows: str) -> None:
    delta = ROWS[rows].repeat(20, 1)
    p: dict[str, Any] = {"density": 0.5, "epsilon": 0.3}
    kept = pruned(method, delta, **p) != 0
    after = pruned(method, delta, rescale=True, rescale_to="density", **p)
    q = share(delta.abs(), **p).float()
    assert torch.allclose(after, torch.where(kept, delta / q, 0.0), rtol=1e-6, atol=0)
    assert 0 < kept.double().mean() < 1


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.3), (0.2, 0.15), (0.9, 0.05), (0.5, 1e-3)])
@pytest.mark.parametrize("rows", ROWS)
def test_della_keeps_by_the_rank(rows: str, density: float, epsilon: float) -> None:
    """Over 400 rows of 16 seeds: each tenth of the ranks within 4.5 standard deviations of what the
    formula says, and chi-square over all entries of the row. Entries of equal magnitude share the
    mean of their probabilities."""
    row, trials = ROWS[rows], 400 * 16
    counts = torch.zeros(row.shape[1], dtype=FP64)
    for seed in range(16):
        delta = row.repeat(400, 1)
        counts += (pruned("della_linear", delta, seed=seed, density=density, epsilon=epsilon) != 0).sum(dim=0)
    q = share(row[0].abs(), density, epsilon)
    order = q.argsort(stable=True)
    spread = trials * q * (1 - q)
    for tenth in order.chunk(10):
        off = (counts[tenth] - trials * q[tenth]).sum()
        assert off.abs() < 4.5 * spread[tenth].sum().sqrt()
    chi2 = ((counts - trials * q).square() / spread).sum()
    assert (chi2 - len(q)).abs() < 4.5 * math.sqrt(2 * len(q))


@pytest.mark.parametrize(("della", "dare"), list(zip(DELLA, DARE, strict=True)))
def test_della_without_a_spread_is_dare(della: str, dare: str) -> None:
    """Nor is there one between the ranks of a row of one entry."""
    for shape, epsilon in (((24, 32), 0.0), ((600, 1), 0.2), ((1,), 0.2)):
        delta = distinct(1, math.prod(shape)).view(shape)
        for rescale, rescale_to in ((False, "l1"), (True, "l1"), (True, "density")):
            p = {"density": 0.5, "rescale": rescale, "rescale_to": rescale_to}
            assert same(pruned(della, delta, epsilon=epsilon, **p), pruned(dare, delta, **p)), p


def test_della_with_a_spread_for_one_expert_only() -> None:
    deltas = [distinct(24, 32, seed) for seed in range(2)]
    p = {"density": [0.5, 0.4], "rescale": True}
    for rescale_to in ("l1", "density"):
        c = task("della_linear", 2, weight=[1.0, 0.0], epsilon=[0.0, 0.1], rescale_to=rescale_to, **p)
        alone = pruned("dare_linear", deltas[0], density=0.5, rescale=True, rescale_to=rescale_to)
        assert torch.allclose(ours(c, deltas, torch.zeros(24, 32)), alone, rtol=1e-6, atol=0), rescale_to


@pytest.mark.parametrize("method", DARE + DELLA)
@pytest.mark.parametrize("rescale_to", ["l1", "density"])
def test_density_1_leaves_everything(method: str, rescale_to: str) -> None:
    base, experts = draw("near", (24, 32), [BF16], 3)
    p: dict[str, Any] = {"density": WHOLE, "rescale": True, "rescale_to": rescale_to}
    plain = "ties" if method in ("dare_ties", "della") else "task_arithmetic"
    assert same(ours(task(method, 3, **p), experts, base), ours(task(plain, 3, density=WHOLE), experts, base))
    deltas = [distinct(24, 32, seed) for seed in range(2)]
    kept = masks(method, deltas, ("a", "b"), density=[1.0, 0.5], epsilon=[0.2, 0.2], **{"rescale": True})
    assert bool(kept["a"].all())
    assert not bool(kept["b"].all())


@pytest.mark.parametrize("method", DARE + DELLA)
def test_a_higher_density_only_adds_entries(method: str) -> None:
    """A search over densities then sees a fitness without jumps."""
    delta = distinct(100, 200)
    before = torch.zeros(100, 200, dtype=torch.bool)
    for density in (0.3, 0.31, 0.5, 0.501, 0.51, 0.7):
        kept = pruned(method, delta, density=density, epsilon=0.2) != 0
        assert not bool((before & ~kept).any())
        assert int(kept.sum()) > int(before.sum())
        before = kept
