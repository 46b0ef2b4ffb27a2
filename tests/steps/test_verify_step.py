"""A merged model that is not sound, or could not be checked, is kept where nobody takes it for a result."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from broken_models import Models
from conftest import Command
from safetensors.torch import load_file

from mergelab.core.folders import free_name
from mergelab.steps import verify as step

NORM = "model.norm.weight"


def test_an_unsound_model_is_set_aside(mergelab: Command, models: Models) -> None:
    models.tensors("math", lambda t: t[NORM].view(-1)[3].fill_(float("nan")))
    out = mergelab(*models.arguments(method="linear"))
    aside = out.folder / "model.unsound"
    assert out.status == 1 and "Traceback" not in out.err
    said = " ".join(out.err.split())
    assert f"is not sound, and is kept in {aside}: {NORM} has 1 entry" in said
    assert f"so has {NORM} of math" in said
    assert load_file(aside / "model.safetensors")[NORM].isnan().sum() == 1
    assert out.result["set_aside"] == str(aside)
    assert "model" not in out.result
    assert [p.name for p in out.folder.iterdir() if "model" in p.name] == ["model.unsound"]


def test_a_model_whose_check_fails_is_kept_and_can_be_checked_again(
    mergelab: Command, models: Models, tmp_path: Path
) -> None:
    models.text("base", "chat_template.jinja", "{{ raise_exception('not to me') }}")
    place = tmp_path / "out" / "mine"
    for n in ("", "2"):
        out = mergelab(*models.arguments(f"output={place}"))
        aside = place.with_name(f"mine.unchecked{n}")
        assert out.status == 1
        said = " ".join(out.err.split())
        assert f"could not be checked to the end, and is kept in {aside}: its chat template" in said
        assert "not to me" in said and f"job=check check.path={aside}" in said
        assert out.result["set_aside"] == str(aside)
        assert out.result["check"]["ran"] == "generates"
        assert out.result["error"]["step"] == "verify"
    assert sorted(p.name for p in place.parent.iterdir()) == ["mine.unchecked", "mine.unchecked2"]
    assert mergelab("job=check", f"check.path={aside}").status == 1
    (aside / "chat_template.jinja").unlink()
    assert mergelab("job=check", f"check.path={aside}").status == 0


def test_a_fault_of_the_check_itself_loses_nothing(
    mergelab: Command, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise KeyError(322)

    monkeypatch.setattr(step, "verify_model", fails)
    out = mergelab(*models.arguments())
    assert out.status == 1
    assert (
        "the verification failed: KeyError: there is no entry 322 (steps/test_verify_step.py, line" in out.err
    )
    assert (out.folder / "model.unchecked" / "model.safetensors").is_file()


def test_a_place_that_was_taken_meanwhile(
    mergelab: Command, models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place, verified = tmp_path / "mine", step.verify_model

    def takes_a_while(*args: Any, **options: Any) -> Any:
        (place / "sub").mkdir(parents=True)
        return verified(*args, **options)

    monkeypatch.setattr(step, "verify_model", takes_a_while)
    out = mergelab(*models.arguments(f"output={place}"))
    assert out.status == 1
    assert f"The merged model is kept in {tmp_path / '.mine.partial'}" in " ".join(out.err.split())
    assert (tmp_path / ".mine.partial" / "model.safetensors").is_file()


def test_numbers_that_json_has_no_word_for_stay_in_config_json(mergelab: Command, models: Models) -> None:
    for name in ("base", "math", "physics"):
        models.config(name, attention_dropout=float("nan"), of_ones_own=[0.0, float("inf")])
    out = mergelab(*models.arguments())
    assert out.status == 0, out.err
    written = json.loads((out.folder / "model" / "config.json").read_text(encoding="utf-8"))
    assert math.isnan(written["attention_dropout"])
    assert written["of_ones_own"] == [0.0, math.inf]


def test_a_name_that_is_free(tmp_path: Path) -> None:
    model = tmp_path / "model"
    assert free_name(model, "unsound") == tmp_path / "model.unsound"
    for name in ("model.unsound", "model.unsound2"):
        (tmp_path / name).mkdir()
    assert free_name(model, "unsound") == tmp_path / "model.unsound3"
