"""A user's own kind of evaluation, as docs/howto/add-an-evaluation.md describes it."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from blocks import blocks, commands, files

import mergelab as lab
from mergelab import context, evaluation
from mergelab.core import registry
from mergelab.core.errors import InputError, StepError
from mergelab.optimization.candidate_evaluator import CandidateEvaluator, search_measures
from mergelab.schema import Evaluation, Run

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "add-an-evaluation.md"
CODE = files(PAGE)["my_conf/evaluations/length.py"]


@pytest.fixture
def my_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's two files where it says."""
    monkeypatch.setattr(registry, "_used", None)
    monkeypatch.chdir(tmp_path)
    for name, text in files(PAGE).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / "my_conf"


def composed(*arguments: str, my_conf: Path) -> Run:
    run = lab.compose(*arguments, config_dir=my_conf)
    registry.use_extensions(run.composition)
    return run


def test_the_commands_of_the_page(my_conf: Path, family: Any) -> None:
    evaluate, shorter, search = ([a for a in c[2:] if a != "-m"] for c in commands(PAGE))
    result = lab.run(composed(*evaluate, my_conf=my_conf), "first", console=False)
    assert set(result.scores) == {"base", "math", "code"}
    score = result.scores["math"]["validation"]["length"]
    assert (score.metric, score.higher_is_better, score.samples) == ("tokens", False, 3)
    assert 0 < score.value <= 8 and score.stderr is not None

    run = composed(*shorter, my_conf=my_conf)
    assert (
        lab.plan(run).errors == [] and evaluation.score_settings(run.eval)["options"]["max_new_tokens"] == 4
    )

    run = composed(*search, my_conf=my_conf)
    study = lab.search(run, folder="sweep", console=False)
    assert study.result is not None and study.result.status == "done"
    assert study.result.split == "search" and study.result.fitness is not None
    assert study.result.fitness < 0  # fewer tokens are better
    assert {"winner", "preset", "base"} <= set(study.result.scores)


def test_wrong_options_are_refused(my_conf: Path) -> None:
    told = [line.removeprefix("✗ ") for text in blocks(PAGE, "text") for line in text.splitlines()]
    for options, message in (
        (["eval.options.max_new_tokens=many"], told[0]),
        (["eval.options.prompt=[a]"], told[1]),
        (["eval.options.max_new_tokens=0"], "eval.options: max_new_tokens=0 is too small; at least 1"),
        (["eval.tasks=[gsm8k]"], "eval.tasks: has no effect with eval.kind=length; use eval=lm_eval"),
    ):
        run = composed("eval=length", *options, my_conf=my_conf)
        assert [f.text() for f in evaluation.check(run)] == [message]
    known = composed("eval=skills", "eval.options.x=1", my_conf=my_conf)
    assert [f.text() for f in evaluation.check(known)] == ["eval.options: eval.kind=skills has no options"]


def test_a_search_needs_search_data_and_a_loaded_model(my_conf: Path) -> None:
    run = composed("eval=length", "eval.options.search_prompts=[]", my_conf=my_conf)
    with pytest.raises(InputError, match=r"(?s)on which its result is reported.*options\.search_prompts"):
        search_measures(run)
    allowed = replace(run, eval=replace(run.eval, allow_test_split=True))
    assert [m.task for m in search_measures(allowed)] == ["validation"]
    file = my_conf / "evaluations" / "length.py"
    code = file.read_text().replace("def score(self, model, tokenizer,", "def score_folder(self, folder,")
    file.write_text(code)
    run = composed("eval=length", my_conf=my_conf)
    with pytest.raises(InputError, match="measures a model's folder"):
        search_measures(run)


def test_a_score_is_known_by_code_options_and_model(my_conf: Path) -> None:
    run = composed("eval=length", my_conf=my_conf)

    def key(settings: Evaluation) -> str:
        (measure,) = evaluation.measures(run)
        found = evaluation.Evaluator(settings, hardware=run.hardware).key("model", measure)
        assert found is not None
        return found

    first = key(run.eval)
    assert first == key(run.eval)
    assert first != key(replace(run.eval, options={**run.eval.options, "max_new_tokens": 3}))
    assert first != key(replace(run.eval, limit=1.0))
    assert evaluation.score_settings(run.eval)["options"]["max_new_tokens"] == 8
    (my_conf / "evaluations" / "length.py").write_text(CODE + "\n# changed\n")
    run = composed("eval=length", my_conf=my_conf)
    assert first != key(run.eval)


def test_a_failure_names_the_kind(my_conf: Path) -> None:
    file = my_conf / "evaluations" / "length.py"
    model = type("Model", (), {"num_parameters": lambda self: 1})()
    for body, message in (("1 / 0", r"length\.py, line \d+: ZeroDivisionError"), ("7", "not a Score")):
        file.write_text(CODE.replace("lengths = []", f"return {body}"))
        run = composed("eval=length", my_conf=my_conf)
        with pytest.raises(StepError, match=message) as raised:
            context.evaluator(run).score(model, None, evaluation.measures(run))
        assert "eval.kind=length" in str(raised.value)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("Length())", "Length)", "'length' is not an object of a subclass of EvaluationKind"),
        ("@dataclass\nclass", "class", "the options of 'length' are not a dataclass"),
        ("if prompts else", "if prompt else", "NameError: name 'prompt' is not defined"),
        ("lass Length", "lass 5", "SyntaxError: invalid"),
    ],
)
def test_what_is_wrong_with_the_code_names_the_line(
    before: str, after: str, message: str, my_conf: Path
) -> None:
    (my_conf / "evaluations" / "length.py").write_text(CODE.replace(before, after))
    run = composed("eval=length", my_conf=my_conf)
    with pytest.raises(InputError, match=rf"length\.py, line \d+: .*{message}"):
        evaluation.measures(run)


def test_another_process_knows_the_kind(my_conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = composed("eval=length", "experts=math_code", my_conf=my_conf)
    sent = pickle.dumps(run)
    monkeypatch.setattr(registry, "_used", None)
    assert "length" not in evaluation.KINDS
    CandidateEvaluator(pickle.loads(sent))
    assert "length" in evaluation.KINDS
