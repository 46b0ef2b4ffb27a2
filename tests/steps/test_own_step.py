"""A step of one's own, as the page on it shows it."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from blocks import files
from conftest import Command

import mergelab as lab
from mergelab.jobs import STEPS
from mergelab.schema import Run, settings_of

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "add-a-job.md"


@pytest.fixture
def my_conf(tmp_path: Path) -> Path:
    for name, text in files(PAGE).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / "my_conf"


def test_the_page_on_it_runs_as_it_stands(my_conf: Path, mergelab: Command, family: Any) -> None:
    done = mergelab("--config-dir", str(my_conf), "job=count", "count.unit=1000", "count.only=[base,math]")
    assert done.status == 0, done.err
    assert "✓ count      base 126, math 126" in done.out, done.out
    assert done.result["parameters"] == {"base": 126, "math": 126} and done.result["status"] == "done"
    assert done.result["command"].startswith(f"python -m mergelab --config-dir {my_conf}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["count.unit=many"], "'many' is not a whole number"),
        (["count.unti=1"], "count.unti: there is no key 'unti'. Did you mean 'unit'? There are only, unit."),
        (["count.unit=0"], "count.unit: 0 is out of range; at least 1"),
        (["job=plan", "count.unit=2"], "count.unit: job=plan does not use it"),
        (["job.steps=[count]"], "job.steps: 'count' has to come after 'preflight'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_its_settings_are_checked_like_ours(my_conf: Path, arguments: list[str], message: str) -> None:
    try:
        run = lab.compose("job=count", *arguments, config_dir=my_conf)
        found = "\n".join(f.text() for f in lab.plan(run).errors)
    except lab.InputError as e:
        found = str(e)
    assert message in found


def test_a_run_with_it_reaches_other_processes(my_conf: Path) -> None:
    run = lab.compose("job=count", "count.unit=7", config_dir=my_conf)
    assert settings_of(run)["count"] == {"only": [], "unit": 7}
    file = my_conf / "run.pickle"
    file.write_bytes(pickle.dumps(run))
    code = f"import pickle; print(pickle.load(open({str(file)!r}, 'rb')).count)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "Count(only=[], unit=7)\n"


def test_without_the_folder_nothing_of_it_is_there(my_conf: Path) -> None:
    lab.compose("job=count", config_dir=my_conf)
    run = lab.compose()
    assert type(run) is Run and "count" not in settings_of(run)
    with pytest.raises(lab.InputError, match="there is no key 'count'"):
        lab.compose("count.unit=1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_of_that_name", "own.py, line 1: ModuleNotFoundError"),
        ("from mergelab.jobs import Step, register\nregister(Step('merge', print))",
         "there is a step 'merge' already, in mergelab"),
        ("from dataclasses import dataclass\nfrom mergelab.jobs import Step, register\n"
         "@dataclass\nclass S:\n    x: int = 0\nregister(Step('method', print, settings=S))",
         "cannot become the section 'method'"),
        ("from mergelab.jobs import Step, register\nregister(Step('mine', print, settings=int))",
         "the settings of step 'mine' are not a dataclass"),
    ],
    ids=["import", "name", "section", "settings"],
)  # fmt: skip
def test_a_file_that_is_wrong_is_one_message(
    tmp_path: Path, mergelab: Command, text: str, message: str
) -> None:
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "own.py").write_text(text, encoding="utf-8")
    done = mergelab("--config-dir", str(tmp_path), "eval=none", "job=plan")
    assert done.status == 2 and message in " ".join(done.err.split()), done.err
    assert "Traceback" not in done.err


def test_only_steps_are_in_steps() -> None:
    folder = Path(lab.__file__).parent / "steps"
    assert {f.stem for f in folder.glob("[!_]*.py")} == {
        n for n in STEPS.names() if STEPS.origin(n).digest == ""
    }
