"""Merge methods of a user's own: those of the page on them, written into a folder as the page says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import blocks, write_files
from composing import composed, merged
from weights import change, same_bits, weights

import mergelab as lab
from mergelab.core import registry as extensions
from mergelab.merging import mergekit_backend, streaming_engine
from mergelab.methods import Traits, registry
from mergelab.methods.traits import TRAITS
from mergelab.models import checkpoint
from mergelab.optimization.candidate_evaluator import CandidateEvaluator
from mergelab.recipes import tensor_plan
from mergelab.schema import Hardware, Run, identity_of

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "add-a-method.md"
ROLES = ("math", "physics", "code")
WEIGHTS = {"math": 0.5, "physics": 0.4, "code": 0.3}


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What a test registers is unknown to the next."""
    yield
    extensions._used = None
    registry.methods()


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """The user's folder."""
    write_files(PAGE, tmp_path)
    for name in ("scaled_sum", "noisy"):
        (tmp_path / "my_conf" / "method" / f"{name}.yaml").write_text(f"name: {name}\nbase: model\n")
    return tmp_path / "my_conf"


NOISY = """
import torch
from mergekit.merge_methods import BasePolicy, InputContract, TensorGroup, merge_method
from mergelab.methods import register

@register(random=True)
@merge_method(name="noisy", contract=InputContract(base=BasePolicy.REQUIRED))
def noisy(group: TensorGroup, size: float = 0.01) -> torch.Tensor:
    return group.base.tensor + size * torch.randn_like(group.base.tensor)
"""


@pytest.fixture(scope="module")
def folders(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and three fine-tunes of it, random."""
    root = tmp_path_factory.mktemp("models")
    made = {"base": make_model(root / "base", seed=0)}

    def tune(tensors: dict[str, torch.Tensor], seed: int) -> None:
        noise = torch.Generator().manual_seed(seed)
        for t in tensors.values():
            t += (torch.randn(t.shape, generator=noise) * 0.01).to(t.dtype)

    for seed, role in enumerate(ROLES):
        made[role] = root / role
        shutil.copytree(made["base"], made[role])
        change(made[role], lambda tensors, seed=seed: tune(tensors, seed))
    return made


@pytest.fixture
def compose(conf: Path, folders: dict[str, Path]) -> Callable[..., Run]:
    """`compose("consensus_ta", ...)`: a run on these models."""
    models = [f"model.base.path={folders['base']}", "~experts.japanese"]
    models += [f"experts.{r}.path={folders[r]}" for r in ROLES]

    def made(method: str, *more: str) -> Run:
        given = [f"experts.{r}.weight={w}" for r, w in WEIGHTS.items() if method != "noisy"]
        return composed(f"method={method}", *models, *given, "eval=none", *more, config_dir=conf)

    return made


def by_hand(folders: dict[str, Path], k: int, scale: float) -> dict[str, torch.Tensor]:
    """Consensus task arithmetic, entry by entry."""
    read = {role: weights(folder) for role, folder in folders.items()}
    out = {}
    for name, base in read["base"].items():
        deltas = [read[r][name].float() - base.float() for r in ROLES]
        ups, downs = sum((d > 0).int() for d in deltas), sum((d < 0).int() for d in deltas)
        zeros = 3 - ups - downs
        merged_ = base.float()
        for role, d in zip(ROLES, deltas, strict=True):
            agreeing = torch.where(d > 0, ups, torch.where(d < 0, downs, zeros))
            merged_ = merged_ + scale * WEIGHTS[role] * d * (agreeing >= k)
        out[name] = merged_.to(base.dtype)
    return out


def close(folder: Path, wanted: dict[str, torch.Tensor]) -> None:
    found = weights(folder)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=1e-4)


def test_both_engines_and_memory_agree_with_the_formula(
    compose: Callable[..., Run], folders: dict[str, Path], tmp_path: Path
) -> None:
    run = compose("consensus_ta", "method.parameters.k=3", "method.parameters.scale=0.5")
    disk = merged(run, tmp_path / "fast")
    close(disk, by_hand(folders, k=3, scale=0.5))
    plan = lab.plan(compose("consensus_ta", "method.parameters.k=3", "method.parameters.scale=0.5",
                            "hardware.engine=mergekit"))  # fmt: skip
    assert plan.engine is not None and plan.engine.name == "mergekit" and plan.recipe is not None
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    mergekit_backend.merge(plan.recipe, theirs, hardware=Hardware(threads=1), seed=0)
    assert same_bits(disk, theirs)
    extensions._used = None  # as in another process, which gets the run alone
    model, _ = CandidateEvaluator(run).merge(run)
    live = model.state_dict()
    assert all(torch.equal(live[name], tensor) for name, tensor in weights(disk).items())


def test_gradients_and_filters_reach_it(compose: Callable[..., Run], tmp_path: Path) -> None:
    plain = merged(compose("consensus_ta"), tmp_path / "plain")
    run = compose("consensus_ta", "method.parameters.scale={mlp: 0.5, *: 1.0}")
    one, other = weights(plain), weights(merged(run, tmp_path / "filtered"))
    assert {n for n in one if not torch.equal(one[n], other[n])} == {n for n in one if "mlp" in n}


def test_a_kernel_on_chunks_gives_what_the_function_gives(
    compose: Callable[..., Run], tmp_path: Path, conf: Path
) -> None:
    run = compose("scaled_sum")
    assert not lab.plan(run).errors and not registry.get("scaled_sum").whole_tensors
    chunks = merged(run, tmp_path / "chunks")
    file = conf / "methods" / "scaled_sum.py"
    file.write_text(file.read_text().replace("@register(kernel=on_chunks)", "@register"))
    whole = merged(compose("scaled_sum"), tmp_path / "whole")
    assert registry.get("scaled_sum").whole_tensors
    close(chunks, weights(whole))


def test_random_numbers_are_those_of_the_seed(
    compose: Callable[..., Run], tmp_path: Path, conf: Path
) -> None:
    (conf / "methods" / "noisy.py").write_text(NOISY)
    before = torch.random.get_rng_state()
    runs = {
        "one": compose("noisy", "hardware.threads=1"), "four": compose("noisy", "hardware.threads=4"),
        "other": compose("noisy", "seed=1"),
    }  # fmt: skip
    made = {name: merged(run, tmp_path / name) for name, run in runs.items()}
    assert same_bits(made["one"], made["four"])
    assert not same_bits(made["one"], made["other"])
    assert torch.equal(torch.random.get_rng_state(), before)


# ---------------------------------------------------------------- what preflight says


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.parameters.scale=3", "3 is out of range; scale must be in (0, 2]"),
        ("method.parameters.k=0", "0 is out of range; k must be at least 1"),
        ("method.parameters.k=1.5", "1.5 is not a whole number"),
        ("method.parameters.k=many", "'many' is not a number"),
        ("+method.parameters.scael=1", "Did you mean 'scale'?"),
        ("experts.math.density=0.5", "method=consensus_ta takes no density"),
        ("method.base=none", "consensus_ta needs a base model"),
        ("experts.math.weight=null", "consensus_ta needs weight, and nothing sets it"),
        ("method.name=consensus", "Did you mean 'consensus_ta'?"),
        ("method.rescale=density", "consensus_ta rescales nothing here"),
    ],
)
def test_a_wrong_value_is_refused(override: str, words: str, compose: Callable[..., Run]) -> None:
    assert words in "\n".join(f.text() for f in lab.plan(compose("consensus_ta", override)).errors)


def test_models_are_counted(compose: Callable[..., Run]) -> None:
    run = compose("consensus_ta", "~experts.physics", "~experts.code")
    (finding,) = lab.plan(run).errors
    assert "consensus_ta takes at least 2 models besides the base; here is 1" in finding.text()


def test_types_of_all_kinds_are_checked(compose: Callable[..., Run], conf: Path) -> None:
    file = conf / "methods" / "scaled_sum.py"
    text = file.read_text().replace(
        "scale: float = 1.0",
        "scale: float = 1.0, how: Literal['sum', 'mean'] = 'sum', "
        "step: Annotated[Optional[int], Field(multiple_of=2)] = None, name: str = 'x'",
    )
    file.write_text("from typing import Annotated, Literal, Optional\nfrom pydantic import Field\n" + text)

    def said(*given: str) -> str:
        run = compose("scaled_sum", *(f"+method.parameters.{g}" for g in given))
        return "\n".join(f.text() for f in lab.plan(run).errors)

    assert said("how=mean", "step=4", "name=y") == ""
    assert "'meen' is none of sum, mean. Did you mean 'mean'?" in said("how=meen")
    assert "3 is not a value of step: Input should be a multiple of 2" in said("step=3")


def test_the_estimate_knows_that_whole_tensors_are_held(compose: Callable[..., Run]) -> None:
    outputs = _outputs(compose("consensus_ta"))
    largest = max(int(torch.Size(o.shape).numel()) for o in outputs)
    assert streaming_engine.worker_memory("consensus_ta", outputs, "float32") == largest * 4 * (3 * 4 + 2)
    chunks = streaming_engine.worker_memory("ties", outputs, "float32")
    assert streaming_engine.worker_memory("scaled_sum", outputs, "float32") == chunks
    small = lab.plan(compose("consensus_ta", "hardware.memory=1KB")).estimate
    bounded = lab.plan(compose("scaled_sum", "hardware.memory=1KB")).estimate
    assert small is not None and bounded is not None
    assert small.ram - bounded.ram == pytest.approx(largest * 4 * 14, abs=1000)


def _outputs(run: Run) -> list[tensor_plan.OutputTensor]:
    plan = lab.plan(run)
    assert plan.recipe is not None
    facts = {s.reference: checkpoint.weights(s.folder) for s in plan.sources if s.folder}
    return tensor_plan.assemble(plan.recipe, facts, registry.get(plan.recipe["merge_method"]))


# ---------------------------------------------------------------- what is wrong with a file


def test_a_file_that_fails_is_named_with_its_line(compose: Callable[..., Run], conf: Path) -> None:
    (conf / "methods" / "broken.py").write_text("import torch\ntorch.no_such_thing\n")
    with pytest.raises(lab.InputError, match=r"methods/broken\.py, line 2: AttributeError: .*no_such_thing"):
        lab.plan(compose("consensus_ta"))
    (conf / "methods" / "broken.py").write_text("def f(:\n")
    with pytest.raises(lab.InputError, match=r"methods/broken\.py, line 1: SyntaxError"):
        lab.plan(compose("consensus_ta"))
    (conf / "methods" / "broken.py").unlink()
    assert not lab.plan(compose("consensus_ta")).errors


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ties", "again.py: there is a merge method 'ties' already, in mergekit"),
        ("scaled_sum", "there is a merge method 'scaled_sum' already, in"),
    ],
)
def test_a_name_is_taken_once(name: str, words: str, compose: Callable[..., Run], conf: Path) -> None:
    again = conf / "methods" / "again.py"
    again.write_text(NOISY.replace("noisy", name))
    with pytest.raises(lab.InputError, match=words):
        lab.plan(compose("consensus_ta"))
    again.unlink()
    assert registry.get("ties").origin is registry.MERGEKIT  # nothing of it has stayed


@pytest.mark.parametrize(
    ("traits", "words"),
    [
        ("kernel='fast'", r"line 6: TypeError: kernel has to be a function, not 'fast'"),
        ("divides_by='normalize'", r"line 6: TypeError: noisy has no parameter normalize, weight"),
        ("exakt=True", r"line 6: TypeError: .*unexpected keyword argument 'exakt'"),
    ],
)
def test_traits_that_it_cannot_have(traits: str, words: str, compose: Callable[..., Run], conf: Path) -> None:
    (conf / "methods" / "noisy.py").write_text(NOISY.replace("random=True", traits))
    with pytest.raises(lab.InputError, match=words):
        lab.plan(compose("noisy"))


def test_mergekits_own_register_will_do(compose: Callable[..., Run], conf: Path, tmp_path: Path) -> None:
    text = NOISY.replace("mergelab.methods", "mergekit.merge_methods").replace("@register(random=True)\n", "")
    (conf / "methods" / "noisy.py").write_text(text.replace("torch.randn_like", "torch.ones_like") +
                                               "\nregister(noisy)\n")  # fmt: skip
    assert merged(compose("noisy"), tmp_path / "run").exists()
    assert registry.get("noisy").code


def test_an_installed_package_brings_methods(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "noisy_package.py").write_text(NOISY)
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("noisy", "noisy_package", "mergelab.methods")
    monkeypatch.setattr(extensions, "entry_points", lambda group: [point] if group == point.group else [])
    methods = registry._Methods()
    monkeypatch.setattr(registry, "METHODS", methods)
    assert registry.get("noisy").origin.label == "noisy_package" and registry.get("noisy").traits.random
    methods.remove("noisy")  # which mergekit knows, too


def test_it_merges_plain_tensors(compose: Callable[..., Run]) -> None:
    lab.plan(compose("consensus_ta"))
    base, experts = torch.zeros(3), [torch.tensor([1.0, 1.0, -1.0]), torch.tensor([1.0, -1.0, -1.0])]
    merge = lab.kernels.merge_tensors
    assert merge("consensus_ta", experts, {"weight": [0.5, 0.25]}, base=base).tolist() == [0.75, 0, -0.75]
    with pytest.raises(lab.InputError, match="Did you mean 'scale'"):
        merge("consensus_ta", experts, {"weight": 1, "scael": 1}, base=base)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise IndexError('out of luck')", r"line 9: IndexError: out of luck"),
        ("return group.base.tensor[:1]", r"must return a tensor of shape"),
        ("group.base.tensor.mul_(2)\n    return group.base.tensor.clone()", r"writes into its inputs"),
    ],
)
def test_a_function_that_fails_is_an_error_of_the_merge(
    body: str, words: str, compose: Callable[..., Run], conf: Path
) -> None:
    text = NOISY.replace("return group.base.tensor + size * torch.randn_like(group.base.tensor)", body)
    (conf / "methods" / "noisy.py").write_text(text)
    run = compose("noisy", "hardware.dtype=float32")
    with pytest.raises(lab.StepError, match=words):
        CandidateEvaluator(run).merge(run)


# ---------------------------------------------------------------- what decides results


def test_a_changed_function_is_another_merge(compose: Callable[..., Run], conf: Path) -> None:
    def key(method: str) -> str:
        outputs = _outputs(compose(method))
        names = {s.model: s.model for o in outputs for s in o.inputs}
        more = {"seed": 0, "rescale": "l1", "dtype": "float32", "hardware": Hardware()}
        return streaming_engine.plan(method, outputs, names, **more).key

    own, ours = key("consensus_ta"), key("task_arithmetic")
    run = compose("consensus_ta")
    file = conf / "methods" / "consensus_ta.py"
    file.write_text(file.read_text() + "\n")
    assert key("consensus_ta") != own and key("task_arithmetic") == ours
    assert identity_of(compose("consensus_ta")) != identity_of(run)
    assert "code" not in identity_of(composed())
    with pytest.raises(lab.InputError, match=r"consensus_ta\.py has changed since the run was composed"):
        lab.plan(run)


def test_the_page_runs_as_it_stands_and_a_search_evolves_it(
    family: Any, conf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the tiny family."""
    monkeypatch.chdir(conf.parent)
    page = next(b for b in blocks(PAGE) if b.startswith("import mergelab"))
    exec(compile(page, PAGE.name, "exec"), {})
    assert "fast" in capsys.readouterr().out
    (result,) = Path("outputs").rglob("result.json")
    code = registry.get("consensus_ta").code
    assert json.loads(result.read_text())["method_code"] == {"consensus_ta": code}

    small = ("method=consensus_ta", "experts=math_code", "eval.limit=2", "eval.baselines=false")
    run = lab.compose(*small, "search.population=2", "search.finalists=1", config_dir=conf)
    space = {"experts.math.weight": (0, 1.5), "method.parameters.scale": (0.5, 1.5)}
    study = lab.search(run, space=space, budget=2, folder="sweep", console=False)
    assert len(study.candidates) == 2 and study.model is not None
    with pytest.raises(lab.InputError, match=r"out of range; scale must be in \(0, 2\]"):
        lab.search(run, space={"method.parameters.scale": (0.5, 2.5)}, budget=2, folder="no", console=False)
    file = conf / "methods" / "consensus_ta.py"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(lab.InputError, match=r"holds another s[\s\S]*code\.consensus_ta"):
        lab.search(run, space=space, budget=4, folder="sweep", console=False)


def test_a_method_without_a_kernel_of_ours_goes_through_mergekits_function(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a method of a newer mergekit, of which nothing is known here."""
    from mergelab.merging import kernels

    given = ["method=slerp", f"model.base.path={folders['base']}", "experts=math_physics", "eval=none"]
    run = composed(*given, *(f"experts.{r}.path={folders[r]}" for r in ("math", "physics")))
    ours = merged(run, tmp_path / "ours")
    monkeypatch.delitem(kernels.KERNELS, "slerp")
    monkeypatch.setitem(TRAITS, "slerp", Traits())
    monkeypatch.setattr(registry.METHODS, "_rows", {})
    assert same_bits(merged(run, tmp_path / "whole"), ours)
