"""The kernels against mergekit, against themselves in other pieces, and against what is known of them:
the order of a sorted tensor, the moments of uniform numbers, the probability of being kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from mergelab.merging import kernels
from mergelab.merging.kernels import noise, select
from mergelab.merging.kernels.group import CHUNK, Buffers, Group

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def chunk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`chunk(64)`: pieces of 64 entries from now on."""

    def of(size: int) -> None:
        for kind in tuple(CHUNK):
            monkeypatch.setitem(CHUNK, kind, size)

    return of


# ---------------------------------------------------------------- the cases


@dataclass(frozen=True)
class Case:
    """A method with parameters; lists are for each expert, cut to as many as there are."""

    method: str
    counts: tuple[int, ...]
    parameters: dict[str, Any]
    base: bool

    def of(self, count: int) -> dict[str, Any]:
        """The parameters for so many experts."""
        return {k: v[:count] if isinstance(v, list) else v for k, v in self.parameters.items()}

    def __str__(self) -> str:
        said = (f"{k}={v}".replace(" ", "") for k, v in self.parameters.items() if TASK.get(k) != v)
        return "-".join([self.method, *said, *([] if self.base else ["no_base"])])


WEIGHT = [0.4, 0.3, 0.5, 0.2, 0.7]
SIGNED = [0.5, -0.25, 0.75, -0.1, 0.3]
TASK: dict[str, Any] = {
    "weight": WEIGHT,
    "density": [0.5, 0.37, 0.9, 1.0, 0.001],
    "gamma": [0.01, 0.05, 0.3, 0.02, 0.0],
    "epsilon": [0.1, 0.05, 0.02, 0.1, 0.0],
    "lambda": 1.0,
    "normalize": False,
    "rescale": False,
    "rescale_to": "l1",
}
"""What the methods on task vectors take; a case says what it sets otherwise."""


def case(method: str, *counts: int, base: bool = True, **parameters: Any) -> Case:
    return Case(method, counts, parameters, base)


def task(method: str, *counts: int, **parameters: Any) -> Case:
    parameters = {"lambda" if k == "scale" else k: v for k, v in parameters.items()}
    return Case(method, counts, TASK | parameters, base=True)


WHOLE = [1.0] * 5
CASES = [
    case("linear", 1, 3, 5, base=False, weight=WEIGHT, normalize=True),
    case("linear", 2, 4, base=False, weight=SIGNED, normalize=True),
    case("linear", 1, 3, base=False, weight=SIGNED, normalize=False),
    case("passthrough", 1, base=False, scale=[None]),
    case("passthrough", 1, base=False, scale=[-0.3]),
    case("nearswap", 1, t=0.001),
    case("nearswap", 1, t=2e-6),
    case("nearswap", 1, t=0.0),
    case("model_stock", 2, 3, 4, filter_wise=False),
    case("model_stock", 2, 3, 4, filter_wise=True),
    case("sce", 1, 2, 3, 5, select_topk=1.0),
    case("sce", 1, 2, 3, 5, select_topk=0.5),
    case("sce", 2, 4, select_topk=0.01),
    case("sce", 3, select_topk=0.4, int8_mask=True),
    case("ram", 1, 2, 3, 5, epsilon=1e-5),
    case("ram", 2, 4, epsilon=2e-3),
    case("ram", 3, epsilon=0.0),
    case("ramplus_tl", 1, 2, 3, 5, r=0.1, alpha=0.2, epsilon=1e-5),
    case("ramplus_tl", 2, 4, r=0.3, alpha=0.7, epsilon=2e-3),
    case("arcee_fusion", 1),
    *(case("slerp", 1, t=t) for t in (0.0, 0.4, 1.0, 1.3)),
    *(
        case("nuslerp", 2, base=base, weight=weight, nuslerp_flatten=flatten, nuslerp_row_wise=columns)
        for base in (True, False)
        for flatten, columns in ((True, False), (False, False), (False, True))
        for weight in ([0.4, 0.3], [0.5, -0.5], [-0.4, 0.9])
    ),
    *(
        case("multislerp", *counts, base=base, weight=weight, normalize_weights=normalize, eps=1e-8)
        for base in (True, False)
        for counts, weight, normalize in (
            ((1, 2, 3, 5), WEIGHT, True), ((2, 4), SIGNED, True), ((3,), SIGNED, False),
        )
    ),
    case("karcher", 1, 2, 3, 5, base=False, max_iter=10, tol=1e-5),
    case("karcher", 2, 4, base=False, max_iter=1, tol=1e-3),
    case("karcher", 3, base=False, max_iter=0, tol=1e-5),
    case("karcher", 3, base=False, max_iter=10, tol=0.1),
    task("task_arithmetic", 1, 2, 3, 5),
    task("task_arithmetic", 3, 4, weight=SIGNED, normalize=True, scale=0.7),
    task("task_arithmetic", 2, weight=[0.5, -0.5], normalize=True),
    *(
        setting
        for method in ("ties", "breadcrumbs", "breadcrumbs_ties")
        for setting in (
            task(method, 1, 2, 3, 5),
            task(method, 3, 5, rescale=True, normalize=True, scale=0.7),
            task(method, 2, 4, weight=SIGNED, normalize=True, int8_mask=True),
            task(method, 3, density=[1.0, 1e-3, 0.2], weight=[-0.4, -0.3, -0.5], scale=-0.5),
        )
    ),
    task("breadcrumbs", 3, gamma=[0.9, 0.0, 0.5], density=[0.5, 0.999, 0.05]),
    *(
        setting
        for method in ("dare_linear", "dare_ties", "della_linear", "della")
        for setting in (
            task(method, 1, 3, density=WHOLE, rescale=True),
            task(method, 2, 4, density=WHOLE, weight=SIGNED, normalize=True, scale=0.7),
        )
    ),
]  # fmt: skip
"""Every method; of the random ones what is not random. mergekit gives the same bits in each."""

RANDOM = [
    task(method, 1, 3, density=[0.5, 0.37, 0.6], epsilon=[0.1, 0.05, 0.2], rescale=rescale, rescale_to=to)
    for method in ("dare_linear", "dare_ties", "della_linear", "della")
    for rescale, to in ((False, "l1"), (True, "l1"), (True, "density"))
]
ALL = CASES + RANDOM


def test_there_is_a_case_for_every_method() -> None:
    from mergekit.merge_methods import registered_methods

    assert {c.method for c in CASES} == set(kernels.KERNELS)
    assert set(kernels.KERNELS) == {m.spec.name for m in registered_methods()}


def draw(
    kind: str, shape: tuple[int, ...], dtypes: Sequence[torch.dtype], count: int, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """A base and experts.

    Kinds:
        near: fine-tuned from the base; in 16 bits the task vectors have many equal magnitudes.
        apart: the cosine with the base is 0.998.
        far: nothing in common.
        levels: few values; every sum over them is exact; -0.0 wherever the base or an expert is 0.
        partly: levels, of which every other expert is the base.
        still: levels, all experts the base.
    """
    g = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=g).float()

    def negative_zero(x: Tensor) -> Tensor:
        return torch.where(x == 0, torch.tensor(-0.0), x)

    if kind == "near":
        base = torch.randn(shape, generator=g) * 0.02
        start = base.to(dtypes[0]).float()
        experts = [start + 5e-4 * torch.randn(shape, generator=g) for _ in range(count)]
    elif kind == "apart":
        base = torch.randn(shape, generator=g)
        experts = [base + 0.06 * torch.randn(shape, generator=g) for _ in range(count)]
    elif kind == "far":
        base = torch.randn(shape, generator=g)
        experts = [torch.randn(shape, generator=g) for _ in range(count)]
    else:
        base = negative_zero(whole(-2, 2) / 64)
        moved = [kind == "levels" or (kind == "partly" and i % 2 == 1) for i in range(count)]
        experts = [negative_zero(base + whole(-2, 2) / 256) if m else base.clone() for m in moved]
    return base.to(dtypes[0]), [e.to(dtypes[(i + 1) % len(dtypes)]) for i, e in enumerate(experts)]


def same(a: Tensor, b: Tensor) -> bool:
    """The same shape, type and bits: -0.0 is not 0.0."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(whole), b.view(whole))


def ours(
    c: Case,
    experts: Sequence[Tensor],
    base: Tensor,
    *,
    dtype: torch.dtype = FP32,
    out_dtype: torch.dtype | None = None,
    name: str = "layer",
    keys: Sequence[str] = (),
    seed: int = 0,
    buffers: Buffers | None = None,
    spare: int = 1 << 28,
    **parameters: Any,
) -> Tensor:
    """`kernels.merge_tensors`, with what a worker of the engine sets besides."""
    start_from = base if c.base else None
    group = Group(name, experts, start_from, keys, seed, dtype, buffers or Buffers(), spare)
    out = torch.empty(group.numel, dtype=out_dtype or experts[0].dtype, device=group.buffers.device)
    for start, piece in kernels.merge(kernels.KERNELS[c.method], group, c.of(len(experts)) | parameters):
        out[start : start + piece.numel()].copy_(piece)
    return out.view(group.shape)


# ---------------------------------------------------------------- the same bits as mergekit


def theirs(
    method: str,
    experts: Sequence[Tensor],
    parameters: dict[str, Any],
    *,
    base: Tensor | None = None,
    dtype: torch.dtype = FP32,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """What `kernels.merge_tensors` does, by mergekit."""
    from mergekit.merge_methods import get
    from mergekit.merge_methods.api import merge_tensors

    first = 0 if base is None else 1
    known = {p.name for p in get(method).spec.parameters}
    merged: Tensor = merge_tensors(
        [*([] if base is None else [base]), *experts], method, base_index=None if base is None else 0,
        parameters={k: dict(enumerate(v, first)) if isinstance(v, list) else v
                    for k, v in parameters.items() if k in known},
        dtype=dtype, out_dtype=out_dtype or experts[0].dtype,
    )  # fmt: skip
    return merged


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


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("c", CASES, ids=str)
def test_same_bits_as_mergekit(c: Case, dtypes: str, stable_mergekit: None) -> None:
    """Tensors of one chunk, in float32 arithmetic."""
    inputs, out_dtype = DTYPES[dtypes]
    changed = False
    for shape, kind in ((s, k) for s, k in KINDS if takes(c, k)):
        for count in c.counts:
            base, experts = draw(kind, shape, inputs, count)
            where = {"base": base if c.base else None, "out_dtype": out_dtype}
            merged = kernels.merge_tensors(c.method, experts, c.of(count), **where)
            expected = theirs(c.method, experts, c.of(count), **where)
            assert bool(expected.isfinite().all())
            assert same(merged, expected), f"{kind} {shape} of {count}"
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


@pytest.mark.parametrize("size", [64, 41])
@pytest.mark.parametrize("c", [c for c in ALL if c.method not in SUMS or by_row(c)], ids=str)
def test_chunks_change_no_bit(c: Case, size: int, chunk: Callable[[int], None]) -> None:
    """Of what is done entry by entry, or row by row, or selects; and where sums are exact, of what
    is scaled by them. Five experts and more only with chunks of multiples of 16 entries: torch.sum
    over five rows or more has another order for the columns behind the last 16. (Model Stock adds
    pairs of experts, of which four have six.)"""
    for kind in ("levels",) if weighs(c) else ("levels", "near"):
        for shape in ((24, 32), (23, 31), (999,), (2, 30, 5)):
            count = max(n for n in c.counts if (n < 5 or size % 16 == 0) and (n < 4 or not by_row(c)))
            base, experts = draw(kind, shape, [BF16, FP32], count)
            chunk(1 << 18)
            whole = ours(c, experts, base, out_dtype=FP32)
            chunk(size)
            assert same(ours(c, experts, base, out_dtype=FP32), whole), f"{kind} {shape}"


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
    c: Case, chunk: Callable[[int], None], stable_mergekit: None
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
    chunk(1 << 20)
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
def test_inputs_stay_as_they_are(c: Case, chunk: Callable[[int], None]) -> None:
    """In the dtype of the arithmetic too, where a copy could be saved."""
    for size, dtypes in ((1 << 18, [FP32]), (1 << 18, [BF16]), (100, [FP32])):
        chunk(size)
        base, experts = draw("levels", (24, 32), dtypes, c.counts[-1])
        before = [x.clone() for x in (base, *experts)]
        ours(c, experts, base)
        assert all(same(x, y) for x, y in zip((base, *experts), before, strict=True))


def test_buffers_carry_nothing_from_one_tensor_to_the_next(chunk: Callable[[int], None]) -> None:
    chunk(100)
    shared = Buffers()
    for shape in ((24, 32), (7,), (40, 30), (2, 3, 4)):
        for c in ALL:
            base, experts = draw("near", shape, [BF16, FP32], c.counts[-1])
            alone = ours(c, experts, base, out_dtype=FP32)
            assert same(ours(c, experts, base, out_dtype=FP32, buffers=shared), alone), f"{c} {shape}"


@pytest.mark.parametrize("c", ALL, ids=str)
def test_memory_to_spare_changes_no_bit(c: Case, chunk: Callable[[int], None]) -> None:
    chunk(100)
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


# ---------------------------------------------------------------- another device


class Elsewhere(Tensor):
    """A tensor that says it is on another device, and computes on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device="lazy",
        )  # fmt: skip
        made.inner = inner
        return made

    def __init__(self, inner: Tensor) -> None:
        pass

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Elsewhere({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{f} outside of the mode")


class Elsewheres(TorchDispatchMode):
    """What torch asks of a second device: the tensors of an operation lie together, but for copies and
    for numbers of no dimension among entry-by-entry operands. Notes what is copied from it."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[Tensor] = []

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [x for x in tensors if isinstance(x, Elsewhere)]
        here = [x for x in tensors if not isinstance(x, Elsewhere)]
        copies = f in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
        if there and here and not copies:
            written = args[0] if f._schema.is_mutable and "out" not in kwargs else kwargs.get("out")
            numbers = all(x.dim() == 0 and x is not written for x in here)
            assert numbers and torch.Tag.pointwise in f.tags, f"{f} between two devices"
        away = device.type == "lazy" if device is not None else bool(there)
        if copies and there and not (away and args[0] is there[0]):
            self.fetched += there
        result = f(*tree_map(uncover, args), **tree_map(uncover, kwargs))
        known = {id(x.inner): x for x in there} | {id(x): x for x in here}

        def cover(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return known[id(x)] if id(x) in known else Elsewhere(x) if away else x

        assert all(x.shape == x.inner.shape for x in there), f"{f} has changed a shape in place"
        return tree_map(cover, result)


def uncover(x: Any) -> Any:
    return x.inner if isinstance(x, Elsewhere) else x


class Factories(TorchFunctionMode):
    """torch.tensor and torch.as_tensor, which no dispatch mode sees."""

    def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if f in (torch.tensor, torch.as_tensor) and str(kwargs.get("device")) == "lazy":
            return Elsewhere(f(*args, **(kwargs | {"device": None})))
        return f(*args, **kwargs)


def test_two_devices_are_told_apart() -> None:
    x, number = torch.arange(4.0), torch.tensor(2.0)
    with Factories(), Elsewheres() as mode:
        there = torch.empty(4, device="lazy").copy_(x)
        assert there.device.type == "lazy"
        assert (there * number + 1).inner.tolist() == [1, 3, 5, 7]
        assert torch.tensor([1.0], device="lazy").device.type == "lazy"
        assert torch.zeros_like(there)[1:].device.type == "lazy"
        assert not mode.fetched
        assert there.to("cpu").tolist() == x.tolist()
        x.copy_(there)
        assert len(mode.fetched) == 2
        for wrong in (
            lambda: there + x,
            lambda: x.add_(there),
            lambda: number.mul_(there[0]),
            lambda: torch.stack([number, there[0]]),
            lambda: torch.mul(there, 2, out=x),
        ):
            with pytest.raises(AssertionError, match="between two devices"):
                wrong()


@pytest.mark.parametrize("c", ALL, ids=str)
def test_kernels_compute_on_one_device(c: Case, chunk: Callable[[int], None]) -> None:
    """No operation mixes tensors of the group's device with those of the CPU, the results are those of
    the CPU, and only numbers and histograms (of `select`) are fetched.

    The device is made up. This proves where tensors are created and which way they go, branches for
    other devices included; not that CUDA has each operation for each dtype, nor what its sums are.
    """
    chunk(150)
    for kind, shape in (("near", (24, 32)), ("levels", (2, 3, 40)), ("partly", (210,))):
        base, experts = draw(kind, shape, [BF16, FP32], c.counts[-1])
        expected = ours(c, experts, base, out_dtype=FP32)
        with Factories(), Elsewheres() as mode:
            merged = ours(c, experts, base, out_dtype=FP32, buffers=Buffers("lazy"))
        assert isinstance(merged, Elsewhere)
        assert same(merged.inner, expected)
        assert all(x.dim() == 0 or (x.dtype, x.numel()) == (torch.int64, 1 << 16) for x in mode.fetched)


# ---------------------------------------------------------------- selection


def magnitudes(x: Tensor) -> Tensor:
    return select.magnitudes(x, out=torch.empty_like(x))


def scan(columns: Sequence[Tensor], piece: int) -> select.Scan:
    def pieces() -> Iterable[tuple[int, list[Tensor]]]:
        for start in range(0, len(columns[0]), piece):
            yield start, [c[start : start + piece] for c in columns]

    return pieces


N = 3000


def columns(dtype: torch.dtype) -> list[Tensor]:
    """Random, constant, of few values, of all sizes, with every special number."""
    g = torch.Generator().manual_seed(0)
    random = torch.randn(N, generator=g, dtype=dtype)
    few = torch.randint(-3, 4, (N,), generator=g).to(dtype) / 8
    info = torch.finfo(dtype)
    special = torch.tensor([0.0, info.tiny / 8, info.tiny, info.eps, 1.0, info.max, math.inf], dtype=dtype)
    return [
        random,
        torch.full((N,), -0.1, dtype=dtype),
        few,
        random * 2.0 ** torch.randint(-100, 100, (N,), generator=g).to(dtype),
        special[torch.randint(0, len(special), (N,), generator=g)] * random.sign(),
        random.to(BF16).to(dtype),
    ]


RANKS = [0, 1, 17, N // 4, N // 2, N // 2, N - 2, N - 1]


@pytest.mark.parametrize("piece", [N, 700, 64])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_locate_finds_what_a_stable_sort_puts_there(dtype: torch.dtype, signed: bool, piece: int) -> None:
    data = [(x + 0.0) if signed else x.abs() for x in columns(dtype)]  # + 0.0: no -0.0 among the zeros
    keys = [select.ordered(x) if signed else magnitudes(x) for x in data]
    ranks = [RANKS[i:] for i in range(len(data))]
    width = 8 * dtype.itemsize
    found = select.locate(scan(keys, piece), ranks, width, signed=signed)
    asked, there = [], []
    for x, column, at in zip(data, ranks, found, strict=True):
        values, order = torch.sort(x, stable=True)
        for rank, place in zip(column, at, strict=True):
            v = select.signed_value(place.key, dtype) if signed else select.value(place.key, dtype)
            assert v == values[rank]
            assert place.before == int((x < values[rank]).sum())
            assert place.equal == int((x == values[rank]).sum())
        asked.append([(place.key, rank - place.before) for rank, place in zip(column, at, strict=True)])
        there.append([int(order[rank]) for rank in column])
    assert select.positions(scan(keys, piece), asked) == there


def test_negative_zero_comes_before_zero_and_has_no_magnitude() -> None:
    zeros = torch.tensor([0.0, -0.0, 1e-45, -1e-45])
    assert select.ordered(zeros).argsort().tolist() == [3, 1, 0, 2]
    assert magnitudes(zeros).tolist() == [0, 0, 1, 1]


def test_only_as_much_is_read_as_it_takes_to_find_positions() -> None:
    read: list[int] = []

    def pieces() -> Iterable[tuple[int, list[Tensor]]]:
        for start in range(0, 100, 10):
            read.append(start)
            yield start, [torch.arange(start, start + 10) // 3]

    assert select.positions(pieces, [[(4, 1), (2, 2)]]) == [[13, 8]]
    assert read == [0, 10]
    assert select.positions(pieces, [[], []]) == [[], []]
    assert read == [0, 10]


# ---------------------------------------------------------------- random numbers

KEY = noise.key(0, "model.layers.0.mlp.up_proj.weight", "math")


def numbers(k: noise.Key, start: int, n: int) -> Tensor:
    return noise.bits(k, start, n, Buffers()).clone()


def by_definition(k: noise.Key, i: int) -> int:
    low = (1 << 32) - 1
    x = (i * 0x9E3779B9 + k[0]) & low
    x ^= x >> 16
    x = x * 0x21F0AAAD & low
    x ^= x >> 15
    x = (x ^ k[1]) * 0x735A2D97 & low
    x ^= x >> 15
    return x - (1 << 32) if x >> 31 else x


def test_the_stream_never_changes() -> None:
    """Merges of the past could not be repeated."""
    assert KEY == (447269180, 1089190025)
    first = [831991179, 803711812, -115236506, 1818394669, 1879333004, 1382576656, -539046857, -860810981]
    assert numbers(KEY, 0, 8).tolist() == first
    assert noise.key(3, "a", "é") == (2286407658, 2366411032)


@pytest.mark.parametrize("start", [0, 1, 262144, (1 << 31) - 3, (1 << 31) + 12345, (1 << 32) - 2])
def test_numbers_are_those_of_the_definition(start: int) -> None:
    for k in (KEY, (0, 0), ((1 << 32) - 1, (1 << 32) - 1), (1 << 31, 1 << 31)):
        assert numbers(k, start, 50).tolist() == [by_definition(k, i) for i in range(start, start + 50)]


def test_a_stream_repeats_after_2_to_32() -> None:
    assert torch.equal(numbers(KEY, 1 << 32, 100), numbers(KEY, 0, 100))
    assert not torch.equal(numbers(KEY, 1 << 31, 100), numbers(KEY, 0, 100))


@pytest.mark.parametrize("start", [0, 5, (1 << 31) - 1000])
def test_numbers_do_not_depend_on_pieces(start: int) -> None:
    whole = numbers(KEY, start, 10_000)
    for sizes in ([1, 63, 1000, 7, 4096, 333, 4500], [1] * 100 + [9900], [9999, 1]):
        buffers, pieces, at = Buffers(), [], start
        for n in sizes:
            pieces.append(noise.bits(KEY, at, n, buffers).clone())
            at += n
        assert torch.equal(torch.cat(pieces), whole)


STREAMS = [noise.key(seed, tensor, expert) for seed in (0, 1) for tensor in ("a", "b") for expert in "xy"]
MANY = 1 << 20


@pytest.mark.parametrize("k", STREAMS)
def test_numbers_are_uniform(k: noise.Key) -> None:
    """Mean, variance and serial correlation within 4.5 standard deviations."""
    u = numbers(k, 0, MANY).double() / 2**32  # from -1/2 to 1/2
    assert u.mean().abs() < 4.5 * math.sqrt(1 / 12 / MANY)
    assert (u.square().mean() - 1 / 12).abs() < 4.5 * math.sqrt(1 / 180 / MANY)
    for lag in (1, 2, 3, 4, 16, 896, 4096):
        assert (u[lag:] * u[:-lag]).mean().abs() * 12 < 4.5 / math.sqrt(MANY - lag), lag


@pytest.mark.parametrize("shift", [24, 16, 8, 0])
@pytest.mark.parametrize("k", STREAMS[:3])
def test_every_byte_takes_all_values_alike(k: noise.Key, shift: int) -> None:
    """Chi-square over 256 bins: 255 expected, standard deviation 22.6."""
    counts = torch.bincount((numbers(k, 0, MANY) >> shift) & 255, minlength=256).double()
    chi2 = float((counts - MANY / 256).square().sum() / (MANY / 256))
    assert abs(chi2 - 255) < 4.5 * math.sqrt(2 * 255)


@pytest.mark.parametrize("density", [0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_as_many_numbers_are_below_as_the_probability_says(density: float) -> None:
    for k in STREAMS:
        kept = int((numbers(k, 0, MANY) < noise.below(density)).sum())
        assert abs(kept - density * MANY) < 4 * math.sqrt(density * (1 - density) * MANY), k


def test_bounds_of_probabilities() -> None:
    assert noise.below(0.0) == -(1 << 31)
    assert noise.below(0.5) == 0
    assert noise.below(math.nextafter(1.0, 0.0)) == (1 << 31) - (1 << 16)
    assert noise.below(1e-9) == -(1 << 31) + (1 << 16)
    assert all(noise.below(p / 1000) % (1 << 16) == 0 for p in range(1000))


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_streams_are_independent(density: float) -> None:
    """Masks of other seeds, tensors or experts correlate within 4 standard deviations."""
    masks = [(numbers(k, 0, MANY) < noise.below(density)).double() - density for k in STREAMS]
    for i, a in enumerate(masks):
        for j, b in enumerate(masks[:i]):
            correlation = float((a * b).mean()) / (density * (1 - density))
            assert abs(correlation) < 4 / math.sqrt(MANY), (i, j)


def test_names_that_could_be_confused_have_streams_of_their_own() -> None:
    names = [(1, "2", "3"), (12, "", "3"), (1, "23", ""), (1, "", "23"), (1, '2", "3', ""), (-1, "2", "3")]
    assert len({noise.key(*n) for n in names}) == len(names)


# ---------------------------------------------------------------- random methods

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
    method: str, rescale_to: str, chunk: Callable[[int], None]
) -> None:
    for shape in ((48, 70), (5, 3, 70), (600,)):
        delta = distinct(1, math.prod(shape)).view(shape)
        p: dict[str, Any] = {"density": 0.5, "epsilon": 0.2, "rescale": True, "rescale_to": rescale_to}
        chunk(1 << 18)
        whole = pruned(method, delta, **p) != 0
        assert 0.4 < whole.double().mean() < 0.6
        for size in (1000, 64, 7):  # shorter than a row, too
            chunk(size)
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
