"""The Python face: what it gives, what it refuses, and that it leaves the process as it was found."""

from __future__ import annotations

import io
import logging
import os
import pydoc
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from blocks import blocks
from conftest import Command
from refusals import told
from rich.console import Console

import mergelab as lab
from mergelab.report import terminal

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "python.md"
SMALL = ("experts=math_code", "method=ties", "eval.limit=8", "eval.baselines=false")


@pytest.fixture
def here(family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_on_it_runs_as_it_stands(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    exec(compile("\n".join(blocks(PAGE)), PAGE.name, "exec"), {})
    out = capfd.readouterr().out
    assert "Did you mean 'ties'?" in out and "done 0." in out
    assert {p.name for p in here.iterdir()} == {"first", "merging", "merged", "sweep"}


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, mergelab; assert mergelab.__all__; print({'torch', 'hydra', 'rich'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_help_tells_of_every_public_name() -> None:
    page = pydoc.render_doc(lab, renderer=pydoc.plaintext)
    for name in ("compose", "plan", "run", "merge", "evaluate", "search"):
        assert f"\n    {name}(" in page, name
    for name in lab.__all__:
        assert getattr(lab, name) is not None
        assert name in page or name == "__version__", name
    with pytest.raises(AttributeError, match="has no attribute 'mrege'"):
        lab.mrege  # noqa: B018


# ---------------------------------------------------------------- compose and plan


@pytest.mark.parametrize(
    "wrong", ["method=tise", "seed=abc", "sed=1", "experts.math.weigth=1", "seed", "+x=[a b", "eval.limit=z"]
)
def test_compose_refuses_in_the_words_of_the_command(mergelab: Command, wrong: str) -> None:
    with pytest.raises(lab.InputError) as e:
        lab.compose(wrong)
    out = mergelab(wrong)
    assert out.status == 2
    assert told(out) == [" ".join(str(e.value).split())]


def test_compose_takes_groups_of_your_own(tmp_path: Path) -> None:
    (tmp_path / "experts").mkdir()
    (tmp_path / "experts" / "mine.yaml").write_text("# Mine.\nmath: {weight: 0.3}\n", encoding="utf-8")
    run = lab.compose("experts=mine", config_dir=tmp_path)
    assert run.experts["math"].weight == 0.3
    with pytest.raises(lab.InputError, match=r"config_dir: .* is not a folder"):
        lab.compose(config_dir=tmp_path / "nowhere")
    with pytest.raises(lab.InputError, match="no such option"):
        lab.compose("experts=mine")
    with pytest.raises(lab.InputError, match="for the command line"):
        lab.compose("hydra.run.dir=x")


def test_a_program_that_uses_hydra_itself_is_not_disturbed(tmp_path: Path) -> None:
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf
    from omegaconf.basecontainer import BaseContainer

    (tmp_path / "theirs.yaml").write_text("defaults: [run, _self_]\nown: ${mine:1}\n", encoding="utf-8")
    before = ConfigStore.instance().repo.get("run.yaml")
    ConfigStore.instance().store("run", {"of": "theirs"}, replace=True)
    OmegaConf.register_new_resolver("mine", lambda x: x + 1, replace=True)
    try:
        with hydra.initialize_config_dir(str(tmp_path), version_base=None):
            known = dict(BaseContainer._resolvers)
            assert lab.compose("method=ties").method.name == "ties"
            assert known == BaseContainer._resolvers
            assert hydra.compose("theirs") == {"of": "theirs", "own": 2}
            with pytest.raises(lab.InputError):
                lab.compose("method=tise")
            assert hydra.compose("theirs").of == "theirs"
        assert not GlobalHydra.instance().is_initialized()
        assert not HydraConfig.initialized()
    finally:
        OmegaConf.clear_resolver("mine")
        ConfigStore.instance().repo.pop("run.yaml")
        if before is not None:
            ConfigStore.instance().repo["run.yaml"] = before


def test_plan_has_the_findings_and_writes_nothing(here: Path) -> None:
    plan = lab.plan(lab.compose(*SMALL))
    assert plan.recipe is not None and plan.recipe["merge_method"] == "ties"
    assert plan.estimate is not None and plan.estimate.read > 0
    assert plan.errors == []
    wrong = lab.plan(lab.compose(*SMALL, "experts.math.density=3", "experts.code.weight=heavy"))
    assert [f.place for f in wrong.errors] == ["experts.math.density", "experts.code.weight"]
    assert list(here.iterdir()) == []


def test_compose_and_plan_may_be_called_from_threads(here: Path) -> None:
    found: dict[int, Any] = {}

    def work(seed: int) -> None:
        run = lab.compose(*SMALL, f"seed={seed}")
        found[seed] = run.seed, lab.plan(run).errors

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == {seed: (seed, []) for seed in range(4)}


# ---------------------------------------------------------------- a run that was changed


def test_what_was_changed_after_composing_is_recorded_and_can_be_repeated() -> None:
    from mergelab import composition

    run = lab.compose("experts=math_code", "experts.math.weight={mlp: 0.1, *: 0.5}")
    run.experts["math"].weight = {"self_attn": 0.1, "*": [0.3, 0.8]}
    run.experts["mine"] = replace(run.experts["code"], path="it's/here", prompts=["a 'b' \\' c", "d, {e}"])
    del run.experts["code"]
    run.method.parameters["lambda"] = 0.7
    run.seed, run.output, run.eval.limit = 3, "out", 0.25
    told_so = composition.recomposed(run)
    again = lab.compose(*told_so.overrides)
    assert again == run
    assert told_so.overrides[:1] == ["experts=math_code"]
    assert composition.arguments(lab.compose("method=ties")) == ["method=ties"]


def test_a_run_that_no_arguments_compose_is_refused(here: Path) -> None:
    run = lab.compose("experts=math_code")
    run.method.parameters["a}b"] = 1
    with pytest.raises(lab.InputError, match="cannot be expressed as arguments"):
        lab.run(run, "out", console=False)
    assert list(here.iterdir()) == []


# ---------------------------------------------------------------- run


@pytest.fixture(scope="module")
def first(family: Any, tmp_path_factory: pytest.TempPathFactory) -> lab.Result:
    """A small run that has ended."""
    run = lab.compose(*SMALL)
    run.experts["math"].weight = 0.4
    return lab.run(run, tmp_path_factory.mktemp("api") / "first", console=False)


def test_a_result_is_result_json_typed(first: lab.Result, tmp_path: Path) -> None:
    assert first.folder is not None
    assert first.status == "done" and first.error is None
    score = first.scores["merged"]["validation"]["math"]
    assert isinstance(score, lab.Score) and 0 <= score.value <= 1 and score.samples == 8
    assert first.fitness is not None and first.split == "search"
    assert first.model is not None and (first.model / "config.json").exists()
    assert first.command is not None and first.command.endswith("experts.math.weight=0.4")
    assert lab.compose(*first.overrides).experts["math"].weight == 0.4
    assert first.key and first.seed == 0 and first.timings["merge"] >= 0 and first.versions["torch"]
    assert [m["name"] for m in first.inputs] == ["base", "math", "code"]
    again = lab.Result.load(first.folder)
    assert again == first
    assert again.save(tmp_path).read_bytes() == (first.folder / "result.json").read_bytes()
    assert again.save(tmp_path / "copy.json") == tmp_path / "copy.json"
    assert lab.Result.load(tmp_path / "copy.json").data == first.data


def test_a_number_that_json_does_not_know_comes_back() -> None:
    score = {"value": "nan", "stderr": None, "samples": 1, "metric": "m", "higher_is_better": True,
             "task": "t", "others": {"x": "inf"}}  # fmt: skip
    result = lab.Result({"status": "done", "metrics": {"merged": {"validation": {"m": score}}}})
    found = result.scores["merged"]["validation"]["m"]
    assert found.value != found.value and found.others == {"x": float("inf")}


def test_what_is_not_a_result_is_refused(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("[]", encoding="utf-8")
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(lab.InputError):
            lab.Result.load(path)


def test_a_run_leaves_what_the_command_leaves(first: lab.Result, mergelab: Command) -> None:
    out = mergelab(*first.overrides)
    assert out.status == 0, out.err
    assert first.folder is not None
    own = {p.relative_to(first.folder).as_posix() for p in first.folder.rglob("*")}
    theirs = {p.relative_to(out.folder).as_posix() for p in out.folder.rglob("*")}
    assert theirs - own == {".hydra/hydra.yaml"} and own <= theirs
    assert out.result["key"] == first.key and out.result["metrics"] == first.data["metrics"]
    assert out.result["choices"] == first.data["choices"]


def test_the_log_tells_the_story(first: lab.Result) -> None:
    assert first.folder is not None
    log = (first.folder / "mergelab.log").read_text(encoding="utf-8")
    assert f"command: {first.command}" in log
    for step in ("preflight", "merge", "verify", "evaluate", "report"):
        assert f"{step}: started" in log and f"{step}: done in " in log
    assert "engine: fast" in log and '"merge_method": "ties"' in log and "estimate in bytes" in log
    assert "fitness" in log


def test_the_log_has_a_failures_traceback_and_what_libraries_warn_of(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import warnings

    from mergelab.merging import fast_backend

    def broken(*_: Any, **__: Any) -> None:
        warnings.warn("this is deprecated", FutureWarning, stacklevel=1)
        logging.getLogger("some.library").warning("it looks odd")
        raise ZeroDivisionError("nothing to divide by")

    monkeypatch.setattr(fast_backend, "merge", broken)
    with pytest.raises(ZeroDivisionError):
        lab.run(lab.compose(*SMALL), "out", console=False)
    log = Path("out/mergelab.log").read_text(encoding="utf-8")
    assert "FutureWarning: this is deprecated" in log and "it looks odd" in log
    assert "merge: did not finish" in log and "Traceback" in log and "nothing to divide by" in log
    result = lab.Result.load("out")
    assert result.status == "failed" and (result.error or "").startswith("ZeroDivisionError: nothing to")


def test_refusals_are_exceptions_told_all_at_once(first: lab.Result, here: Path) -> None:
    with pytest.raises(lab.InputErrors) as e:
        lab.run(
            lab.compose(*SMALL, "experts.math.density=3", "experts.code.density=-1"), "out", console=False
        )
    assert len(e.value.messages) == 2
    assert lab.Result.load("out").status == "invalid"
    assert first.folder is not None
    with pytest.raises(lab.InputError, match="holds a finished run"):
        lab.run(lab.compose(*SMALL), first.folder, console=False)
    with pytest.raises(lab.InputError, match=r"mergelab\.search"):
        lab.run(lab.compose("search=cma"))
    with pytest.raises(lab.InputError, match="a task on a cluster"):
        lab.run(lab.compose("hardware=slurm"))


def test_the_process_is_left_as_it_was_found(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import huggingface_hub.constants
    import torch

    import mergelab.api  # noqa: F401 (its imports are not the run's doing)

    def state() -> dict[str, Any]:
        own = logging.getLogger("mergelab")
        return {
            "environment": dict(os.environ),
            "handlers": [*logging.getLogger().handlers],
            "levels": [logging.getLogger().level, own.level, logging.getLogger("transformers").level],
            "offline": huggingface_hub.constants.HF_HUB_OFFLINE,
            "threads": torch.get_num_threads(),
            "random": torch.get_rng_state().tolist(),
        }

    run = lab.compose(*SMALL)
    before = state()
    lab.run(run, "out", console=False)
    assert state() == before
    assert capfd.readouterr() == ("", "")


def test_offline_holds_for_as_long_as_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as hub

    from mergelab.jobs import offline

    for name in offline.NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    with offline.where_local(lab.compose()):
        assert os.environ["HF_HUB_OFFLINE"] == "1" and hub.HF_HUB_OFFLINE is True
    assert "HF_HUB_OFFLINE" not in os.environ and hub.HF_HUB_OFFLINE is False
    with offline.where_local(lab.compose("model=qwen7b")):
        assert "HF_HUB_OFFLINE" not in os.environ and hub.HF_HUB_OFFLINE is False


def test_a_console_gets_what_the_terminal_would(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    console = Console(file=io.StringIO(), width=80)
    lab.merge(lab.compose(*SMALL), "merged", folder="run", console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "✓ merge" in text and "✓ verify" in text and "evaluate" not in text
    assert capfd.readouterr() == ("", "")


def test_plans_made_at_the_same_time_leave_the_terminal_as_it_was() -> None:
    before = terminal.console, terminal.errors
    first, second = terminal.shown_on(False), terminal.shown_on(False)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # as in two threads: the first to begin ends first
    assert terminal.console.quiet
    second.__exit__(None, None, None)
    assert (terminal.console, terminal.errors) == before


def test_a_second_run_at_the_same_time_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergelab.steps import preflight

    started, told_so = threading.Event(), threading.Event()
    make_plan = preflight.make_plan

    def slow(*arguments: Any, **options: Any) -> Any:
        started.set()
        assert told_so.wait(60)
        return make_plan(*arguments, **options)

    monkeypatch.setattr(preflight, "make_plan", slow)
    results: list[lab.Result] = []
    thread = threading.Thread(
        target=lambda: results.append(lab.merge(lab.compose(*SMALL), "one", folder="a", console=False))
    )
    thread.start()
    assert started.wait(60)
    with pytest.raises(lab.InputError, match="another run is in progress in this process"):
        lab.merge(lab.compose(*SMALL), "two", folder="b", console=False)
    told_so.set()
    thread.join()
    assert results[0].status == "done" and not Path("two").exists()


# ---------------------------------------------------------------- merge, evaluate, search, kernels


def test_merge_takes_mergekits_recipes(here: Path) -> None:
    models = [{"model": f"zoo:{n}", "parameters": {"weight": 0.5}} for n in ("math", "code")]
    recipe = {"merge_method": "linear", "dtype": "float32", "models": models}
    one = lab.merge(recipe, folder="one", console=False)
    assert one.model == here / "one" / "model" and one.scores == {}
    path = here / "one" / "recipe.yaml"
    two = lab.merge(path, "two", folder="second", console=False)
    assert two.model == here / "two"
    assert (two.model / "model.safetensors").read_bytes() == (one.model / "model.safetensors").read_bytes()
    with pytest.raises(lab.InputError, match="is not a merge method"):
        lab.merge({**recipe, "merge_method": "linaer"}, folder="three", console=False)
    with pytest.raises(lab.InputError, match="cannot read"):
        lab.merge("nowhere.yaml", folder="four", console=False)


def test_evaluate_finds_the_model_in_many_ways(first: lab.Result, here: Path) -> None:
    def math(model: Any) -> float:
        return lab.evaluate(model, "tiny_math", limit=8, console=False)["tiny_math"].value

    assert first.folder is not None and first.model is not None
    values = {math(first), math(first.folder), math(str(first.model))}
    assert values == {first.scores["merged"]["validation"]["math"].value}
    assert math("zoo:math") > math("zoo:base")
    assert [p.name for p in here.iterdir()] == []


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("zoo:math", {"tasks": "tiny_mth"}, "Did you mean 'tiny_math'"),
        ("zoo:meth", {"tasks": "tiny_math"}, "model: "),
        ("nowhere/at/all", {"tasks": "tiny_math"}, "model: "),
        ("zoo:math", {"tasks": []}, "eval.tasks"),
        ("zoo:math", {"tasks": "tiny_math", "limit": -1}, "eval.limit"),
        ("zoo:math", {"tasks": "tiny_math", "device": "cuda:9"}, "hardware.device"),
    ],
)
def test_evaluate_refuses(here: Path, model: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(lab.InputError, match=words):
        lab.evaluate(model, **options, console=False)


def test_search_goes_on_and_gives_a_table(here: Path) -> None:
    run = lab.compose(*SMALL, "search.population=2", "search.finalists=1")
    space = {"experts.{math,code}.weight": (0, 1.5)}
    study = lab.search(run, space=space, budget=2, folder="sweep", console=False)
    assert [c.number for c in study.candidates] == [0, 1]
    before = Path("sweep/journal.jsonl").read_text(encoding="utf-8").splitlines()
    study = lab.search(run, space=space, budget=4, folder="sweep", console=False)
    after = Path("sweep/journal.jsonl").read_text(encoding="utf-8").splitlines()
    assert after[:4] == before[:4] and len(study.candidates) == 4
    assert study.best is not None and set(study.best.genome) == {"experts.math.weight", "experts.code.weight"}
    assert study.model is not None and (study.model / "config.json").exists()
    rows = study.rows()
    assert [r["number"] for r in rows] == [0, 1, 2, 3]
    assert list(study.dataframe().columns) == list(rows[0])
    best = lab.compose(*study.overrides)
    assert best.method.name == "ties" and list(best.experts) == ["math", "code"]
    assert best.experts["math"].weight == study.best.genome["experts.math.weight"]
    assert lab.Study.load("sweep") == study
    assert study.result is not None and "search=cma" in str(study.result.command)
    with pytest.raises(lab.InputError, match="holds another sweep"):
        lab.search(run, space={"experts.math.weight": (0, 1)}, budget=2, folder="sweep", console=False)


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"experts.math.weigth": (0, 1)}, "Did you mean 'weight'"),
        ({"experts.math.weight": (0, 1, 2)}, "is not a range"),
        ({"experts.math.weight": (2, 3)}, "outside interval"),
        ({}, "there is nothing to search"),
    ],
)
def test_search_refuses_a_wrong_space(here: Path, space: dict[str, Any], words: str) -> None:
    with pytest.raises(lab.InputError, match=words):
        lab.search(lab.compose(*SMALL), space=space, console=False)
    assert list(here.iterdir()) == []


def test_a_study_is_read_from_a_sweeps_folder_only(tmp_path: Path) -> None:
    with pytest.raises(lab.InputError, match="not the folder of a search"):
        lab.Study.load(tmp_path)


def test_kernels_take_mergekits_defaults_and_refuse_what_is_unknown() -> None:
    import torch

    base = torch.zeros(4)
    experts = [torch.tensor([1.0, -2.0, 0.1, 0.0]), torch.tensor([1.0, 2.0, 0.2, 0.0])]
    merge = lab.kernels.merge_tensors
    # TIES: of each the larger half stays; signs are elected by sum; those that agree are averaged.
    ties = merge("ties", experts, {"weight": 1.0, "density": 0.5}, base=base)
    assert ties.tolist() == [1.0, 2.0, 0.0, 0.0]
    assert merge("linear", experts, {"weight": [1, 3]}).tolist() == pytest.approx([1.0, 1.0, 0.175, 0.0])
    assert merge("dare_ties", experts, {"weight": 1.0, "density": 0.5}, base=base).shape == (4,)
    with pytest.raises(lab.InputError, match="Did you mean 'ties'"):
        merge("tise", experts)
    with pytest.raises(lab.InputError, match="Did you mean 'density'"):
        merge("ties", experts, {"densty": 0.5}, base=base)
