"""Task vectors compared while they stream: the numbers of a direct computation, whatever the files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_model
from safetensors.torch import save_file
from weights import change, weights

from mergelab.analysis import distance, parameter_groups, streaming, tensor
from mergelab.analysis.affine import Span, position
from mergelab.analysis.landscape import Point, best
from mergelab.analysis.parameter_groups import Comparison
from mergelab.analysis.statistics import Statistics
from mergelab.core.errors import StepError
from mergelab.merging.kernels import tensor_group
from mergelab.models import checkpoint
from mergelab.schema import Hardware

Edit = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of thousands of entries are read in many blocks of several chunks."""
    monkeypatch.setattr(tensor, "BLOCK", 3000)
    monkeypatch.setitem(tensor_group.CHUNK, "cpu", 1024)


def noise(seed: int, size: float = 0.01) -> Edit:
    """A fine-tune: noise on every tensor."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        made = torch.Generator().manual_seed(seed)
        for name, t in tensors.items():
            tensors[name] = (t.double() + torch.randn(t.shape, generator=made) * size).to(t.dtype)

    return edit


def build(root: Path, edits: Mapping[str, Edit], **settings: Any) -> dict[str, Path]:
    """A random base, and copies of it that have been edited."""
    out = {}
    for name, edit in {"base": None, **edits}.items():
        out[name] = random_model(root / name, **settings)
        if edit:
            change(out[name], edit)
    return out


def shard(folder: Path) -> None:
    """The weights in two files with an index."""
    tensors = weights(folder)
    (folder / "model.safetensors").unlink()
    files = {n: f"model-{1 + i % 2}.safetensors" for i, n in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({n: tensors[n] for n, f in files.items() if f == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def compare(folders: Mapping[str, Path], top: float | None = 0.1, **settings: Any) -> Comparison:
    base, *_ = facts = [checkpoint.weights(f) for f in folders.values()]
    experts = dict(zip(list(folders)[1:], facts[1:], strict=True))
    return streaming.compare(base, experts, hardware=Hardware(**settings), top=top)


def dense(tensors: list[torch.Tensor], top: float) -> Statistics:
    """The definitions, word by word, of a base and experts held in memory."""
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    base, *experts = (t.to(wide).flatten() for t in tensors)
    deltas = [e - base for e in experts]
    rows = torch.stack([base, *deltas]).double()
    k = max(1, round(top * base.numel()))
    large = [(d.abs() >= d.abs().sort(descending=True).values[k - 1]) & (d != 0) for d in deltas]
    tops = np.array([int(s.sum()) for s in large])

    def counts(of: Callable[[int, int], torch.Tensor]) -> np.ndarray:
        several = range(len(deltas))
        return np.array([[int(of(i, j).sum()) for j in several] for i in several])

    return Statistics(
        base.numel(), (rows @ rows.T).numpy(),
        counts(lambda i, j: deltas[i] * deltas[j] > 0),
        counts(lambda i, j: (deltas[i] != 0) & (deltas[j] != 0)),
        tops, counts(lambda i, j: large[i] & large[j]), np.outer(tops, tops) / base.numel(),
    )  # fmt: skip


def same(one: Statistics, other: Statistics) -> None:
    """Equal counts, and sums but for the order in which they were added."""
    scale = np.sqrt(np.outer(other.dots.diagonal(), other.dots.diagonal()))
    assert (np.abs(one.dots - other.dots) <= 1e-13 * scale).all()
    assert one.entries == other.entries
    for name in ("same_sign", "both_nonzero", "tops", "common"):
        assert (getattr(one, name) == getattr(other, name)).all(), name
    assert one.expected == pytest.approx(other.expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_the_numbers_of_a_direct_computation(
    dtype: str, sharded: bool, tmp_path: Path, small_pieces: None
) -> None:
    edits = {n: noise(i + 1, 0.003 * (i + 1)) for i, n in enumerate("abc")}
    folders = build(tmp_path, edits, dtype=dtype, tied=not sharded)
    if sharded:
        for folder in folders.values():
            shard(folder)
    found = compare(folders, 0.07)
    read = [weights(f) for f in folders.values()]
    assert found.experts == ("a", "b", "c") and not found.cut and not found.left_out
    assert found.tensors.keys() == read[0].keys()
    expected = {n: dense([r[n] for r in read], 0.07) for n in found.tensors}
    for name, sums in found.tensors.items():
        same(sums, expected[name])
    whole = list(expected.values())
    same(found.whole, sum(whole[1:], start=whole[0]))
    flat = [torch.cat([r[n].double().flatten() for n in found.tensors]) for r in read]
    a, b = flat[1] - flat[0], flat[2] - flat[0]
    assert found.whole.cosine[0, 1] == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-7)
    assert found.whole.relative_norm[0] == pytest.approx(float(a.norm() / flat[0].norm()), rel=1e-6)
    cosine = float(flat[0] @ flat[1] / flat[0].norm() / flat[1].norm())
    assert found.whole.cosine_to_base[0] == pytest.approx(cosine, abs=1e-7)
    between = float(flat[1] @ flat[2] / flat[1].norm() / flat[2].norm())
    assert found.whole.cosine_between[0, 1] == pytest.approx(between, abs=1e-7)


def test_the_number_of_threads_changes_nothing(tmp_path: Path, small_pieces: None) -> None:
    folders = build(tmp_path, {"a": noise(1), "b": noise(2)}, dtype="bfloat16")
    one, three = (compare(folders, threads=n).whole for n in (1, 3))
    assert all((getattr(one, f) == getattr(three, f)).all() for f in ("dots", "same_sign", "common"))


def test_distances_alone_are_those_of_the_full_comparison(tmp_path: Path) -> None:
    folders = build(tmp_path, {"a": noise(1), "b": noise(2)})
    short, full = compare(folders, None), compare(folders)
    assert (short.whole.dots == full.whole.dots).all()
    assert np.isnan(short.whole.agreement).all() and np.isnan(short.whole.overlap).all()


def test_what_is_read_is_told_in_bytes(tmp_path: Path) -> None:
    folders = build(tmp_path, {"a": noise(1)})
    told: list[tuple[str, int, int]] = []
    base, a = (checkpoint.weights(f) for f in folders.values())
    streaming.compare(base, {"a": a}, hardware=Hardware(), progress=lambda *x: told.append(x))
    total = base.nbytes + a.nbytes
    assert told[0] == ("compare", 0, total) and told[-1] == ("compare", total, total)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_identical_experts(tmp_path: Path) -> None:
    found = compare(build(tmp_path, {"a": noise(1), "b": noise(1)}, dtype="bfloat16")).whole
    assert found.cosine[0, 1] == pytest.approx(1, abs=1e-12)
    assert found.agreement[0, 1] == 1 and found.overlap[0, 1] == 1
    assert found.relative_norm[0] == found.relative_norm[1]


def half(which: int) -> Edit:
    """Only every other entry changes, the even or the odd ones."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for t in tensors.values():
            t.view(-1)[which::2] += 0.25

    return edit


def test_orthogonal_experts_that_change_nothing_in_common(tmp_path: Path) -> None:
    found = compare(build(tmp_path, {"a": half(0), "b": half(1)})).whole
    assert found.cosine[0, 1] == 0 and found.overlap[0, 1] == 0
    assert np.isnan(found.agreement[0, 1]) and found.agreement[0, 0] == 1


def signs(period: int) -> Edit:
    """Every entry changes by as much, up or down."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name, t in tensors.items():
            up = torch.arange(t.numel()) // period % 2 == 0
            tensors[name] = torch.where(up.view(t.shape), 0.5, -0.5).to(t.dtype)

    return edit


def zero(tensors: dict[str, torch.Tensor]) -> None:
    for t in tensors.values():
        t.zero_()


def test_orthogonal_experts_agree_in_half_of_their_signs_and_all_that_tie_is_large(tmp_path: Path) -> None:
    folders = build(tmp_path, {"a": signs(1), "b": signs(2)})
    change(folders["base"], zero)
    found = compare(folders).whole
    assert found.cosine[0, 1] == 0 and found.agreement[0, 1] == 0.5
    assert found.tops[0] == found.entries  # no entry is smaller than another
    assert found.overlap[0, 1] == found.overlap_by_chance[0, 1] == 1
    assert np.isnan(found.relative_norm).all() and np.isnan(found.cosine_to_base).all()


def test_an_expert_that_is_the_base_has_no_direction(tmp_path: Path) -> None:
    found = compare(build(tmp_path, {"a": noise(1), "b": lambda tensors: None}))
    whole = found.whole
    assert whole.relative_norm[1] == 0 and whole.cosine_to_base[1] == pytest.approx(1)
    for values in (whole.cosine, whole.agreement, whole.overlap, whole.overlap_by_chance):
        assert np.isnan(values[:, 1]).all() and not np.isnan(values[0, 0])
    recorded = distance.record(found)["whole"]
    assert recorded["cosine"]["a"]["b"] is None and recorded["relative_norm"]["b"] == 0
    json.dumps(recorded, allow_nan=False)


@pytest.mark.parametrize("rows", [320, 300])
def test_another_vocabulary_is_compared_on_common_rows(rows: int, tmp_path: Path) -> None:
    folders = build(tmp_path, {"a": noise(1)})
    folders["b"] = random_model(tmp_path / "b", vocab_size=rows)
    name = "model.embed_tokens.weight"
    found, read = compare(folders), [weights(f) for f in folders.values()]
    common = min(304, rows)
    assert found.cut == {name: (common, max(304, rows))} and not found.left_out
    same(found.tensors[name], dense([r[name][:common] for r in read], 0.1))


def test_what_not_every_model_has_is_left_out_and_named(tmp_path: Path) -> None:
    folders = build(tmp_path, {"a": noise(1), "b": noise(2)})
    gone, odd = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
    change(folders["a"], lambda tensors: tensors.pop(gone))
    change(folders["b"], lambda tensors: tensors.update({odd: tensors[odd][:, :8].clone()}))
    found = compare(folders)
    assert set(found.left_out) == {gone, odd} and not {gone, odd} & found.tensors.keys()


def test_a_head_that_is_the_embeddings_counts_once(tmp_path: Path) -> None:
    folders = build(tmp_path, {"a": noise(1)})
    for folder in folders.values():
        change(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    found = compare(folders)
    assert "lm_head.weight" not in found.tensors and not found.left_out


@pytest.mark.parametrize("who", ["base", "b"])
def test_what_is_not_finite_is_named(who: str, tmp_path: Path) -> None:
    folders = build(tmp_path, {"a": noise(1), "b": noise(2)})
    name = "model.layers.1.mlp.down_proj.weight"
    change(folders[who], lambda tensors: tensors[name].view(-1)[7:8].fill_(math.nan))
    with pytest.raises(StepError, match=f"{name} of {who} has entries that are NaN.*{folders[who]}/model"):
        compare(folders)


def test_a_file_that_has_changed_meanwhile(tmp_path: Path) -> None:
    folders = build(tmp_path, {"a": noise(1)})
    base, a = (checkpoint.weights(f) for f in folders.values())
    change(folders["a"], lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(StepError, match="has changed since preflight, or is damaged"):
        streaming.compare(base, {"a": a}, hardware=Hardware())


# ---------------------------------------------------------------- parts of a model


def test_kinds_and_layers_of_names() -> None:
    kinds = {
        "model.layers.11.self_attn.q_proj.weight": ("self_attn.q_proj", 11),
        "model.layers.0.self_attn.q_proj.bias": (parameter_groups.BIASES, 0),
        "model.layers.3.post_attention_layernorm.weight": (parameter_groups.NORMS, 3),
        "model.layers.3.self_attn.q_norm.weight": (parameter_groups.NORMS, 3),
        "model.layers.7.mlp.experts.12.down_proj.weight": ("mlp.experts.*.down_proj", 7),
        "model.embed_tokens.weight": ("embed_tokens", None),
        "model.norm.weight": (parameter_groups.NORMS, None),
        "lm_head.weight": ("lm_head", None),
        "transformer.h.5.mlp.c_fc.weight": ("mlp.c_fc", 5),
    }
    assert {n: (parameter_groups.kind(n), parameter_groups.layer(n)) for n in kinds} == kinds


def test_parts_add_up_to_the_whole(tmp_path: Path) -> None:
    edits = {"a": noise(1), "b": noise(2)}
    found = compare(build(tmp_path, edits, num_hidden_layers=7, tied=False))
    assert list(found.groups) == ["embeddings", "layers 0–1", "layers 2–3", "layers 4–6", "head"]
    assert list(found.layers) == list(range(7))
    assert list(found.kinds)[:3] == ["embed_tokens", "lm_head", "self_attn.q_proj"]
    assert list(found.kinds)[-2:] == ["norms", "biases"]
    for parts in (found.groups, found.kinds):
        first, *rest = parts.values()
        same(sum(rest, start=first), found.whole)
    left = found.matrices
    assert left.whole.entries == found.whole.entries - sum(
        found.kinds[k].entries for k in ("norms", "biases")
    )
    assert set(left.kinds) == set(found.kinds) - {"norms", "biases"}


@pytest.mark.parametrize(("layers", "names"), [(1, ["layer 0"]), (2, ["layer 0", "layer 1"])])
def test_few_layers_make_fewer_groups(layers: int, names: list[str], tmp_path: Path) -> None:
    found = compare(build(tmp_path, {"a": noise(1)}, num_hidden_layers=layers))
    assert list(found.groups) == ["embeddings", *names, "head"]


# ---------------------------------------------------------------- distances


def told(folders: Mapping[str, Path]) -> list[tuple[str, str, str]]:
    places = {n: f"experts.{n}" for n in folders}
    return [(f.code, f.place, f.message) for f in distance.findings(compare(folders, None), places)]


def test_a_family_has_nothing_against_it(family: Any) -> None:
    roles = ("base", "math", "physics", "code", "japanese", "general")
    assert told({r: family.checkpoint(r) for r in roles}) == []


def test_a_stranger_is_exposed(tmp_path: Path) -> None:
    folders = build(tmp_path, {"a": noise(1)})
    folders["b"] = random_model(tmp_path / "b", seed=5)
    found = compare(folders, None)
    assert found.whole.cosine_to_base[1] > 0.3  # norms make them look related
    ((code, place, message),) = told(folders)
    far, cosine = found.matrices.whole.relative_norm[1], found.matrices.whole.cosine_to_base[1]
    assert (code, place) == ("unrelated", "experts.b") and abs(cosine) < 0.05 and 1.3 < far < 1.5
    assert f"differ by {far:.2f} times the base's norm, with a cosine of {cosine:.3f}" in message


def test_a_wrong_base_is_the_bases_fault(tmp_path: Path) -> None:
    folders = build(tmp_path, {"a": noise(1), "b": noise(2)})
    folders["base"] = random_model(tmp_path / "other", seed=5)
    ((code, place, message),) = told(folders)
    assert (code, place) == ("unrelated", "model.base") and "not the base of these experts" in message
    alone = {n: folders[n] for n in ("base", "a")}
    assert [place for _, place, _ in told(alone)] == ["experts.a"]


def test_strangers_to_each_other_as_well(tmp_path: Path) -> None:
    folders = {n: random_model(tmp_path / n, seed=i) for i, n in enumerate(("base", "a", "b"))}
    assert [(code, place) for code, place, _ in told(folders)] == [
        ("unrelated", "experts.a"), ("unrelated", "experts.b"),
    ]  # fmt: skip


def test_copies_are_exposed(tmp_path: Path) -> None:
    copy: Edit = lambda tensors: None  # noqa: E731
    folders = build(tmp_path, {"a": noise(1), "b": noise(1), "c": copy, "d": copy}, dtype="bfloat16")
    assert told(folders) == [
        ("same", "experts.c", "its weights equal the base's, so there is no task vector"),
        ("same", "experts.d", "its weights equal the base's, so there is no task vector"),
        ("same", "experts.b", "its weights equal those of a, so they count twice"),
    ]


# ---------------------------------------------------------------- lines and planes


def test_the_grid_holds_the_models() -> None:
    plane = Span(("base", "a", "b"))
    assert plane.ticks(7, 0.25) == [-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
    assert len(plane.grid(7, 0.25)) == 49
    assert {*plane.corners()} == {(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)} <= {*plane.grid(4, 0.1)}
    assert len(plane.grid(4, 0.1)) == 16 + 3
    assert Span(("a", "b")).grid(3, 0.0) == [(0.0,), (0.5,), (1.0,)]
    assert all(t == round(t, 3) for t in plane.ticks(8, 0.25))


def test_weights_are_affine_coordinates() -> None:
    assert Span(("base", "a", "b")).weights((0.4, 0.5)) == {"a": 0.4, "b": 0.5}
    assert Span(("a", "base", "b")).weights((0.3, -0.25)) == {"a": 0.95, "b": -0.25}
    assert Span(("a", "b", "c")).weights((0.1, 0.2)) == {"a": 0.7, "b": 0.1, "c": 0.2}
    assert Span(("a", "b")).weights((0.107,)) == {"a": 0.893, "b": 0.107}


@pytest.mark.parametrize("models", [("base", "a", "b"), ("a", "b", "c"), ("b", "base", "a"), ("a", "c")])
def test_models_lie_at_their_true_distances(models: tuple[str, ...], tmp_path: Path) -> None:
    edits = {n: noise(i + 1, 0.01 * (i + 1)) for i, n in enumerate("abc")}
    folders = build(tmp_path, edits)
    found = compare(folders, None)
    flat = {
        n: torch.cat([t.double().flatten() for _, t in sorted(weights(f).items())])
        for n, f in folders.items()
    }
    span = Span(models)
    spots = span.positions(found.whole.dots, found.experts)
    corners = [position(at, spots) for at in span.corners()]
    assert np.allclose(corners, spots)
    norm = float(flat["base"].norm())
    for i, one in enumerate(models):
        for j, other in enumerate(models):
            true = float((flat[one] - flat[other]).norm()) / norm
            assert math.dist(corners[i], corners[j]) == pytest.approx(true, abs=1e-6)
    at = (0.4, -0.3)[: span.axes]
    shares = span.weights(at)
    made = flat["base"] + sum(w * (flat[n] - flat["base"]) for n, w in shares.items())
    for model, spot in zip(models, spots, strict=True):
        true = float((made - flat[model]).norm()) / norm
        assert math.dist(position(at, spots), spot) == pytest.approx(true, abs=1e-6)


def test_models_that_span_nothing(tmp_path: Path) -> None:
    folders = build(tmp_path, {"a": half(0), "b": half(0), "c": lambda tensors: None})
    change(folders["c"], lambda tensors: [t.view(-1)[0::2].add_(0.5) for t in tensors.values()])
    dots, names = compare(folders, None).whole.dots, ("a", "b", "c")
    with pytest.raises(ValueError, match="a and b are the same weights"):
        Span(("a", "b")).positions(dots, names)
    with pytest.raises(ValueError, match="base, a, c lie on one line"):
        Span(("base", "a", "c")).positions(dots, names)


def test_the_best_of_equals_has_the_smallest_weights() -> None:
    points = [Point((w,), {"a": w}, {}, f) for w, f in ((2.0, 0.5), (0.5, 0.5), (1.0, 0.2), (3.0, None))]
    found = best(points)
    assert found is not None and found.at == (0.5,)
    assert best(points[-1:]) is None
