"""What is measured and what is wrong with it, known without a model: measures, task files, checks."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_tasks import write_rows, write_task

from mergelab.core.errors import StepError
from mergelab.core.hashing import digest
from mergelab.evaluation import Measure, Score, check, fitness, measures
from mergelab.evaluation.task_hash import definition
from mergelab.evaluation.task_index import Catalogue, packaged, scan
from mergelab.schema import Evaluation, Model, Run, Skill

ROWS = [{"prompt": "a", "answer": "b"}]
SHIPPED = Path(str(importlib.util.find_spec("lm_eval").origin)).parent / "tasks"  # type: ignore[union-attr]


def skills_run(**settings: Any) -> Run:
    """Two skills, of which one has a task for searches."""
    skills = {
        "math": Skill(validation="m", search="m_search", metric="acc", share=3.0),
        "code": Skill(validation="c"),
    }
    return Run(model=Model(name="family", skills=skills), eval=Evaluation(kind="skills", **settings))


def tasks_run(*tasks: str, **settings: Any) -> Run:
    return Run(eval=Evaluation(kind="tasks", tasks=list(tasks), **settings))


# --- measures and fitness


def test_measures_of_each_kind() -> None:
    run = skills_run(shares={"code": 0.5}, metrics={"math": "exact_match"})
    assert measures(run) == [Measure("math", "m", "exact_match", 3.0), Measure("code", "c", None, 0.5)]
    assert measures(run, "search") == [Measure("math", "m_search", "exact_match", 3.0)]
    run = tasks_run("gsm8k", "mmlu", shares={"mmlu": 2.0})
    assert measures(run) == [Measure("gsm8k", "gsm8k"), Measure("mmlu", "mmlu", None, 2.0)]
    assert measures(run, "search") == []
    perplexity = Run(eval=Evaluation(kind="perplexity", text="my.txt"))
    assert measures(perplexity) == [Measure("text", "text")]
    assert measures(perplexity, "search") == []
    assert measures(Run(eval=Evaluation(kind="none"))) == []
    with pytest.raises(ValueError, match="choose validation or search"):
        measures(run, "test")


def score(value: float, higher: bool = True) -> Score:
    return Score(value, None, 10, "acc" if higher else "bits_per_byte", higher, "t")


def test_fitness_is_the_mean_by_shares_and_less_is_better_enters_negated() -> None:
    both = [Measure("a", "t", share=3), Measure("b", "t", share=1)]
    assert fitness({"a": score(0.5), "b": score(0.1), "c": score(9)}, both) == pytest.approx(0.4)
    assert fitness({"a": score(0.5), "b": score(2, higher=False)}, both) == pytest.approx(-0.125)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_fitness_from_numbers_that_are_none(value: float, share: float) -> None:
    both = [Measure("good", "t"), Measure("sick", "task_s", share=share)]
    with pytest.raises(StepError, match=rf"'sick' \(task task_s\): acc is {value}"):
        fitness({"good": score(1), "sick": score(value)}, both)


def test_no_fitness_without_scores_or_shares() -> None:
    with pytest.raises(StepError, match=r"'b' .* has not been measured"):
        fitness({"a": score(1)}, [Measure("a", "t"), Measure("b", "t")])
    with pytest.raises(StepError, match="shares of the 1 measures add up to 0"):
        fitness({"a": score(1)}, [Measure("a", "t", share=0)])


# --- the index


@pytest.mark.parametrize("folder", ["mmlu/default", "glue", "lambada", "truthfulqa", "squadv2"])
def test_the_index_is_lm_evals_own(folder: str) -> None:
    from lm_eval.tasks import TaskManager

    theirs = TaskManager(include_defaults=False, include_path=str(SHIPPED / folder)).task_index
    ours, problems = scan(SHIPPED / folder)
    assert problems == [] and theirs
    assert set(ours) == set(theirs)
    for name, entry in theirs.items():
        assert ours[name].kind == entry.kind.name.lower().removeprefix("py_")
        assert ours[name].file == entry.yaml_path
        if entry.kind.name == "TAG":
            assert set(ours[name].members) == entry.tags


def test_lm_eval_is_shown_every_folder_a_group_needs() -> None:
    from lm_eval.tasks import TaskManager

    catalogue = Catalogue([])
    needed = {part.name for part in catalogue.closure("leaderboard")}
    assert len(needed) > 30
    folders = catalogue.include_path(["leaderboard"])
    assert needed <= set(TaskManager(include_defaults=False, include_path=folders).task_index)


def test_own_folders_hide_what_is_shipped(tmp_path: Path) -> None:
    write_task(tmp_path / "a", "gsm8k", ROWS)
    write_task(tmp_path / "b", "gsm8k", ROWS, description="later")
    catalogue = Catalogue([tmp_path / "a", tmp_path / "b"])
    found = catalogue.find("gsm8k")
    assert found is not None and found.config["description"] == "later"
    assert catalogue.include_path(["gsm8k"]) == [tmp_path / "a", tmp_path / "b"]
    assert packaged()["gsm8k"].config["dataset_path"] == "openai/gsm8k"


# --- what a task is, by content


def test_a_definition_changes_with_all_that_it_is_made_of(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    write_task(folder, "one", ROWS, include="base.inc", doc_to_text=None)
    (folder / "base.inc").write_text("doc_to_text: !function helper.text\nprocess_docs: null\n")
    (folder / "helper.py").write_text("def text(doc): return doc['prompt']\n")
    (folder / "all.yaml").write_text("group: all\ntask: [one]\naggregate_metric_list: [{metric: acc}]\n")

    def of(name: str) -> str:
        found = definition(Catalogue([folder]), name)
        assert found is not None
        return digest(found)

    before = {name: of(name) for name in ("one", "all")}
    assert before == {name: of(name) for name in ("one", "all")}
    for file, addition in {
        "one.yaml": "description: more\n",
        "base.inc": "repeats: 2\n",
        "helper.py": "# more\n",
        "one.jsonl": '{"prompt": "c", "answer": "d"}\n',
    }.items():
        original = (folder / file).read_text()
        (folder / file).write_text(original + addition)
        for name in ("one", "all"):
            assert of(name) != before[name], file
        (folder / file).write_text(original)
    write_task(folder, "other", ROWS)
    assert {name: of(name) for name in ("one", "all")} == before


def test_what_cannot_be_known_has_no_definition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "tasks"
    write_task(folder, "far", ROWS, dataset_path="org/data", dataset_kwargs=None)
    write_task(folder, "web", ROWS, dataset_kwargs={"data_files": "https://example.org/x.jsonl"})
    pinned = "0123456789" * 4
    write_task(folder, "pinned", ROWS, dataset_path="org/data", dataset_kwargs={"revision": pinned})
    made = folder / "made"
    write_task(made, "made", ROWS, dataset_path=None, dataset_kwargs=None, custom_dataset="x")
    write_task(made, "kept", ROWS, custom_dataset="x", dataset_kwargs={}, metadata={"self_contained": True})
    (folder / "py.yaml").write_text("task: py\nclass: !function code.Task\n")
    catalogue = Catalogue([folder])
    assert catalogue.problems == []
    for name in ("far", "web", "made", "py"):
        assert definition(catalogue, name) is None, name
    assert definition(catalogue, "pinned") is not None
    ref = tmp_path / "hub" / "datasets--org--data" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text("aaa")
    first = definition(catalogue, "far")
    ref.write_text("bbb")
    assert None is not first != definition(catalogue, "far")
    before = definition(catalogue, "kept")
    (made / "anything").write_text("read by the code")
    assert None is not before != definition(catalogue, "kept")


def test_a_fingerprint_is_of_the_content_not_of_its_order() -> None:
    assert digest({"a": "1", "b": "2"}) == digest({"b": "2", "a": "1"})
    assert digest({"a": "1"}) != digest({"a": "2"}) != digest({"b": "2"})


# --- checks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Task files of all sorts, all of them sound."""
    folder = tmp_path / "tasks"
    for name in ("m", "m_search", "c"):
        write_task(folder, name, ROWS, metric_list=[{"metric": "acc"}, {"metric": "exact_match"}])
    write_task(folder, "filtered", ROWS, filter_list=[{"name": "strict", "filter": []}], tag="tagged")
    write_task(folder, "unsafe", ROWS, unsafe_code=True)
    write_task(folder, "seeing", ROWS, doc_to_image="x")
    listed: dict[str, Any] = {"bare": {}, "whole": {"aggregate_metric_list": [{"metric": "acc"}]}}
    for name, more in listed.items():
        text = yaml.safe_dump({"group": name, "task": ["m", "c"], **more})
        (folder / f"{name}.yaml").write_text(text)
    return folder


def problems(run: Run, folder: Path | None = None) -> dict[str, str]:
    found = check(run, tasks_path=folder)
    assert all(f.severity == "error" for f in found)
    out = {f.place: f.message for f in found}
    assert len(out) == len(found), "one key, two problems"
    return out


def test_what_is_sound_has_no_problems(folder: Path, tmp_path: Path) -> None:
    assert problems(skills_run(limit=0.5, num_fewshot=0, max_length=64), folder) == {}
    sound = tasks_run("m", "whole", "filtered", metrics={"filtered": "exact_match,strict", "whole": "acc"})
    assert problems(sound, folder) == {}
    sound.eval.include_path = str(folder)
    assert problems(sound) == {}
    assert problems(tasks_run("gsm8k", "mmlu", limit=10.0)) == {}
    (tmp_path / "my.txt").write_text("words\n")
    text = Evaluation(kind="perplexity", text=str(tmp_path / "my.txt"), metrics={"text": "byte_perplexity"})
    assert problems(Run(eval=text)) == {}
    assert problems(Run(eval=Evaluation(kind="none", batch_size=-1))) == {}


def test_everything_wrong_is_told_at_once(folder: Path) -> None:
    run = skills_run(
        shares={"maths": 1.0}, metrics={"cod": "acc", "math": "acuracy"},
        include_path="nowhere",
    )  # fmt: skip
    run.model.skills["math"].search = "m_serch"
    run.model.skills["code"].validation = "unsafe"
    found = problems(run, folder)
    assert found.keys() == {
        "eval.shares.maths", "eval.metrics.cod", "eval.metrics.math", "eval.include_path",
        "model.skills.math.search", "model.skills.code.validation",
    }  # fmt: skip
    for key, near in {
        "eval.shares.maths": "math",
        "eval.metrics.cod": "code",
        "eval.metrics.math": "acc",
        "model.skills.math.search": "m_search",
    }.items():
        assert f"Did you mean '{near}'?" in found[key] or near == "acc", found[key]
    assert "'acuracy'; it has acc, exact_match." in found["eval.metrics.math"]
    assert "nowhere is not a folder" in found["eval.include_path"]
    assert "runs code" in found["model.skills.code.validation"]


@pytest.mark.parametrize(
    "task, message",
    [
        ("gsm8k_cott", "no lm_eval task 'gsm8k_cott'. Did you mean 'gsm8k_cot'?"),
        ("tagged", "has no score of its own; name its tasks: filtered"),
        ("bare", "has no score of its own; name its tasks: m, c"),
        ("unsafe", "runs code"),
        ("seeing", "shows images"),
    ],
)
def test_tasks_that_give_no_number(folder: Path, task: str, message: str) -> None:
    assert message in problems(tasks_run(task), folder)["eval.tasks"]


@pytest.mark.parametrize(
    "task, metric, message",
    [
        ("m", "exact_mach", "Did you mean 'exact_match'?"),
        ("m", "acc,strict", "it has acc,none, exact_match,none."),
        ("filtered", "exact_match,strickt", "Did you mean 'exact_match,strict'?"),
        ("whole", "exact_match", "it has acc."),
    ],
)
def test_metrics_that_a_task_does_not_declare(folder: Path, task: str, metric: str, message: str) -> None:
    run = tasks_run(task, metrics={task: metric})
    assert message in problems(run, folder)[f"eval.metrics.{task}"]


def test_kinds() -> None:
    found = problems(Run(eval=Evaluation(kind="skill")))
    assert "There are skills, tasks, perplexity, none" in found["eval.kind"]
    assert "Did you mean 'skills'?" in found["eval.kind"]
    assert "names no skills" in problems(Run(model=Model(name="m")))["eval.kind"]
    assert "is empty" in problems(tasks_run())["eval.tasks"]
    assert "names 'gsm8k' twice" in problems(tasks_run("gsm8k", "gsm8k"))["eval.tasks"]


def test_shares_that_make_no_fitness(folder: Path) -> None:
    run = skills_run()
    run.model.skills["math"].share = 0.0
    assert problems(run, folder) == {
        "eval.shares": "all shares of the search split are 0, which makes no fitness"
    }
    zero = tasks_run("m", "c", shares={"m": 0.0, "c": 0.0})
    assert "validation split" in problems(zero, folder)["eval.shares"]


def test_tasks_of_a_family_that_is_not_here_yet_are_taken_on_trust() -> None:
    run = skills_run()
    assert len(problems(run)) == 3
    run.model.tasks = "zoo:tasks"
    assert problems(run) == {}


def test_texts_that_cannot_be_read(tmp_path: Path) -> None:
    def wrong(text: str | None) -> str:
        return problems(Run(eval=Evaluation(kind="perplexity", text=text)))["eval.text"]

    assert "is not set" in wrong(None)
    assert "No such file" in wrong(str(tmp_path / "missing.txt"))
    (tmp_path / "blank.txt").write_text("\n \n\t\n")
    assert "holds no text" in wrong(str(tmp_path / "blank.txt"))
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    assert "is not UTF-8 (byte 3)" in wrong(str(tmp_path / "latin.txt"))
    metric = Evaluation(kind="perplexity", text=str(tmp_path / "x"), metrics={"text": "bits"})
    assert "bits_per_byte" in problems(Run(eval=metric))["eval.metrics.text"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("task: [unclosed", "expected ',' or ']'"),
        ("task: 3\n", "task must be a name, not 3"),
        ("- a list\n", "a mapping was expected, not list"),
        ("task: x\ninclude: none.inc\n", "No such file"),
        ("task: x\ninclude: bad.yaml\n", "includes itself"),
        ("task: m\n", "'m' is defined twice"),
        ("group: g\ntask: [m, nothing]\naggregate_metric_list: [{metric: acc}]\n", None),
    ],
)
def test_broken_task_files(folder: Path, content: str, message: str | None) -> None:
    (folder / "bad.yaml").write_text(content)
    if message is None:
        assert "lists 'nothing', which is not a task" in problems(tasks_run("g"), folder)["eval.tasks"]
        return
    found = problems(tasks_run("c"), folder)
    assert list(found) == ["model.tasks"]
    assert "bad.yaml" in found["model.tasks"] and message in found["model.tasks"]


def test_a_group_may_define_tasks_on_the_spot(folder: Path) -> None:
    inline = {
        "group": "g",
        "task": [{"task": "inline", "dataset_path": "json"}, {"group": "sub", "task": ["m"]}],
    }
    text = yaml.safe_dump({**inline, "aggregate_metric_list": [{"metric": "acc"}]})
    (folder / "g.yaml").write_text(text)
    assert problems(tasks_run("g"), folder) == {}
    write_rows(folder / "m.jsonl", ROWS * 2)
    changed = definition(Catalogue([folder]), "g")
    write_rows(folder / "m.jsonl", ROWS)
    assert None is not changed != definition(Catalogue([folder]), "g")
