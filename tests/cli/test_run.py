"""The whole, as a user meets it: one command, a folder, a table, an exit status."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Command


@pytest.fixture(scope="module")
def default_run(family: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bare command, in a process and a directory of its own."""
    where = tmp_path_factory.mktemp("newcomer")
    done = subprocess.run(
        [sys.executable, "-m", "mergelab"], cwd=where, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    (where / "stdout").write_text(done.stdout, encoding="utf-8")
    (where / "stderr").write_text(done.stderr, encoding="utf-8")
    (folder,) = (where / "outputs").glob("*/*")
    return folder


def result_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "result.json").read_text(encoding="utf-8")))


def means(result: dict[str, Any]) -> dict[str, float]:
    return {
        model: sum(s["value"] for s in splits["validation"].values()) / len(splits["validation"])
        for model, splits in result["metrics"].items()
    }


def test_the_merged_model_beats_every_parent_on_all_skills_together(default_run: Path) -> None:
    mean = means(result_of(default_run))
    merged = mean.pop("merged")
    assert set(mean) == {"base", "math", "physics", "code", "japanese"}
    assert merged > max(mean.values()) + 0.1


def test_no_expert_is_good_at_everything(default_run: Path) -> None:
    metrics = result_of(default_run)["metrics"]
    for role in ("math", "physics", "code", "japanese"):
        scores = {n: s["value"] for n, s in metrics[role]["validation"].items()}
        assert scores.pop(role) > 0.8
        assert min(scores.values()) < 0.3


def test_the_table_is_what_was_measured(default_run: Path) -> None:
    out = (default_run.parents[2] / "stdout").read_text(encoding="utf-8")
    for model, splits in result_of(default_run)["metrics"].items():
        cells = [f"{s['value']:.3f} ±{s['stderr']:.3f}" for s in splits["validation"].values()]
        assert any(
            line.split("  ")[0] == model and all(c in line for c in cells) for line in out.splitlines()
        )
    assert out.index("merged ") < out.index("\nbase ")


def test_the_terminal_is_calm(default_run: Path) -> None:
    where = default_run.parents[2]
    assert (where / "stderr").read_text(encoding="utf-8") == ""
    out = (where / "stdout").read_text(encoding="utf-8")
    assert not any(word in out for word in ("WARNING", "INFO", "it/s", "Traceback"))
    assert all(len(line) <= 80 for line in out.splitlines())


def test_the_folder_of_a_run(default_run: Path) -> None:
    names = {p.name for p in default_run.iterdir()}
    assert names == {
        ".hydra", "mergelab.log", "events.jsonl", "plan.json", "recipe.yaml", "model", "result.json",
    }  # fmt: skip
    events = [json.loads(x) for x in (default_run / "events.jsonl").read_text().splitlines()]
    done = [e["step"] for e in events if e["event"] == "step" and e["state"] == "done"]
    assert done == ["preflight", "merge", "verify", "evaluate", "report"]


def test_result_json_says_what_is_needed_to_repeat_the_run(default_run: Path) -> None:
    result = result_of(default_run)
    assert (result["schema"], result["status"], result["seed"]) == (1, "done", 0)
    assert result["choices"]["method"] == "dare_ties"
    assert result["fitness"]["split"] == "search"
    searched = result["metrics"]["merged"]["search"]
    assert result["fitness"]["value"] == pytest.approx(
        sum(s["value"] for s in searched.values()) / len(searched)
    )
    for entry in result["inputs"]:
        assert len(entry["files"]["model.safetensors"]) == 64
    documented = (Path(__file__).parents[2] / "docs" / "reference" / "result.md").read_text(encoding="utf-8")
    for key in result:
        assert f"`{key}`" in documented, f"docs/reference/result.md does not say what {key} is"


def test_the_card_can_be_published(default_run: Path) -> None:
    card = (default_run / "model" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers"
    result = result_of(default_run)
    merged = result["metrics"]["merged"]["validation"]["math"]
    assert f"{merged['value']:.3f} ±{merged['stderr']:.3f}" in card
    assert "merge_method: dare_ties" in card and "zoo:math" in card and result["key"] in card
    assert os.environ["MERGELAB_HOME"] not in card


def test_the_same_command_gives_the_same_key_scores_and_weights(mergelab: Command, default_run: Path) -> None:
    again = mergelab()
    first = result_of(default_run)
    assert again.result["key"] == first["key"]
    assert again.result["metrics"] == first["metrics"]
    weights = [f / "model" / "model.safetensors" for f in (default_run, again.folder)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_the_key_changes_with_what_determines_the_result_and_with_nothing_else(mergelab: Command) -> None:
    def key(*more: str) -> str:
        out = mergelab("eval=none", *more)
        assert out.status == 0, out.err
        return str(out.result["key"])

    first = key()
    assert key("hardware.threads=1", "hardware.shard_size=1MB", "tracking.project=other") == first
    for change in ("seed=1", "experts.math.weight=0.4", "hardware.dtype=bfloat16", "experts=stem"):
        assert key(change) != first, change


def test_scores_of_unchanged_models_are_not_measured_twice(
    mergelab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergelab.evaluation import Evaluator

    assert mergelab("eval.limit=8").status == 0
    measured: set[str] = set()
    original = Evaluator._keep

    def keep(self: Any, fingerprint: str, *arguments: Any) -> None:
        measured.add(fingerprint)
        original(self, fingerprint, *arguments)

    monkeypatch.setattr(Evaluator, "_keep", keep)
    assert mergelab("eval.limit=8", "experts.math.weight=0.45").status == 0
    assert len(measured) == 1  # the new merge alone


def test_a_sweep_ends_with_one_comparison(mergelab: Command) -> None:
    out = mergelab("-m", "method=linear,ties", "eval.limit=16")
    assert out.status == 0, out.err
    rows = list(csv.reader((out.folder / "comparison.csv").open(encoding="utf-8")))
    assert rows[0] == ["run", "method", "math", "physics", "code", "japanese", "mean", "fitness"]
    assert {rows[1][1], rows[2][1]} == {"linear", "ties"}
    assert float(rows[1][-1]) >= float(rows[2][-1])
    assert rows[3][1] == "parent base"
    assert "best first" in out.out
    _, told = out.out.split("best on")
    best = {line.split()[0]: line.split()[1] for line in told.splitlines() if len(line.split()) > 2}
    for i, measure in enumerate(["math", "physics", "code", "japanese"], start=2):
        top = max(rows[1:3], key=lambda r: float(r[i]))
        if rows[1][i] != rows[2][i]:
            assert best[measure] == top[0]


def test_a_fitness_of_zero_is_a_fitness(tmp_path: Path) -> None:
    from mergelab.report.sweep_comparison import collect

    for number, fitness in enumerate((None, -1.0, 0.0, 0.5)):
        (tmp_path / str(number)).mkdir()
        result = {"fitness": None if fitness is None else {"value": fitness}}
        (tmp_path / str(number) / "result.json").write_text(json.dumps(result), encoding="utf-8")
    assert [r["number"] for r in collect(tmp_path)] == ["3", "2", "1", "0"]


def test_no_run_of_a_sweep_starts_where_one_is_invalid(mergelab: Command) -> None:
    out = mergelab("-m", "method=ties,slerp", "experts.math.density=0.5,3", "eval.limit=8")
    assert out.status == 2
    for part in (
        "run 1 (method=ties experts.math.density=3",
        "slerp takes exactly 2 models",
        "slerp takes no",
    ):
        assert part in out.err
    assert not list(out.folder.glob("*/result.json"))
    out = mergelab("-m", "experts.math.wieght=1,2")
    assert out.status == 2
    assert "run 1 (experts.math.wieght=2)" in out.err and "Did you mean 'weight'?" in out.err
    assert not list(out.folder.glob("*/result.json"))


def test_a_run_that_fails_does_not_stop_the_others(
    mergelab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergelab.core.errors import StepError
    from mergelab.merging import mergekit_backend

    original = mergekit_backend.merge

    def merge(recipe: Any, *arguments: Any, **named: Any) -> None:
        if recipe["merge_method"] == "ties":
            raise StepError("by design")
        original(recipe, *arguments, **named)

    monkeypatch.setattr(mergekit_backend, "merge", merge)
    out = mergelab("-m", "method=ties,linear", "eval.limit=8", "hardware.engine=mergekit")
    assert out.status == 1
    assert "by design" in out.err
    rows = list(csv.reader((out.folder / "comparison.csv").open(encoding="utf-8")))
    assert [r[:2] for r in rows[1:3]] == [["1", "linear"], ["0 (failed)", "ties"]]


def test_any_sweeper_gets_the_fitness(mergelab: Command) -> None:
    out = mergelab(
        "-m", "hydra/sweeper=nevergrad", "hydra.sweeper.optim.optimizer=CMA", "hydra.sweeper.optim.budget=4",
        "hydra.sweeper.optim.num_workers=2", "hydra.sweeper.optim.maximize=true", "eval.baselines=false",
        "eval.limit=8", "experts.math.weight=interval(0.1,1)", "experts.code.weight=interval(0.1,1)",
    )  # fmt: skip
    assert out.status == 0, out.err
    best = yaml.safe_load((out.folder / "optimization_results.yaml").read_text(encoding="utf-8"))
    values = [result_of(f)["fitness"]["value"] for f in out.folder.iterdir() if (f / "result.json").exists()]
    assert len(values) == 4
    assert best["best_evaluated_result"] == pytest.approx(max(values))


def test_perplexity_of_a_text(mergelab: Command, tmp_path: Path) -> None:
    text = tmp_path / "my.txt"
    text.write_text("12+3=51\n\nrev(abc)cba\n\nさしす>sashisu\n", encoding="utf-8")
    out = mergelab("eval=perplexity", f"eval.text={text}")
    assert out.status == 0, out.err
    (score,) = out.result["metrics"]["merged"]["validation"].values()
    assert score["metric"] == "bits_per_byte" and not score["higher_is_better"]
    assert out.result["fitness"]["value"] == pytest.approx(-score["value"])


def test_tasks_of_lm_eval_by_name(mergelab: Command, family: Any) -> None:
    out = mergelab("eval=lm_eval", "eval.tasks=[tiny_math,tiny_code]", "eval.limit=8", "eval.num_fewshot=0")
    assert out.status == 0, out.err
    assert list(out.result["metrics"]["merged"]["validation"]) == ["tiny_math", "tiny_code"]


def test_data_that_cannot_be_read_shows_before_the_merge(mergelab: Command) -> None:
    out = mergelab("eval=lm_eval", "eval.tasks=[gsm8k]")
    assert out.status == 2
    assert "openai/gsm8k" in out.err and "load_dataset" in out.err and "Traceback" not in out.err
    assert not (out.folder / "model").exists()


def test_evaluate_and_check_a_finished_model(mergelab: Command, default_run: Path) -> None:
    out = mergelab("job=evaluate", f"evaluate.path={default_run / 'model'}", "eval.limit=8")
    assert out.status == 0, out.err
    assert list(out.result["metrics"]) == ["merged", "base", "math", "physics", "code", "japanese"]
    out = mergelab("job=check", f"check.path={default_run / 'model'}")
    assert out.status == 0, out.err
    assert out.result["check"]["problems"] == []


def test_check_compares_the_composed_models(mergelab: Command) -> None:
    out = mergelab("job=check")
    assert out.status == 0, out.err
    assert "architecture   Qwen2" in out.out and "5 models fit together" in out.out


def test_plan_of_a_family_that_is_not_here(mergelab: Command) -> None:
    out = mergelab("model=qwen32b", "method=dare_ties", "job=plan")
    assert out.status == 0, out.err
    for part in ("Qwen/Qwen2.5-32B", "merge_method: dare_ties", "327.6 GB", "hf download", "could not be"):
        assert part in out.out, part
    assert not (out.folder / "model").exists()


def test_an_unexpected_failure_is_one_message_and_the_log_has_the_traceback(
    mergelab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergelab.steps import merge

    def fail(*_: Any) -> str:
        raise ZeroDivisionError("by design")

    monkeypatch.setattr(merge, "_fast", fail)
    out = mergelab("eval=none")
    assert out.status == 1
    assert "ZeroDivisionError: by design" in out.err and "Traceback" not in out.err
    assert "Traceback" in (out.folder / "mergelab.log").read_text(encoding="utf-8")
    assert out.result["status"] == "failed" and out.result["error"]["step"] == "merge"


def test_two_runs_do_not_work_in_one_folder(mergelab: Command, tmp_path: Path) -> None:
    from mergelab.core.run_dir import RunDir

    folder = tmp_path / "shared"
    first = RunDir(folder, folder / "model")
    with first.lock():
        first.begin({"seed": 7})
        out = mergelab("eval=none", folder=folder)
    assert out.status == 2 and "another run is working in" in out.err
    assert out.result["seed"] == 7
    assert mergelab("eval=none", folder=folder).status == 0


def test_a_finished_run_is_never_overwritten(mergelab: Command, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    assert mergelab("eval=none", folder=folder).status == 0
    kept = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "lock")
    before = [f.read_bytes() for f in kept]
    out = mergelab("eval=none", "seed=1", folder=folder)
    assert out.status == 2 and "holds a finished run" in out.err
    assert [f.read_bytes() for f in kept] == before


def test_interrupted_by_the_user(family: Any, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "mergelab", "eval.cache=false"], cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(tmp_path.glob("outputs/*/*/plan.json")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted" in err and "Traceback" not in err
    assert not list(tmp_path.glob("outputs/*/*/.model.partial"))
