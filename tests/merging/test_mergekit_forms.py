"""Files in the forms that people write: merged to the bits that `mergekit-yaml` gives for the same file, and
to numbers computed here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from broken_models import Models
from conftest import Command
from weights import mergekit_yaml, same_bits, weights

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def merged(m: Models, mergelab: Command, text: str, *more: str) -> Path:
    """The model that a file makes, with the models' folders filled in."""
    out = mergelab(*m.yaml(text.format(**{n: m[n] for n in ("base", "math", "physics")})), *more)
    assert out.status == 0, out.err
    assert out.result["check"]["problems"] == []
    return out.folder / "model"


ODD = """
name: odd
env: &x {{parameters: {{weight: 1}}}}
models:
  - model: {{model: {{path: {math}}}}}
    parameters: {{weight: "0.25", density: [], t: 0.1, normalize: false}}
  - {{model: {physics}, revision: main, <<: *x}}
  - {{model: {base}, parameters: {{weight: [true, 0.5]}}}}
merge_method: linear
base_model: {base}
parameters: {{normalize: 1.0, int8_mask: 1.0, weight: [{{filter: "*", value: 3}}, {{value: 2}}]}}
dtype: float32
normalize: false
dtype: float32
"""


def test_what_mergekit_ignores_changes_no_bit(models: Models, mergelab: Command, tmp_path: Path) -> None:
    made = merged(models, mergelab, ODD)
    assert same_bits(made, mergekit_yaml(models.folder / "my.yaml", tmp_path / "own"))


def test_a_slice_of_no_layers_gives_its_head(models: Models, mergelab: Command, tmp_path: Path) -> None:
    for seed, name in enumerate(("math", "physics")):
        models.again(name, "llama", seed=seed, tied=False)
    text = """
merge_method: linear
dtype: float32
slices:
  - sources:
      - {{model: {math}, layer_range: [0, 3], parameters: {{weight: 1}}}}
      - {{model: {physics}, layer_range: [0, 3], parameters: {{weight: 1}}}}
  - sources: [{{model: {math}, layer_range: [0, 0], parameters: {{weight: 1}}}}]
"""
    made = merged(models, mergelab, text)
    out, math, physics = (weights(f) for f in (made, models["math"], models["physics"]))
    for name in ("model.norm.weight", HEAD):
        assert torch.equal(out[name], math[name])
    assert torch.allclose(out[EMBED], (math[EMBED] + physics[EMBED]) / 2)
    assert same_bits(made, mergekit_yaml(models.folder / "my.yaml", tmp_path / "own"))


MEAN = """
merge_method: linear
dtype: float32
models:
  - {{model: {math}, parameters: {{weight: 1}}}}
  - {{model: {physics}, parameters: {{weight: 1}}}}
"""


def test_rows_that_only_pad_are_cut_off_where_that_is_allowed(models: Models, mergelab: Command) -> None:
    models.again("math", vocab_size=320)
    made = merged(models, mergelab, MEAN, "allow=[vocabulary]")
    math, physics = weights(models["math"])[EMBED], weights(models["physics"])[EMBED]
    assert torch.allclose(weights(made)[EMBED], (math[:304] + physics) / 2)
    assert json.loads((made / "config.json").read_text(encoding="utf-8"))["vocab_size"] == 304


def tokens(folder: Path) -> dict[str, int]:
    """The vocabulary of a model's tokenizer."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return dict(content["model"]["vocab"]) | {t["content"]: t["id"] for t in content["added_tokens"]}


def test_an_empty_tokenizer_averages_the_rows_of_the_same_tokens(models: Models, mergelab: Command) -> None:
    models.swap_two_ids("physics")
    made = merged(models, mergelab, MEAN + "tokenizer: {{}}\n")
    out, math, physics = (weights(f)[EMBED] for f in (made, models["math"], models["physics"]))
    new, first, second = tokens(made), tokens(models["math"]), tokens(models["physics"])
    assert first != second
    for token in first.keys() & second.keys():
        assert torch.allclose(out[new[token]], (math[first[token]] + physics[second[token]]) / 2), token


def test_a_union_has_the_same_ids_in_every_process(models: Models, mergelab: Command, tmp_path: Path) -> None:
    """New tokens were added in the order of a hash map of Rust's, which differs in every process."""
    file = models["physics"] / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    for token in "#$%&'()*":
        vocabulary[f"new{token}"] = vocabulary.pop(token)
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    made = merged(models, mergelab, MEAN + "tokenizer_source: union\n")
    again = tmp_path / "again"
    arguments = [
        "method=mergekit",
        f"method.path={models.folder}/my.yaml",
        "eval=none",
        f"hydra.run.dir={again}",
    ]
    subprocess.run(
        [sys.executable, "-m", "mergelab", *arguments], check=True, env=os.environ | {"PYTHONHASHSEED": "7"}
    )
    composed = [mergelab(*models.arguments("model.tokenizer=union")).folder / "model" for _ in range(2)]
    for one, other in ((made, again / "model"), composed):
        assert same_bits(one, other)
        assert tokens(one) == tokens(other)
    new, own = tokens(made), tokens(models["physics"])
    assert [new[f"new{t}"] for t in "#$%&'()*"] == list(range(304, 312))  # in the order of their ids there
    out, physics = weights(made)[EMBED], weights(models["physics"])[EMBED]
    assert all(torch.allclose(out[new[t]], physics[own[t]]) for t in own if t.startswith("new"))
