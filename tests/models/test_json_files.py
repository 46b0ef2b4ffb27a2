"""What a model folder's JSON files may hold."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from broken_models import Models

from mergelab.merging import model_files
from mergelab.models import checkpoint
from mergelab.models.json_files import load_json

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
LFS = "Run `git lfs pull` in its folder, or fetch the file from the hub."


def test_why_a_file_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for content, said, remedy in (
        (b'\xef\xbb\xbf{"a": 1}', "begins with a byte order mark", "Save it as UTF-8 without that mark."),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8", "Again."),
        (b'{"a": 1,}', "is not JSON (line 1", "Again."),
        (POINTER, "is a pointer of Git LFS", LFS),
    ):
        file.write_bytes(content)
        value, (finding,) = load_json(file, "key", "Again.")
        assert value is None
        assert said in finding.message
        assert finding.remedy == remedy


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "tokenizer.json", "tokenizer.model"]
)
def test_a_pointer_in_the_place_of_a_file_is_told(name: str, models: Models) -> None:
    """To fetch the repository again with git would bring the pointer again."""
    folder = models["base"]
    for other in folder.glob("*.safetensors" if name.startswith(("model", "pytorch")) else "tokenizer.json"):
        other.unlink()
    if name == "tokenizer.model":
        models.text("base", "tokenizer_config.json", '{"tokenizer_class": "LlamaTokenizer"}')
    (folder / name).write_bytes(POINTER)
    (finding,) = checkpoint.read(folder, "base", pickled=True).findings
    assert (finding.severity, finding.code, finding.remedy) == ("error", "corrupt", LFS)
    assert finding.message == f"{folder / name} is a pointer of Git LFS to the file, not the file"


def test_a_number_that_json_does_not_know_goes_along_as_it_is(models: Models, tmp_path: Path) -> None:
    models.config("base", attention_dropout=math.nan, time_step_limit=[0.0, math.inf])
    read = checkpoint.read(models["base"], "base")
    assert read.findings == ()
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_bytes((models["base"] / "model.safetensors").read_bytes())
    model_files.write_config(models["base"], out, {}, {})
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert math.isnan(config["attention_dropout"])
    assert config["time_step_limit"] == [0.0, math.inf]
