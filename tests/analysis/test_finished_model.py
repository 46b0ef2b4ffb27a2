"""job=check check.path=DIR: a finished model read back, loaded, and compared with its parents."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from conftest import Command
from weights import change


def test_a_sound_model_beside_the_parents_of_its_run(mergelab: Command) -> None:
    made = mergelab("eval=none")
    out = mergelab("job=check", f"check.path={made.folder}")
    assert out.status == 0, out.err
    found = out.result["perplexity"]
    assert list(found) == ["this model", "base", "math", "physics", "code", "japanese"]
    assert all(v["bits_per_byte"] > 0 and v["stderr"] > 0 for v in found.values())
    assert out.result["model"] == str(made.folder / "model")
    assert "all finite" in out.out and "bits per byte" in out.out
    again = mergelab("job=check", f"check.path={made.folder / 'model'}")
    assert again.result["perplexity"] == found


def test_a_text_of_ones_own(mergelab: Command, family: object, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("507+3=015\n\n123+1=421\n", encoding="utf-8")
    model = tmp_path / "model"
    shutil.copytree(family.checkpoint("math"), model)  # type: ignore[attr-defined]
    out = mergelab("job=check", f"check.path={model}", f"check.text={text}")
    assert out.status == 0, out.err
    assert "on own.txt (2 texts" in out.out
    bits = {n: v["bits_per_byte"] for n, v in out.result["perplexity"].items()}
    assert bits["this model"] == bits["math"]  # it is that very model


def test_a_merge_that_became_noise(mergelab: Command, tmp_path: Path) -> None:
    made = mergelab("eval=none")

    def shout(tensors: dict) -> None:  # type: ignore[type-arg]
        for name, t in tensors.items():
            if name == "model.norm.weight":  # very sure of itself
                t *= 30

    change(made.folder / "model", shout)
    out = mergelab("job=check", f"check.path={made.folder}")
    assert out.status == 1
    assert "has become noise" in out.err and "Traceback" not in out.err


def test_without_parents_it_says_so(mergelab: Command, make_model: object, tmp_path: Path) -> None:
    model = make_model(tmp_path / "other", "llama")  # type: ignore[operator]
    out = mergelab("job=check", f"check.path={model}")
    assert out.status == 0, out.err
    assert "no parents here to compare it with" in out.out


def test_what_is_wrong_is_told(mergelab: Command, tmp_path: Path) -> None:
    out = mergelab("job=check", f"check.path={tmp_path / 'nowhere'}")
    assert out.status == 2 and "check.path:" in out.err
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / "result.json").write_text(json.dumps({"status": "failed"}), encoding="utf-8")
    out = mergelab("job=check", f"check.path={tmp_path / 'failed'}")
    assert out.status == 2 and "its run is failed" in out.err
    made = mergelab("eval=none")
    out = mergelab("job=check", f"check.path={made.folder}", "check.text=nowhere.txt")
    assert out.status == 2 and "check.text" in out.err
    out = mergelab("check.text=x.txt", "eval=none")
    assert out.status == 2 and "check.text" in out.err
