"""The kernels against mergekit, tensor by tensor: the same bits."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import BF16, CASES, FP16, FP32, FP64, WEIGHT, Case, case, draw, same, theirs
from kernel_cases import one_thread as one_thread  # a fixture
from pairwise import pairwise
from torch import Tensor

from mergelab.merging import kernels


def test_every_kernel_has_a_case() -> None:
    assert {c.method for c in CASES} == set(kernels.KERNELS)


DTYPES = {
    "bf16": ([BF16], BF16),
    "fp16": ([FP16], FP16),
    "fp32": ([FP32], FP32),
    "mixed": ([BF16, FP32, FP16], BF16),
}
"""Of the base and the experts in turn, and of the result."""

SMALL = [(1,), (7,), (3, 1), (2, 3, 4)]
KINDS = [((24, 32), k) for k in ("near", "apart", "far", "levels", "partly", "still")]
KINDS += [(shape, k) for shape in SMALL for k in ("near", "levels")] + [((), "near")]


def takes(c: Case, kind: str) -> bool:
    """Of experts that are the base mergekit's multislerp raises, or has no number; see below."""
    return kind != "still" or c.method != "multislerp" or not c.base


ROWS = pairwise(CASES, KINDS, list(DTYPES), range(4))
"""A case, what its inputs are, of which dtypes, and which of its numbers of experts."""


@pytest.mark.parametrize("c", CASES, ids=str)
def test_same_bits_as_mergekit(c: Case, stable_mergekit: None) -> None:
    """Tensors of one chunk, in float32 arithmetic."""
    changed = False
    for own, (shape, kind), dtypes, number in ROWS:
        if own is not c or not takes(c, kind):
            continue
        (inputs, out_dtype), count = DTYPES[dtypes], c.counts[number % len(c.counts)]
        base, experts = draw(kind, shape, inputs, count)
        where = {"base": base if c.base else None, "out_dtype": out_dtype}
        merged = kernels.merge_tensors(c.method, experts, c.of(count), **where)
        expected = theirs(c.method, experts, c.of(count), **where)
        assert bool(expected.isfinite().all())
        assert same(merged, expected), f"{kind} {shape} of {count}, {dtypes}"
        changed |= not torch.equal(merged, base.to(out_dtype))
    assert changed or c.parameters.get("t") == 0


@pytest.mark.parametrize("c", CASES, ids=str)
def test_same_bits_as_mergekit_in_float64(c: Case, stable_mergekit: None) -> None:
    """Without near-ties: mergekit sorts magnitudes in float32, whatever the arithmetic."""
    for kind, dtypes in (("near", [FP32]), ("far", [FP32, BF16])):
        for shape in ((24, 32), (2, 5, 6)):
            base, experts = draw(kind, shape, dtypes, c.counts[-1])
            where = {"base": base if c.base else None, "dtype": FP64, "out_dtype": FP64}
            merged = kernels.merge_tensors(c.method, experts, c.of(len(experts)), **where)
            assert same(merged, theirs(c.method, experts, c.of(len(experts)), **where)), kind


OPPOSED = torch.tensor([[1.0, -2.0, 3.0, 0.5], [0.25, 0.0, -1.0, 2.0]])
"""A direction; its opposite is exact."""


@pytest.mark.parametrize(
    ("c", "experts"),
    [
        (case("model_stock", filter_wise=False), [2 * OPPOSED, 0.5 * OPPOSED]),
        (case("model_stock", filter_wise=True), [2 * OPPOSED, 0.5 * OPPOSED]),
        (case("slerp", t=0.3), [-OPPOSED]),
        (case("nuslerp", base=False, weight=[0.5, 0.2], nuslerp_flatten=True, nuslerp_row_wise=False),
         [OPPOSED, -OPPOSED]),
        (case("nuslerp", base=False, weight=[0.5, 0.2], nuslerp_flatten=False, nuslerp_row_wise=True),
         [OPPOSED, -OPPOSED]),
        (case("multislerp", base=False, weight=[0.5, 0.5], normalize_weights=True, eps=1e-8),
         [OPPOSED, -OPPOSED]),
        (case("multislerp", weight=[0.5, 0.5], normalize_weights=True, eps=1e-8), [2 * OPPOSED, 0 * OPPOSED]),
        (case("karcher", base=False, max_iter=10, tol=1e-5), [OPPOSED, -OPPOSED]),
        (case("karcher", base=False, max_iter=10, tol=1e-5), [OPPOSED, 0 * OPPOSED, 3 * OPPOSED]),
        (case("karcher", base=False, max_iter=10, tol=1e-5), [0 * OPPOSED, -0 * OPPOSED]),
    ],
    ids=str,
)  # fmt: skip
def test_directions_that_cancel_out_end_as_in_mergekit(c: Case, experts: list[Tensor]) -> None:
    where = {"base": OPPOSED if c.base else None}
    merged = kernels.merge_tensors(c.method, experts, c.of(len(experts)), **where)
    assert same(merged, theirs(c.method, experts, c.of(len(experts)), **where))
    assert bool(merged.isfinite().all())


def test_multislerp_of_more_directions_that_cancel_out_is_refused_as_in_mergekit() -> None:
    p = {"weight": [0.25] * 4, "normalize_weights": True, "eps": 1e-8}
    experts = [OPPOSED, -OPPOSED, 2 * OPPOSED, -2 * OPPOSED]
    for merge in (kernels.merge_tensors, theirs):
        with pytest.raises(ValueError, match=r"weights"):
            merge("multislerp", experts, p)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_multislerp_of_experts_that_are_the_base_is_the_base(count: int) -> None:
    """mergekit refuses that of more than two; a frozen norm is no reason to stop a merge."""
    base, experts = draw("still", (24, 32), [BF16], count)
    p = {"weight": WEIGHT[:count], "normalize_weights": True, "eps": 1e-8}
    assert same(kernels.merge_tensors("multislerp", experts, p, base=base), base)


def test_sce_selects_as_many_as_mergekit(stable_mergekit: None) -> None:
    """The number is a product in float32: 0.29 of 100 entries are 29, not int(28.999999999999996)."""
    base, experts = draw("far", (10, 10), [FP32], 2)
    for share in (0.29, 0.57, 0.58):
        p = {"select_topk": share}
        merged = kernels.merge_tensors("sce", experts, p, base=base)
        assert same(merged, theirs("sce", experts, p, base=base)), share


@pytest.mark.parametrize("count", [3, 5, 7])
def test_sce_sees_no_difference_between_equal_experts_in_float64(count: int, stable_mergekit: None) -> None:
    """Their task vectors need all 53 bits, so that count * x / count is not always x."""
    base = draw("far", (1000,), [FP32], 1)[0] * 3e-9
    experts = [draw("far", (1000,), [FP32], 1, seed=1)[0]] * count
    where = {"base": base, "dtype": FP64, "out_dtype": FP64}
    merged = kernels.merge_tensors("sce", experts, {"select_topk": 0.5}, **where)
    assert same(merged, theirs("sce", experts, {"select_topk": 0.5}, **where))
    assert same(merged, base.double())


def test_sce_has_torchs_variances_in_float64(stable_mergekit: None) -> None:
    """Of few values: where variances are equal but for their last bit, that bit selects."""
    for count in (3, 5):
        for seed in range(10):
            base, experts = draw("levels", (24, 32), [FP32], count, seed)
            where = {"base": base, "dtype": FP64, "out_dtype": FP64}
            merged = kernels.merge_tensors("sce", experts, {"select_topk": 0.3}, **where)
            assert same(merged, theirs("sce", experts, {"select_topk": 0.3}, **where)), f"{count} {seed}"


@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("shape", [(7,), (5, 9), (2, 3, 4), (300,)])
def test_model_stock_adds_many_experts_in_their_order(
    shape: tuple[int, ...], filter_wise: bool, stable_mergekit: None
) -> None:
    """torch.sum over five rows or more has an order of its own for the last few columns."""
    for count in (5, 6, 9):
        for seed in range(3):
            base, experts = draw("far", shape, [FP32], count, seed)
            merged = kernels.merge_tensors("model_stock", experts, {"filter_wise": filter_wise}, base=base)
            expected = theirs("model_stock", experts, {"filter_wise": filter_wise}, base=base)
            assert same(merged, expected), f"{count} {seed}"


@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_karcher_does_not_depend_on_where_a_row_starts_in_memory(
    dtype: torch.dtype, stable_mergekit: None
) -> None:
    for shape in ((7,), (33,), (3, 1), (5, 9), (1001,)):
        for count in (2, 3, 4, 5):
            _, experts = draw("far", shape, [FP32], count)
            p = {"max_iter": 10, "tol": 1e-5}
            merged = kernels.merge_tensors("karcher", experts, p, dtype=dtype, out_dtype=dtype)
            expected = theirs("karcher", experts, p, dtype=dtype, out_dtype=dtype)
            assert same(merged, expected), f"{shape} of {count}"


def test_ramplus_grows_by_a_float32_number_in_float64_too(stable_mergekit: None) -> None:
    for kind in ("near", "levels", "partly"):
        base, experts = draw(kind, (24, 32), [FP32], 3)
        p = {"r": 0.1, "alpha": 0.7, "epsilon": 1e-3}
        where = {"base": base, "dtype": FP64, "out_dtype": FP64}
        merged = kernels.merge_tensors("ramplus_tl", experts, p, **where)
        assert same(merged, theirs("ramplus_tl", experts, p, **where)), kind
