"""The kernels: mergekit's numbers to the bit, exact selection, random masks that are counted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mergelab.merging import kernels
from mergelab.merging.kernels import group as groups
from mergelab.merging.kernels import noise, sparsify
from mergelab.merging.kernels.group import Buffers, Group
from mergelab.merging.kernels.select import locate, magnitudes, ordered, positions, signed_value, value

DECLARED = {"weight": [0.4, 0.3, -0.2, 0.5, 0.1], "density": [0.5, 0.37, 0.9, 1.0, 0.02],
            "gamma": [0.01, 0.05, 0.02, 0.0, 0.1], "epsilon": 0.1, "t": 0.4, "select_topk": 0.5}  # fmt: skip

RANDOM = ("dare_linear", "dare_ties", "della_linear", "della")
ONE, TWO = ("slerp", "nearswap", "arcee_fusion", "passthrough"), ("nuslerp",)

CASES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}), ("linear", {"normalize": False}), ("slerp", {}), ("slerp", {"t": 0.0}),
    ("task_arithmetic", {}), ("task_arithmetic", {"normalize": True, "lambda": 0.7}),
    ("ties", {}), ("ties", {"normalize": False, "lambda": 1.5}), ("ties", {"rescale": True}),
    ("breadcrumbs", {}), ("breadcrumbs", {"rescale": True, "normalize": True}), ("breadcrumbs_ties", {}),
    ("nuslerp", {}), ("nuslerp", {"nuslerp_flatten": False}),
    ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}), ("nuslerp", {"base": False}),
    ("model_stock", {}), ("model_stock", {"filter_wise": True}), ("sce", {}), ("sce", {"select_topk": 1.0}),
    ("multislerp", {}), ("multislerp", {"normalize_weights": False}), ("multislerp", {"base": False}),
    ("karcher", {}), ("karcher", {"max_iter": 1}), ("karcher", {"tol": 0.1}), ("ram", {}),
    ("ram", {"epsilon": 0.0}),
    ("ramplus_tl", {}), ("nearswap", {"t": 0.001}), ("arcee_fusion", {}), ("passthrough", {}),
    ("passthrough", {"scale": 1.5}), *((name, {"density": 1.0}) for name in RANDOM),
]  # fmt: skip
"""Methods with what differs from DECLARED and their defaults; `base: False` leaves an optional base out."""


def case_id(case: Any) -> str:
    name, changes = case
    return "-".join([name, *(f"{k}={v}" for k, v in changes.items())])


def tensors(
    shape: Sequence[int], count: int, dtype: torch.dtype = torch.bfloat16, far: float = 5e-4
) -> list[Tensor]:
    """A base and experts near it: task vectors of bfloat16 models are full of equal magnitudes."""
    random = torch.Generator().manual_seed(1)
    base = (torch.randn(shape, generator=random) * 0.02).to(dtype)
    if base.numel() > 3:
        base.view(-1)[:2] = torch.tensor([-0.0, 0.0], dtype=dtype)
    experts = [(base.float() + far * torch.randn(shape, generator=random)).to(dtype) for _ in range(count)]
    for e in experts if base.numel() > 3 else ():
        e.view(-1)[:1] = base.view(-1)[:1]  # where nobody differs
    return [base, *experts]


def parameters(name: str, changes: dict[str, Any], count: int) -> dict[str, Any]:
    """Every declared parameter, those of each model as lists."""
    from mergekit.merge_methods import get

    out = {}
    for p in get(name).spec.parameters:
        v = DECLARED.get(p.name, None if p.required else p.default)
        if name.startswith("ram") and p.name == "epsilon":
            v = p.default
        v = changes.get(p.name, v)
        if p.scope.value == "shared":
            out[p.name] = v
        else:
            out[p.name] = v[:count] if isinstance(v, list) else [v] * count
    return out


def both(name: str, changes: dict[str, Any], given: list[Tensor], dtype: torch.dtype = torch.float32) -> Any:
    """What mergekit makes of the tensors, and what we make."""
    from mergekit.merge_methods import get
    from mergekit.merge_methods.api import merge_tensors

    count = 1 if name in ONE else 2 if name in TWO else len(given) - 1
    policy = get(name).spec.contract.base.value
    base = given[0] if policy == "required" or (policy == "optional" and changes.get("base", True)) else None
    experts, p = given[1 : 1 + count], parameters(name, changes, count)
    first = 0 if base is None else 1
    theirs = merge_tensors(
        [*([] if base is None else [base]), *experts], name, dtype=dtype, out_dtype=given[1].dtype,
        parameters={k: dict(enumerate(v, first)) if isinstance(v, list) else v for k, v in p.items()},
        base_index=None if base is None else 0,
    )  # fmt: skip
    ours = kernels.merge_tensors(name, experts, {**p, "rescale_to": "l1"}, base=base, dtype=dtype)
    return theirs, ours


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


# ---------------------------------------------------------------- mergekit's numbers


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_same_bits_as_mergekit(case: Any, dtype: torch.dtype, stable_mergekit: None) -> None:
    name, changes = case
    for shape in ((24, 32), (1,), (7,), (3, 1), (5, 300)):
        for count in (3,) if name in (*ONE, *TWO, "model_stock") else (1, 3, 5):
            theirs, ours = both(name, changes, tensors(shape, count, dtype))
            assert same_bits(theirs, ours), (shape, count)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_experts_that_changed_nothing_or_are_far(case: Any, stable_mergekit: None) -> None:
    name, changes = case
    base, *_ = tensors((24, 32), 3)
    for given in ([base, base.clone(), base.clone(), base.clone()], tensors((24, 32), 3, far=0.5)):
        if name == "multislerp" and changes.get("base", True) and given[1].equal(base):
            continue  # mergekit raises; see the next test
        theirs, ours = both(name, changes, given)
        assert same_bits(theirs, ours)


def test_multislerp_leaves_what_nobody_changed() -> None:
    base, *_ = tensors((4, 8), 1)
    with pytest.raises(ValueError):
        both("multislerp", {}, [base, base, base, base])
    p = {**parameters("multislerp", {}, 3), "rescale_to": "l1"}
    assert same_bits(kernels.merge_tensors("multislerp", [base] * 3, p, base=base), base)


def test_inputs_of_different_dtypes(stable_mergekit: None) -> None:
    base, one, two, three = tensors((24, 32), 3, torch.float32)
    for name in ("ties", "linear", "model_stock"):
        theirs, ours = both(name, {}, [base.bfloat16(), one.half(), two, three.bfloat16()])
        assert same_bits(theirs, ours), name


@pytest.mark.parametrize(
    "name", ["linear", "slerp", "task_arithmetic", "nuslerp", "model_stock", "karcher", "sce"]
)
def test_arithmetic_in_float64(name: str, stable_mergekit: None) -> None:
    theirs, ours = both(name, {"select_topk": 1.0}, tensors((24, 32), 3, torch.float32), torch.float64)
    assert same_bits(theirs, ours)


ELEMENTWISE = ("linear", "passthrough", "nearswap", "ram", "ramplus_tl", "task_arithmetic", "ties",
               "breadcrumbs", "breadcrumbs_ties", "arcee_fusion")  # fmt: skip


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "CHUNK", {"cpu": 64})


@pytest.mark.parametrize(
    "case", [c for c in CASES if c[0] in ELEMENTWISE and not c[1].get("rescale")], ids=case_id
)
def test_chunks_change_no_bit(case: Any, stable_mergekit: None, small_chunks: None) -> None:
    """Of methods that add up nothing over a tensor, however many chunks it has."""
    for shape in ((24, 32), (777,), (5, 300)):
        theirs, ours = both(*case, tensors(shape, 3))
        assert same_bits(theirs, ours), shape


SUMS = [c for c in CASES if c[0] not in (*ELEMENTWISE, *RANDOM) or c[1].get("rescale")]


@pytest.mark.parametrize("case", SUMS, ids=case_id)
def test_sums_over_several_chunks(case: Any, stable_mergekit: None) -> None:
    """A tensor of three chunks, written in bfloat16: fewer than 1 entry in 1,000 differs, by a unit in the
    last place of the base or of the result, whichever is larger; and the float32 sums are as near to
    float64's as mergekit's are.
    """
    given = tensors((600, 1000), 3)
    theirs, ours = both(*case, given)
    differ = theirs != ours
    assert float(differ.double().mean()) < 1e-3
    scale = torch.maximum(theirs.abs(), given[0].abs()).double()
    unit = torch.exp2(torch.floor(torch.log2(scale.clamp(min=1e-30))) - 7)
    assert bool(((theirs.double() - ours.double()).abs() <= unit)[differ].all())
    wide = [t.float() for t in given]
    theirs, ours = both(*case, wide)
    exact, _ = both(*case, [t.double() for t in wide], torch.float64)
    error = [float((t.double() - exact).abs().mean()) for t in (ours, theirs)]
    assert error[0] <= 1.5 * error[1] + 1e-12


def test_inputs_are_left_alone_and_a_base_alone_stays() -> None:
    for name in kernels.KERNELS:
        given = tensors((8, 16), 3)
        before = [t.clone() for t in given]
        both(name, {"density": 0.5}, given)
        assert all(same_bits(a, b) for a, b in zip(given, before, strict=True)), name
    for name in (*RANDOM, "ties", "task_arithmetic", "breadcrumbs", "sce", "ram", "ramplus_tl"):
        p = {**parameters(name, {}, 0), "rescale_to": "l1"}
        group = Group("x", [], given[0])
        pieces = [piece.clone() for _, piece in kernels.merge(kernels.KERNELS[name], group, p)]
        assert torch.equal(torch.cat(pieces), given[0].float().view(-1)), name


# ---------------------------------------------------------------- selection


DATA = {
    "normal": lambda n: torch.randn(n),
    "few values": lambda n: torch.randint(-3, 4, (n,)).float(),
    "constant": lambda n: torch.full((n,), 0.25),
    "zeros": lambda n: torch.zeros(n),
    "tiny and huge": lambda n: torch.randn(n) * 10.0 ** torch.randint(-30, 30, (n,)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("kind", DATA)
def test_selection_is_that_of_a_stable_sort(kind: str, signed: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    n = 5000
    columns = [DATA[kind](n).to(dtype), DATA["normal"](n).to(dtype)]

    def keys(x: Tensor) -> Tensor:
        return ordered(x) if signed else magnitudes(x, out=torch.empty_like(x)).clone()

    def scan() -> Iterator[tuple[int, list[Tensor]]]:
        for start in range(0, n, 777):
            yield start, [keys(x[start : start + 777].clone()) for x in columns]

    ranks = [0, 1, 17, n // 2, n - 2, n - 1]
    found = locate(scan, [ranks, ranks[2:]], 64 if dtype == torch.float64 else 32, signed)
    for x, wanted, column in zip(columns, (ranks, ranks[2:]), found, strict=True):
        values, order = torch.sort(x if signed else x.abs(), stable=True)
        for rank, at in zip(wanted, column, strict=True):
            assert float(signed_value(at.key, dtype) if signed else value(at.key, dtype)) == float(
                values[rank]
            )
            before = int((values < values[rank]).sum())
            equal = int((values == values[rank]).sum())
            if not (signed and float(values[rank]) == 0):  # -0.0 comes before 0.0 there
                assert (at.before, at.equal) == (before, equal)
                asked = [[(at.key, rank - before)] if c is x else [] for c in columns]
                assert [p for c in positions(scan, asked) for p in c] == [int(order[rank])]


# ---------------------------------------------------------------- random numbers


def test_numbers_are_these() -> None:
    """They may never change: a model is repeated from its seed."""
    k = noise.key(0, "model.layers.0.mlp.up_proj.weight", "math")
    assert noise.bits(k, 0, 4, Buffers()).tolist() == [831991179, 803711812, -115236506, 1818394669]
    assert noise.key(0, "a", "b") != noise.key(0, "ab", "")


def test_numbers_are_the_mixer_that_the_module_names() -> None:
    """The same in whole numbers, with 32 bits."""
    k, span = noise.key(5, "x", "y"), 2**32

    def mixed(i: int) -> int:
        x = (i * 0x9E3779B9 + k[0]) % span
        x = (x ^ x >> 16) * 0x21F0AAAD % span
        x = ((x ^ x >> 15) ^ k[1]) * 0x735A2D97 % span
        x ^= x >> 15
        return x - span if x >= span // 2 else x

    assert noise.bits(k, 1000, 50, Buffers()).tolist() == [mixed(i) for i in range(1000, 1050)]


def test_numbers_do_not_depend_on_where_one_starts() -> None:
    k, buffers = noise.key(3, "x", "y"), Buffers()
    whole = noise.bits(k, 0, 10_000, buffers).clone()
    pieces = [noise.bits(k, s, min(777, 10_000 - s), buffers).clone() for s in range(0, 10_000, 777)]
    assert torch.equal(whole, torch.cat(pieces))
    far = 2**31 + 12345
    assert torch.equal(noise.bits(k, far, 9, Buffers())[4:], noise.bits(k, far + 4, 5, Buffers()))


def uniform(k: noise.Key, n: int) -> Tensor:
    return noise.bits(k, 0, n, Buffers()).double() / 2**32 + 0.5


def test_numbers_are_uniform_and_independent() -> None:
    n = 1 << 20
    streams = [
        uniform(noise.key(*k), n) for k in ((0, "t", "a"), (0, "t", "b"), (1, "t", "a"), (0, "u", "a"))
    ]
    for u in streams:
        counts = torch.histc(u.float(), 256, 0, 1).double()
        assert float(((counts - n / 256) ** 2 / (n / 256)).sum()) < 255 + 5 * math.sqrt(2 * 255)
        for lag in (1, 2, 896, 4864):
            assert abs(correlation(u[:-lag], u[lag:])) < 5 / math.sqrt(n)
        for density in (0.01, 0.1, 0.5, 0.9):
            share = float(
                (noise.bits(noise.key(0, "t", "a"), 0, n, Buffers()) < noise.below(density)).double().mean()
            )
            assert abs(share - density) < 5 * math.sqrt(density * (1 - density) / n)
    for i, u in enumerate(streams):
        for v in streams[:i]:
            assert abs(correlation(u, v)) < 5 / math.sqrt(n)
            assert abs(correlation((u < 0.5).double(), (v < 0.5).double())) < 5 / math.sqrt(n)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


# ---------------------------------------------------------------- random methods


def pruned(name: str, given: list[Tensor], keys: Sequence[str] = (), dtype: torch.dtype = torch.float32,
           **changes: Any) -> Tensor:  # fmt: skip
    """What a method with weight 1 and no vote leaves of the one task vector."""
    base, *experts = given
    p = parameters(name, {"weight": 1.0, "normalize": False, **changes}, len(experts))
    p["rescale_to"] = changes.get("rescale_to", "l1")
    merged = kernels.merge_tensors(
        name, experts, p, base=base, name=changes.get("tensor", "t"), keys=keys, seed=changes.get("seed", 0),
        dtype=dtype, out_dtype=torch.float64,
    )  # fmt: skip
    return merged - base.double()


def distinct(rows: int, columns: int) -> list[Tensor]:
    """A base of zeros and an expert whose magnitudes are all different, in float32."""
    values = (
        torch.randperm(rows * columns, generator=torch.Generator().manual_seed(0)).view(rows, columns) + 1.0
    )
    return [torch.zeros(rows, columns), values * (torch.arange(columns) % 2 * 2 - 1)]


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_masks_depend_on_seed_tensor_and_expert_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, one, two, three = tensors((40, 64), 3, torch.float32)
    settings: dict[str, Any] = {"density": 0.5, "rescale": False}

    def kept(**changes: Any) -> Tensor:
        return pruned(name, [base, one], ["a"], **{**settings, **changes}) != 0

    first = kept()
    assert 0.4 < float(first.double().mean()) < 0.6
    for other in (kept(seed=1), kept(tensor="u"), pruned(name, [base, one], ["b"], **settings) != 0):
        assert 0.4 < float((first == other).double().mean()) < 0.6
    assert torch.equal(first, kept(dtype=torch.float64))
    several = [pruned(name, [base, *e], k, **settings) for e, k in
               (([one, two, three], "abc"), ([three, one, two], "cab"))]  # fmt: skip
    torch.testing.assert_close(*several, rtol=0, atol=1e-8)
    monkeypatch.setattr(groups, "CHUNK", {"cpu": 64})
    assert torch.equal(first, kept())
    monkeypatch.setattr(sparsify._Masks, "remember", lambda *_: None)
    assert torch.equal(first, kept())


def test_more_density_only_adds_entries() -> None:
    """What makes the fitness of a search a smooth function of it."""
    given, last = distinct(100, 100), torch.zeros(100, 100, dtype=torch.bool)
    for density in (0.1, 0.5, 0.51, 0.9):
        kept = pruned("dare_linear", given, density=density) != 0
        assert bool((kept | ~last).all())
        assert abs(float(kept.double().mean()) - density) < 5 * math.sqrt(density * (1 - density) / 1e4)
        last = kept


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_rescaling_gives_the_l1_norm_back(name: str) -> None:
    base, expert = distinct(60, 80)
    delta = pruned(name, [base, expert], density=0.4)
    assert float(delta.abs().sum()) == pytest.approx(float(expert.double().abs().sum()), rel=1e-5)
    ratios = (delta / expert)[delta != 0]
    assert float(ratios.max() - ratios.min()) < 1e-5


def test_rescaling_by_density_divides_by_the_probability() -> None:
    base, expert = distinct(60, 80)
    delta = pruned("dare_linear", [base, expert], density=0.4, rescale_to="density")
    torch.testing.assert_close(delta[delta != 0], (expert.double() / 0.4)[delta != 0], rtol=1e-6, atol=0)
    delta = pruned("della_linear", [base, expert], density=0.4, epsilon=0.2, rescale_to="density")
    ranks = expert.abs().argsort(dim=1).argsort(dim=1).double()
    probability = 0.4 - 0.2 + 2 * 0.2 * ranks / 79
    torch.testing.assert_close(
        delta[delta != 0], (expert.double() / probability)[delta != 0], rtol=1e-5, atol=0
    )
    trimmed = kernels.merge_tensors(
        "ties", [expert], {"weight": [1.0], "density": [0.25], "normalize": False, "rescale": True,
                           "rescale_to": "density", "lambda": 1.0}, base=base,
    )  # fmt: skip
    assert torch.equal(trimmed[trimmed != 0], (expert * 4)[trimmed != 0])


def test_della_keeps_by_rank() -> None:
    """The share of entries that are kept, by decile of rank, over 300 seeds."""
    base, expert = distinct(20, 100)
    runs = 300
    kept = sum(
        (
            pruned("della_linear", [base, expert], seed=s, density=0.5, epsilon=0.3, rescale=False) != 0
        ).double()
        for s in range(runs)
    )
    ranks = expert.abs().argsort(dim=1).argsort(dim=1)
    for decile in range(10):
        chosen = (ranks // 10) == decile
        expected = float((0.2 + 0.6 * ranks[chosen].double() / 99).mean())
        share = float(kept[chosen].mean() / runs)
        assert abs(share - expected) < 5 * math.sqrt(0.25 / (runs * 200)), decile
    assert float(0.2 + 0.6 * 0 / 99) < 0.25 < 0.75 < 0.2 + 0.6


def test_della_with_equal_magnitudes_short_rows_and_no_spread() -> None:
    base = torch.zeros(500, 40)
    equal = pruned("della_linear", [base, torch.ones(500, 40)], density=0.5, epsilon=0.3, rescale=False) != 0
    assert abs(float(equal.double().mean()) - 0.5) < 5 * math.sqrt(0.25 / 20_000)
    column = torch.ones(5000, 1)
    short = pruned("della_linear", [column * 0, column], density=0.3, epsilon=0.1, rescale=False) != 0
    assert abs(float(short.double().mean()) - 0.3) < 5 * math.sqrt(0.21 / 5000)
    given = distinct(30, 50)
    settings: dict[str, Any] = {"density": 0.5, "rescale": False}
    assert torch.equal(
        pruned("della_linear", given, epsilon=0.0, **settings), pruned("dare_linear", given, **settings)
    )


# ---------------------------------------------------------------- devices


FACTORIES = ("arange", "empty", "full", "ones", "zeros", "tensor", "as_tensor", "linspace", "rand", "randn")


@pytest.mark.parametrize("name", sorted(kernels.KERNELS))
def test_every_tensor_is_made_on_the_groups_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU at hand: each factory call inside the kernels has to say on which device, but for
    the counts and numbers of `select`, which are brought to the CPU on purpose."""
    import sys

    def watch(factory: str) -> Any:
        real = getattr(torch, factory)

        def watched(*arguments: Any, **options: Any) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("mergelab.merging.kernels") and not caller.endswith((".select", "kernels")):
                assert options.get("device") is not None, f"torch.{factory} in {caller}"
            return real(*arguments, **options)

        return watched

    given = tensors((8, 16), 3)
    count = 1 if name in ONE else 2 if name in TWO else 3
    p = {**parameters(name, {"density": 0.5}, count), "rescale_to": "l1"}
    for factory in FACTORIES:
        monkeypatch.setattr(torch, factory, watch(factory))
    group = Group("x", given[1 : 1 + count], given[0], buffers=Buffers("cpu"))
    for _ in kernels.merge(kernels.KERNELS[name], group, p):
        pass
