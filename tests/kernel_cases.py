"""The merge kernels' cases: every method with parameters of all kinds, and inputs for them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mergelab.merging import kernels
from mergelab.merging.kernels.buffers import Buffers
from mergelab.merging.kernels.tensor_group import CHUNK, Group

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def chunks_of(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of so many entries from now on."""
    for kind in tuple(CHUNK):
        monkeypatch.setitem(CHUNK, kind, size)


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
            task(method, 1, 3, density=[0.0, 0.4, 1.0], rescale=True),
        )
    ),
    task("breadcrumbs", 3, gamma=[0.9, 0.0, 0.5], density=[0.5, 0.999, 0.05]),
    *(
        setting
        for method in ("dare_linear", "dare_ties", "della_linear", "della")
        for setting in (
            task(method, 1, 3, density=WHOLE, rescale=True),
            task(method, 2, 4, density=WHOLE, weight=SIGNED, normalize=True, scale=0.7),
            task(method, 1, 3, density=[0.0, 1.0, 0.0], rescale=True),
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


def in_turn(cases: Sequence[Case], things: Sequence[Any]) -> list[tuple[Case, list[Any]]]:
    """Each case with some of the things: each method meets every thing, by one of its cases."""
    methods: dict[str, list[Case]] = defaultdict(list)
    for c in cases:
        methods[c.method].append(c)
    out = []
    for own in methods.values():
        count = max(len(own), len(things))
        met = [(own[i % len(own)], things[i % len(things)]) for i in range(count)]
        out += [(c, [thing for other, thing in met if other is c]) for c in own]
    return out


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
