"""The kernels in pieces: chunks, buffers and memory change no result, and nothing is left behind."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    ALL,
    BF16,
    CASES,
    FP32,
    FP64,
    RANDOM,
    WEIGHT,
    Case,
    case,
    chunks_of,
    draw,
    ours,
    same,
    task,
    theirs,
)
from kernel_cases import one_thread as one_thread  # a fixture
from pairwise import pairwise

from mergelab.merging import kernels
from mergelab.merging.kernels.buffers import Buffers

# ---------------------------------------------------------------- several chunks


SUMS = {"model_stock", "slerp", "nuslerp", "multislerp", "karcher"}
"""Methods that need norms or dot products of whole tensors; unless they go row by row."""


def by_row(c: Case) -> bool:
    p = c.parameters
    return bool(p.get("filter_wise")) or (c.method == "nuslerp" and not p["nuslerp_flatten"]
                                          and not p["nuslerp_row_wise"])  # fmt: skip


def weighs(c: Case) -> bool:
    """Whether numbers that all entries decide (an L1 norm, an energy) scale the result."""
    return c.method == "sce" or bool(c.parameters.get("rescale") and c.parameters["rescale_to"] == "l1")


SHAPES = [(24, 32), (23, 31), (999,), (2, 30, 5)]


@pytest.mark.parametrize("c", [c for c in ALL if c.method not in SUMS or by_row(c)], ids=str)
def test_chunks_change_no_bit(c: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is done entry by entry, or row by row, or selects; and where sums are exact, of what
    is scaled by them. Five experts and more only with chunks of multiples of 16 entries: torch.sum
    over five rows or more has another order for the columns behind the last 16. (Model Stock adds
    pairs of experts, of which four have six.)"""
    kinds = ["levels"] if weighs(c) else ["levels", "near"]
    for shape, size, kind in pairwise(SHAPES, [64, 41], kinds):
        count = max(n for n in c.counts if (n < 5 or size % 16 == 0) and (n < 4 or not by_row(c)))
        base, experts = draw(kind, shape, [BF16, FP32], count)
        chunks_of(1 << 18, monkeypatch)
        whole = ours(c, experts, base, out_dtype=FP32)
        chunks_of(size, monkeypatch)
        assert same(ours(c, experts, base, out_dtype=FP32), whole), f"{kind} {shape} by {size}"


LARGE = [
    case("model_stock", 3, filter_wise=False),
    case("sce", 3, select_topk=1.0),
    case("sce", 3, select_topk=0.5),
    case("slerp", 1, t=0.4),
    case("nuslerp", 2, weight=[0.4, 0.3], nuslerp_flatten=True, nuslerp_row_wise=False),
    case("nuslerp", 2, base=False, weight=[0.4, 0.3], nuslerp_flatten=True, nuslerp_row_wise=False),
    case("nuslerp", 2, weight=[0.4, 0.3], nuslerp_flatten=False, nuslerp_row_wise=True),
    case("multislerp", 3, weight=WEIGHT, normalize_weights=True, eps=1e-8),
    case("multislerp", 3, base=False, weight=WEIGHT, normalize_weights=True, eps=1e-8),
    case("karcher", 3, base=False, max_iter=10, tol=1e-5),
    task("ties", 3, normalize=True, rescale=True),
    task("breadcrumbs", 3, rescale=True),
    task("breadcrumbs_ties", 3, rescale=True),
    *(c for c in RANDOM if weighs(c)),
]


@pytest.mark.parametrize("c", LARGE, ids=str)
def test_chunks_move_last_bits_of_sums_only(
    c: Case, monkeypatch: pytest.MonkeyPatch, stable_mergekit: None
) -> None:
    """A matrix of (600, 896), three chunks, from a base and experts in bfloat16 that are near each other
    (0.02 and 0.0005 from 0 and from the base), against mergekit in float32 (of what is random, against
    one chunk):

    - rounded to bfloat16, fewer than 1 entry in 1,000 differs, by at most a unit in the last place of
      the larger of |base| and |result|;
    - in float32, the mean absolute error against the result in float64 is at most 1.5 times
      mergekit's, and an eighth of float32's rounding (2**-27 of the mean magnitude).
    """
    base, experts = draw("near", (600, 896), [BF16], c.counts[0])
    several = ours(c, experts, base, out_dtype=FP32)
    chunks_of(1 << 20, monkeypatch)
    exact = ours(c, experts, base, dtype=FP64, out_dtype=FP64)
    if c in RANDOM:
        reference = ours(c, experts, base, out_dtype=FP32)
    else:
        where = {"base": base if c.base else None, "out_dtype": FP32}
        reference = theirs(c.method, experts, c.of(len(experts)), **where)

    a, b = several.to(BF16).double(), reference.to(BF16).double()
    assert (a != b).double().mean() < 1e-3
    place = torch.floor(torch.log2(torch.maximum(b.abs(), base.double().abs()).clamp(min=2.0**-126)))
    assert bool(((a - b).abs() <= 2.0 ** (place - 7)).all())

    error, usual = ((x.double() - exact).abs().mean() for x in (several, reference))
    assert error <= 1.5 * usual + 2.0**-27 * exact.abs().mean()


def test_a_tensor_without_entries_is_merged_to_one() -> None:
    for c in ALL:
        experts = [torch.empty(0, 4)] * c.counts[0]
        assert ours(c, experts, torch.empty(0, 4)).shape == (0, 4), c


# ---------------------------------------------------------------- nothing is left behind


@pytest.mark.parametrize("c", ALL, ids=str)
def test_inputs_stay_as_they_are(c: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the dtype of the arithmetic too, where a copy could be saved."""
    for size, dtypes in ((1 << 18, [FP32]), (1 << 18, [BF16]), (100, [FP32])):
        chunks_of(size, monkeypatch)
        base, experts = draw("levels", (24, 32), dtypes, c.counts[-1])
        before = [x.clone() for x in (base, *experts)]
        ours(c, experts, base)
        assert all(same(x, y) for x, y in zip((base, *experts), before, strict=True))


def test_buffers_carry_nothing_from_one_tensor_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks_of(100, monkeypatch)
    shared = Buffers()
    for shape in ((24, 32), (7,), (40, 30), (2, 3, 4)):
        for c in ALL:
            base, experts = draw("near", shape, [BF16, FP32], c.counts[-1])
            alone = ours(c, experts, base, out_dtype=FP32)
            assert same(ours(c, experts, base, out_dtype=FP32, buffers=shared), alone), f"{c} {shape}"


@pytest.mark.parametrize("c", ALL, ids=str)
def test_memory_to_spare_changes_no_bit(c: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks_of(100, monkeypatch)
    for kind in ("near", "levels"):
        base, experts = draw(kind, (24, 32), [BF16, FP32], c.counts[-1])
        results = [ours(c, experts, base, out_dtype=FP32, spare=spare) for spare in (0, 1 << 28)]
        assert same(*results), kind


@pytest.mark.parametrize(
    "method",
    ["sce", "ram", "ramplus_tl", "task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties", "dare_linear",
     "dare_ties", "della", "della_linear"],
)  # fmt: skip
def test_without_experts_the_base_comes_out(method: str) -> None:
    base, _ = draw("levels", (24, 32), [BF16], 0)
    c = next(c for c in CASES if c.method == method)
    merged = kernels.merge_tensors(method, [], c.of(0), base=base, out_dtype=BF16)
    assert same(merged, base)
    assert same(theirs(method, [], c.of(0), base=base, out_dtype=BF16), base)


def test_views_are_merged_as_what_they_show() -> None:
    base, experts = draw("near", (24, 32), [FP32], 3)
    c = task("ties", 3, rescale=True)
    apart = [x.t().contiguous().t() for x in (base, *experts)]
    assert not apart[0].is_contiguous()
    assert same(ours(c, apart[1:], apart[0]), ours(c, experts, base))
