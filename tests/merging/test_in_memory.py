"""Candidates that are merged in memory have the bits of those that go over the disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import composed, experts_for, merged
from pairwise import pairwise
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mergelab import plan as planned
from mergelab.core.errors import InputError, StepError
from mergelab.merging import in_memory, kernels
from mergelab.merging.kernels import counter_rng, numba_kernels
from mergelab.merging.kernels.buffers import Buffers
from mergelab.merging.kernels.drop import ALL
from mergelab.merging.kernels.sparsifiers import _shrink
from mergelab.merging.kernels.tensor_group import CHUNK, Group
from mergelab.optimization.candidate_evaluator import CandidateEvaluator, check_engine
from mergelab.schema import Run

Make = Callable[..., Path]
Families = dict[str, dict[str, Path]]

SETTINGS = {
    "della": ["method.parameters.epsilon=0.1"], "della_linear": ["method.parameters.epsilon=0.1"],
    "sce": ["method.parameters.select_topk=0.5"], "slerp": ["method.parameters.t=0.3"],
    "nearswap": ["method.parameters.t=0.01"],
}  # fmt: skip
ROLES = ("math", "physics", "code")


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of tensors that differ."""
    assert one.keys() == other.keys()
    return [n for n in one if one[n].dtype != other[n].dtype or not torch.equal(one[n], other[n])]


LOOPS = {"torch": 1 << 60, "compiled": 0}
"""From how many parameters on loops are compiled."""


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`use("compiled")`: these loops from now on."""
    return lambda loops: monkeypatch.setattr(in_memory, "COMPILED_FROM", LOOPS[loops])


FAMILIES = ("bfloat16-untied", "float32-tied")


@pytest.fixture(scope="module")
def families(make_model: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Of each kind a base and three fine-tunes of it, random."""
    made: dict[str, dict[str, Path]] = {}
    for kind in FAMILIES:
        dtype, _, tied = kind.partition("-")
        root = tmp_path_factory.mktemp(kind)
        made[kind] = {
            n: make_model(root / n, dtype=dtype, tied=tied == "tied", seed=0) for n in ("base", *ROLES)
        }
        for seed, name in enumerate(ROLES, 1):
            _tune(made[kind][name], seed)
    return made


def _tune(folder: Path, seed: int) -> None:
    from weights import change

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        noise = torch.Generator().manual_seed(seed)
        for name, t in tensors.items():
            step = torch.randn(t.shape, generator=noise) * 0.01
            tensors[name] = (t.float() + step).to(t.dtype)

    change(folder, edit)


def overrides_for(method: str, folders: Mapping[str, Path], *more: str) -> list[str]:
    names = ROLES[: experts_for(method)]
    return [
        f"model.base.path={folders['base']}", *(f"experts.{n}.path={folders[n]}" for n in names),
        *(f"~experts.{n}" for n in ("math", "physics", "code", "japanese") if n not in names),
        f"method={method}", "eval=none", *SETTINGS.get(method, []), *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "kind", "loops"), pairwise(sorted(kernels.KERNELS), FAMILIES, list(LOOPS))
)
def test_every_method_has_the_bits_of_the_disk(
    method: str, kind: str, loops: str, families: Families, use: Any, tmp_path: Path
) -> None:
    run = composed(*overrides_for(method, families[kind]))
    use(loops)
    model, _ = CandidateEvaluator(run).merge(run)
    assert not same(bits(model), on_disk(run, tmp_path))


def on_disk(run: Run, folder: Path) -> dict[str, torch.Tensor]:
    """What a run's model has when it was merged to disk and loaded."""
    return bits(AutoModelForCausalLM.from_pretrained(merged(run, folder), dtype="auto"))


@pytest.mark.parametrize(
    ("method", "kind", "loops"),
    pairwise(
        ["ties", "dare_ties", "dare_linear", "breadcrumbs_ties", "task_arithmetic"], FAMILIES, list(LOOPS)
    ),
)
def test_gradients_filters_and_other_settings(
    method: str, kind: str, loops: str, families: Families, use: Any, tmp_path: Path
) -> None:
    more = ["experts.math.weight={self_attn: [-0.1, 0.9], mlp: 0.4, *: 0.2}", "method.parameters.lambda=0.8",
            "method.parameters.normalize=true"]  # fmt: skip
    if method != "task_arithmetic":
        more += ["experts.physics.density=[0.3, 1.0]", "experts.code.density={mlp: 0.05, *: 0.7}"]
    run = composed(*overrides_for(method, families[kind], *more))
    use(loops)
    model, _ = CandidateEvaluator(run).merge(run)
    assert not same(bits(model), on_disk(run, tmp_path))


@pytest.mark.parametrize(
    ("method", "kind", "loops"),
    pairwise(["ties", "dare_ties", "breadcrumbs", "della", "sce", "linear"], FAMILIES, list(LOOPS)),
)
def test_a_candidate_does_not_depend_on_those_before_it(
    method: str, kind: str, loops: str, families: Families, use: Any
) -> None:
    takes_density = method not in ("sce", "linear")
    run = composed(*overrides_for(method, families[kind]))
    use(loops)
    bench = CandidateEvaluator(run)

    def candidate(weight: float, density: float) -> dict[str, torch.Tensor]:
        changed = replace(run.experts["math"], weight=None if method == "sce" else weight)
        if takes_density:
            changed = replace(changed, density=density)
        settings = {} if method != "sce" else {"select_topk": density}
        method_ = replace(run.method, parameters={**run.method.parameters, **settings})
        other = replace(run, experts={**run.experts, "math": changed}, method=method_)
        return bits(bench.merge(other)[0])

    first = candidate(0.5, 0.3)
    second = candidate(0.9, 0.8)
    assert same(first, second)
    assert not same(candidate(0.5, 0.3), first)
    assert not same(candidate(0.9, 0.8), second)


@pytest.mark.parametrize(("kind", "loops"), zip(FAMILIES, LOOPS, strict=True))
def test_models_that_do_not_fit_are_streamed_and_nothing_is_kept(
    kind: str, loops: str, families: Families, use: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = composed(*overrides_for("ties", families[kind]))
    use(loops)
    roomy = bits(CandidateEvaluator(run).merge(run)[0])
    monkeypatch.setattr(in_memory, "_room", lambda hardware: 0)
    bench = CandidateEvaluator(run)
    assert not same(bits(bench.merge(run)[0]), roomy)
    assert not same(bits(bench.merge(run)[0]), roomy)


def test_a_model_of_other_tensors_than_its_files_is_refused(
    families: Families, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = composed(*overrides_for("linear", families[FAMILIES[0]]))
    live = in_memory._live

    def other(*arguments: Any) -> Any:
        model, tokenizer = live(*arguments)
        model.add_module("extra", torch.nn.Linear(2, 2))
        return model, tokenizer

    monkeypatch.setattr(in_memory, "_live", other)
    with pytest.raises(StepError, match=r"its files differ in extra\.bias, extra\.weight"):
        CandidateEvaluator(run).merge(run)


# ---------------------------------------------------------------- compiled loops


def group(n: int, count: int, dtype: torch.dtype, seed: int = 0) -> Group:
    """Inputs with many equal magnitudes, zeros of both signs, and large and tiny entries."""
    made = torch.Generator().manual_seed(seed)
    base = torch.randn(n, generator=made)
    base[::97] = -0.0
    experts = [base + torch.randint(-4, 5, (n,), generator=made) * 2.0**-7 for _ in range(count)]
    for e in experts:
        e[::89] *= -1e3
        e[5::97] = 1e-41
    return Group("x", [e.to(dtype) for e in experts], base.to(dtype), [f"e{i}" for i in range(count)], 3)


PARAMETERS: dict[str, Any] = {"normalize": False, "lambda": 1.0, "rescale": True, "rescale_to": "l1"}


DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@pytest.mark.parametrize(
    ("method", "n", "count", "dtype"),
    pairwise(
        ["task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties"],
        [1, 1023, (1 << 15) + 7, counter_rng.HALF + 64], [1, 3, 5, 16], list(DTYPES),
    ),
)  # fmt: skip
def test_compiled_loops_give_the_bits_of_torch(
    method: str, n: int, count: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tensors of one chunk and of several, of which the last may be short."""
    monkeypatch.setitem(CHUNK, "cpu", 1 << 15)
    made = group(n, count, DTYPES[dtype])
    budget = kernels.Budget(1 << 30)
    shared = kernels.Shared(budget)
    for i, (normalize, scale, density) in enumerate(((False, 1.0, 0.4), (True, 0.7, 0.9), (True, 1.0, 1.0))):
        p = PARAMETERS | {
            "weight": [0.3 - 0.2 * q for q in range(count)],
            "density": [density / (1 + q) for q in range(count)],
            "gamma": [0.01 * q for q in range(count)], "normalize": normalize, "lambda": scale,
            "rescale": i != 1,
        }  # fmt: skip
        wanted = torch.empty(n, dtype=DTYPES[dtype])
        kernels.merge_into(wanted, kernels.KERNELS[method], replace(made, buffers=Buffers()), dict(p))
        for memory in (None, shared, shared):
            out = torch.empty(n, dtype=DTYPES[dtype])
            fast = replace(made, buffers=Buffers(), compiled=numba_kernels, shared=memory)
            assert fast.loops is numba_kernels
            kernels.merge_into(out, kernels.KERNELS[method], fast, dict(p))
            view = torch.int16 if dtype == "bfloat16" else torch.int32
            assert torch.equal(out.view(view), wanted.view(view))


def test_what_the_loops_cannot_read_is_left_to_torch() -> None:
    for dtype in (torch.float16, torch.float64):
        assert replace(group(10, 2, dtype), compiled=numba_kernels).loops is None
    assert replace(group(10, 2, torch.float32), compiled=numba_kernels, dtype=torch.float64).loops is None
    assert replace(group(10, 17, torch.float32), compiled=numba_kernels).loops is None
    assert group(10, 2, torch.float32).loops is None


def test_not_a_number_stays_one() -> None:
    made = group(5000, 2, torch.bfloat16)
    made.experts[0][7] = float("nan")
    made.experts[1][9] = float("inf")
    p = PARAMETERS | {"weight": [0.5, 0.5], "density": [0.5, 0.5], "rescale": False}
    for method in ("task_arithmetic", "ties", "dare_ties"):
        outs = []
        for fast in (False, True):
            out = torch.empty(5000, dtype=torch.bfloat16)
            g = replace(made, buffers=Buffers(), compiled=numba_kernels if fast else None)
            kernels.merge_into(out, kernels.KERNELS[method], g, dict(p))
            outs.append(out)
        assert torch.equal(outs[0].isnan(), outs[1].isnan())
        assert torch.equal(outs[0].nan_to_num(1e9), outs[1].nan_to_num(1e9))


def test_nothing_is_dropped_up_to_a_bound_that_is_none() -> None:
    x = torch.tensor([0.0, -0.0, 1.0])
    _shrink(x, 0, 1, (ALL, ALL))
    assert x.view(torch.int32).tolist() == torch.tensor([0.0, -0.0, 1.0]).view(torch.int32).tolist()


def test_the_place_of_the_nth_entry_of_a_key() -> None:
    made = replace(group(40_000, 2, torch.bfloat16), compiled=numba_kernels)
    size = (made.experts[1].float() - made.base.float()).abs()  # type: ignore[union-attr]
    key = int(size[100].view(torch.int32))
    places = (size.view(torch.int32) == key).nonzero().flatten().tolist()
    assert len(places) > 1000
    for n in (0, 1, 777, len(places) - 1):
        assert numba_kernels.place_of(made, 1, 0, 40_000, key, n) == places[n]
    assert numba_kernels.place_of(made, 1, places[3], places[5], key, 1) == places[4]
    assert numba_kernels.place_of(made, 1, 0, 40_000, key, len(places)) == -1


def test_a_checkpoint_with_other_names_than_its_model(family: Any, tmp_path: Path) -> None:
    """GPT-2 lies on the hub without the prefix that its tensors have in the model."""
    folders = {n: hub_layout("gpt2", tmp_path / n, seed, family) for seed, n in enumerate(("base", *ROLES))}
    for folder in folders.values():
        tensors = load_file(folder / "model.safetensors")
        bare = {n.removeprefix("transformer."): t for n, t in tensors.items()}
        save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    run = composed(*overrides_for("ties", folders))
    model, _ = CandidateEvaluator(run).merge(run)
    assert not same(bits(model), on_disk(run, tmp_path / "run"))


def test_a_model_that_packs_its_tensors_is_refused_before_a_search(family: Any, tmp_path: Path) -> None:
    folders = {
        n: hub_layout("mixtral", tmp_path / n, seed, family, num_local_experts=2)
        for seed, n in enumerate(("base", *ROLES))
    }
    run = composed(*overrides_for("ties", folders))
    with pytest.raises(InputError, match=r"makes other tensors of .*experts"):
        check_engine(run, planned(run, tmp_path / "run"))


def hub_layout(kind: str, folder: Path, seed: int, family: Any, **settings: Any) -> Path:
    """A small random model as transformers saves it, with the tiny family's tokenizer."""
    small = {"vocab_size": 304, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **small, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in family.checkpoint("base").glob("*token*"):
        shutil.copyfile(file, folder / file.name)
    return folder
