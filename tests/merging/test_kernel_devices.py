"""The kernels on a device that is made up: what lies where, and what is fetched from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import ALL, BF16, FP32, Case, chunks_of, draw, in_turn, ours, same
from kernel_cases import one_thread as one_thread  # a fixture
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from mergelab.merging.kernels.buffers import Buffers


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


INPUTS = [("near", (24, 32)), ("levels", (2, 3, 40)), ("partly", (210,))]


@pytest.mark.parametrize(("c", "inputs"), in_turn(ALL, INPUTS), ids=str)
def test_kernels_compute_on_one_device(c: Case, inputs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """No operation mixes tensors of the group's device with those of the CPU, the results are those of
    the CPU, and only numbers and histograms (of `select`) are fetched.

    The device is made up. This proves where tensors are created and which way they go, branches for
    other devices included; not that CUDA has each operation for each dtype, nor what its sums are.
    """
    chunks_of(150, monkeypatch)
    for kind, shape in inputs:
        base, experts = draw(kind, shape, [BF16, FP32], c.counts[-1])
        expected = ours(c, experts, base, out_dtype=FP32)
        with Factories(), Elsewheres() as mode:
            merged = ours(c, experts, base, out_dtype=FP32, buffers=Buffers("lazy"))
        assert isinstance(merged, Elsewhere)
        assert same(merged.inner, expected)
        assert all(x.dim() == 0 or (x.dtype, x.numel()) == (torch.int64, 1 << 16) for x in mode.fetched)
