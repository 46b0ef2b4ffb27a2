"""Random numbers by counting: the definition, and what is known of uniform and independent numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mergelab.merging.kernels import counter_rng
from mergelab.merging.kernels.buffers import Buffers

KEY = counter_rng.key(0, "model.layers.0.mlp.up_proj.weight", "math")


def numbers(k: counter_rng.Key, start: int, n: int) -> Tensor:
    return counter_rng.bits(k, start, n, Buffers()).clone()


def by_definition(k: counter_rng.Key, i: int) -> int:
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
    assert counter_rng.key(3, "a", "é") == (2286407658, 2366411032)


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
            pieces.append(counter_rng.bits(KEY, at, n, buffers).clone())
            at += n
        assert torch.equal(torch.cat(pieces), whole)


STREAMS = [
    counter_rng.key(seed, tensor, expert) for seed in (0, 1) for tensor in ("a", "b") for expert in "xy"
]
MANY = 1 << 20


@pytest.mark.parametrize("k", STREAMS)
def test_numbers_are_uniform(k: counter_rng.Key) -> None:
    """Mean, variance and serial correlation within 4.5 standard deviations."""
    u = numbers(k, 0, MANY).double() / 2**32  # from -1/2 to 1/2
    assert u.mean().abs() < 4.5 * math.sqrt(1 / 12 / MANY)
    assert (u.square().mean() - 1 / 12).abs() < 4.5 * math.sqrt(1 / 180 / MANY)
    for lag in (1, 2, 3, 4, 16, 896, 4096):
        assert (u[lag:] * u[:-lag]).mean().abs() * 12 < 4.5 / math.sqrt(MANY - lag), lag


@pytest.mark.parametrize("shift", [24, 16, 8, 0])
@pytest.mark.parametrize("k", STREAMS[:3])
def test_every_byte_takes_all_values_alike(k: counter_rng.Key, shift: int) -> None:
    """Chi-square over 256 bins: 255 expected, standard deviation 22.6."""
    counts = torch.bincount((numbers(k, 0, MANY) >> shift) & 255, minlength=256).double()
    chi2 = float((counts - MANY / 256).square().sum() / (MANY / 256))
    assert abs(chi2 - 255) < 4.5 * math.sqrt(2 * 255)


@pytest.mark.parametrize("density", [0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_as_many_numbers_are_below_as_the_probability_says(density: float) -> None:
    for k in STREAMS:
        kept = int((numbers(k, 0, MANY) < counter_rng.below(density)).sum())
        assert abs(kept - density * MANY) < 4 * math.sqrt(density * (1 - density) * MANY), k


def test_bounds_of_probabilities() -> None:
    assert counter_rng.below(0.0) == -(1 << 31)
    assert counter_rng.below(0.5) == 0
    assert counter_rng.below(math.nextafter(1.0, 0.0)) == (1 << 31) - (1 << 16)
    assert counter_rng.below(1e-9) == -(1 << 31) + (1 << 16)
    assert all(counter_rng.below(p / 1000) % (1 << 16) == 0 for p in range(1000))


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_streams_are_independent(density: float) -> None:
    """Masks of other seeds, tensors or experts correlate within 4 standard deviations."""
    masks = [(numbers(k, 0, MANY) < counter_rng.below(density)).double() - density for k in STREAMS]
    for i, a in enumerate(masks):
        for j, b in enumerate(masks[:i]):
            correlation = float((a * b).mean()) / (density * (1 - density))
            assert abs(correlation) < 4 / math.sqrt(MANY), (i, j)


def test_names_that_could_be_confused_have_streams_of_their_own() -> None:
    names = [(1, "2", "3"), (12, "", "3"), (1, "23", ""), (1, "", "23"), (1, '2", "3', ""), (-1, "2", "3")]
    assert len({counter_rng.key(*n) for n in names}) == len(names)
