"""Verify a written model by reading it back from the disk, before it is presented as a result.

Every tensor is read once, one at a time, to find NaN. Then transformers loads the model as a user would.
On the CPU this maps the files into memory without copying, so no memory beyond the model's size is
needed, and a machine with less memory reads from the disk again.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergelab.core.errors import first_line
from mergelab.core.library_output import silence_libraries
from mergelab.merging import smoke_test
from mergelab.models import checkpoint, remote_code
from mergelab.schema import Hardware

log = logging.getLogger(__name__)


@dataclass
class Report:
    """What was checked, and what was found."""

    folder: Path
    tensors: int = 0
    parameters: int = 0
    nbytes: int = 0
    dtype: str | None = None
    smoke: smoke_test.SmokeTest = field(default_factory=smoke_test.SmokeTest)
    problems: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """One line on a sound model."""
        tied = ", tied embeddings" if self.smoke.tied else ""
        return f"{self.tensors} tensors, all finite{tied}, loads, generates"

    def json(self) -> dict[str, Any]:
        """As result.json has it."""
        return {
            "tensors": self.tensors, "parameters": self.parameters, "bytes": self.nbytes,
            "tied": self.smoke.tied, "dtype": self.dtype, "prompt": self.smoke.prompt,
            "text": self.smoke.text, "problems": self.problems,
        }  # fmt: skip


def verify(
    folder: Path,
    *,
    hardware: Hardware,
    inputs: Mapping[str, Path] | None = None,
    prompt: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Report:
    """Check a model folder by reading all of it, loading it in transformers and generating.

    Args:
        folder: The model.
        hardware: The device on which it generates, if it fits there.
        inputs: The models and adapters it was made from, to name the one that contains a NaN.
        prompt: The text to continue; None: a short text, or a few tokens of its vocabulary.
        trust_remote_code: Whether code that comes with it may run.
        progress: Called with the number of tensors read.

    Returns:
        A report, whose `problems` are empty for a sound model.
    """
    facts = checkpoint.read(folder, str(folder))
    report = Report(folder, len(facts.tensors), facts.parameters, facts.nbytes, facts.dtype)
    report.problems = [f.message for f in facts.findings if f.severity == "error"]
    code = remote_code.check(folder, str(folder), allowed=trust_remote_code)
    report.problems += [f"{f.message}. {f.remedy}" for f in code if f.severity == "error"]
    if not report.problems:
        report.problems = [*_check_finite(facts, inputs or {}, progress), *_check_companions(facts)]
    if not report.problems:
        with silence_libraries():
            report.problems = list(_check_shapes(facts, trust_remote_code))
            if not report.problems:
                report.smoke = smoke_test.run(
                    folder,
                    facts.nbytes,
                    hardware=hardware,
                    prompt=prompt,
                    trust_remote_code=trust_remote_code,
                )
                report.problems = report.smoke.problems
    return report


def _check_finite(
    facts: checkpoint.ModelMetadata, inputs: Mapping[str, Path], progress: Callable[[str, int, int], None]
) -> Iterator[str]:
    """Report the first tensor that is not finite; further ones would have the same cause."""
    files: dict[str, list[str]] = {}
    for name, header in facts.tensors.items():
        files.setdefault(header.file, []).append(name)
    done = 0
    for file, names in files.items():
        for name, tensor in _tensors(Path(file), names):
            done += 1
            progress("verify", done, len(facts.tensors))
            if not smoke_test.is_finite(tensor):
                count = int((~tensor.isfinite()).sum())
                noun = "entry that is" if count == 1 else "entries that are"
                yield f"{name} has {count:,} {noun} NaN or infinite{_culprit(name, inputs)}"
                return


def _tensors(file: Path, names: list[str] | None = None) -> Iterator[tuple[str, Any]]:
    """The tensors of a safetensors file, one at a time: all of them, or the named ones."""
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as f:
        for name in f.keys() if names is None else names:
            yield name, f.get_tensor(name)


def _culprit(name: str, inputs: Mapping[str, Path]) -> str:
    """Name the input that a NaN comes from, or another cause.

    Slices move layers, and adapters name their tensors differently. So the same part of every layer of
    every input is searched.
    """
    part = re.sub(r"^.*\.\d+\.", "", name).rpartition(".")[0]
    for model, folder in inputs.items():
        for file in sorted(folder.glob("*.safetensors")):
            for other, tensor in _tensors(file):
                if part in other and not smoke_test.is_finite(tensor):
                    return f"; so has {other} of {model}: {file} is damaged, fetch it again"
    return "; the inputs are finite: lower the weights, or compute in float32" if inputs else ""


def _check_companions(facts: checkpoint.ModelMetadata) -> Iterator[str]:
    if not facts.has_tokenizer:
        yield facts.no_tokenizer
    types, layers = facts.text_config.get("layer_types"), facts.text_config.get("num_hidden_layers")
    if isinstance(types, list) and len(types) != layers:
        yield f"{facts.folder / 'config.json'} has {len(types)} layer_types for {layers} layers"


def _check_shapes(facts: checkpoint.ModelMetadata, trusted: bool) -> Iterator[str]:
    """Check that shapes are those of transformers' own model of this config, and that tied tensors agree."""
    import torch
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(facts.folder, trust_remote_code=trusted)
        with torch.device("meta"):
            model = smoke_test.empty(config, trust_remote_code=trusted)
    except Exception as e:  # transformers raises exceptions of every type for a config that it cannot use
        log.exception("no model of this config")
        yield f"transformers cannot build a model from {facts.folder / 'config.json'}: {first_line(e)}"
        return
    wanted = {n: tuple(p.shape) for n, p in model.state_dict().items()}
    for name, header in facts.tensors.items():
        if name in wanted and header.shape != wanted[name]:
            yield f"{name} has shape {list(header.shape)}, but by config.json it has {list(wanted[name])}"
    if config.get_text_config().tie_word_embeddings:
        for first, second in dict(model._tied_weights_keys or {}).items():
            if {first, second} <= set(facts.tensors) and not _equal(facts, first, second):
                yield f"{first} differs from {second}, although config.json says that they are tied"


def _equal(facts: checkpoint.ModelMetadata, *names: str) -> bool:
    one, other = (next(_tensors(Path(facts.tensors[n].file), [n]))[1] for n in names)
    return bool(one.shape == other.shape and (one == other).all())
