"""Verify a written model by reading it back from the disk, before it is presented as a result.

Every tensor is read once, one at a time, to find NaN. Then transformers loads the model as a user would.
On the CPU this maps the files into memory without copying, so no memory beyond the model's size is
needed, and a machine with less memory reads from the disk again.

Two things are kept apart: what is wrong with the model, and what could not be found out because a part of the
verification failed itself. Neither is a reason to remove it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergelab.core.findings import first_few
from mergelab.core.library_output import silence_libraries
from mergelab.merging import smoke_test
from mergelab.merging.model_inputs import is_finite
from mergelab.models import blueprint, checkpoint, layer_settings, remote_code, tokenizers
from mergelab.models.compatibility import generic
from mergelab.schema import Hardware

log = logging.getLogger(__name__)

OF_MERGES = ("dtype", "quantized")
"""Codes of what keeps a model's weights from being averaged, and is not a fault of a finished model."""


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
    """What is wrong with the model."""
    unchecked: list[str] = field(default_factory=list)
    """What could not be found out, with the reason."""
    notes: list[str] = field(default_factory=list)
    """What is worth knowing, and the same in a model that it was made from."""

    def summary(self) -> str:
        """One line on a sound model: what was done to find that out."""
        tied = ", tied embeddings" if self.smoke.tied else ""
        return f"{self.tensors} tensors, all finite{tied}, loads, {self.smoke.ran}"

    @property
    def sound(self) -> bool:
        """Whether everything was checked, and nothing is wrong."""
        return not self.problems and not self.unchecked

    def verdict(self, more: str = "") -> str:
        """What is to be said of a model that is not sound, or of which that is not known, with the reasons.

        Args:
            more: goes before the reasons, such as ` and was not sent`.
        """
        said = "is not sound" if self.problems else "could not be checked to the end"
        return f"{said}{f',{more}' if more else ''}: {'; '.join([*self.problems, *self.unchecked])}"

    def json(self) -> dict[str, Any]:
        """As result.json has it."""
        return {
            "tensors": self.tensors, "parameters": self.parameters, "bytes": self.nbytes,
            "tied": self.smoke.tied, "dtype": self.dtype, "class": self.smoke.kind, "ran": self.smoke.ran,
            "prompt": self.smoke.prompt, "text": self.smoke.text, "problems": self.problems,
            "unchecked": self.unchecked, "notes": self.notes,
        }  # fmt: skip


def verify(
    folder: Path,
    *,
    hardware: Hardware,
    inputs: Mapping[str, Path] | None = None,
    computed: str | None = None,
    prompt: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Report:
    """Check a model folder by reading all of it, loading it in transformers and running it.

    Args:
        folder: The model.
        hardware: The device on which it runs, if it fits there.
        inputs: The models and adapters it was made from, to name the one that contains a NaN.
        computed: The dtype of the arithmetic that made it, if that is known.
        prompt: The text to continue; None: a short text, or a few tokens of its vocabulary.
        trust_remote_code: Whether code that comes with it may run.
        progress: Called with the number of tensors read.

    Returns:
        A report, whose `problems` and `unchecked` are empty for a sound model.
    """
    facts = checkpoint.read(folder, str(folder))
    report = Report(folder, len(facts.tensors), facts.parameters, facts.nbytes, facts.dtype)
    report.problems = [f.message for f in facts.findings if f.severity == "error" and f.code not in OF_MERGES]
    code = remote_code.check(folder, str(folder), allowed=trust_remote_code)
    report.unchecked = [f"{f.message}. {f.remedy}" for f in code if f.severity == "error"]
    if not report.problems:
        report.problems = [*_check_finite(facts, inputs or {}, computed, progress), *_check_layers(facts)]
    if report.sound:
        report.notes = [*_tokenizer_as_before(facts, inputs or {})]
        with silence_libraries():
            report.smoke = smoke_test.run(
                folder,
                facts.nbytes,
                hardware=hardware,
                prompt=prompt,
                trust_remote_code=trust_remote_code,
                has_tokenizer=facts.tokenizer is not None and not report.notes,
            )
        report.problems = [*_check_keys(facts, inputs or {}, report), *report.smoke.problems]
        report.unchecked = report.smoke.unchecked
    return report


def _tokenizer_as_before(facts: checkpoint.ModelMetadata, inputs: Mapping[str, Path]) -> Iterator[str]:
    """Tell of a tokenizer that cannot be loaded, and could not be before the merge."""
    problem = facts.tokenizer.problem if facts.tokenizer else ""
    owners = (tokenizers.read(folder, "", "")[0] for folder in inputs.values()) if problem else ()
    if any(own and own.problem == problem for own in owners):
        yield f"its tokenizer was not tried: transformers cannot load it, as in the input ({problem})"


def _check_finite(
    facts: checkpoint.ModelMetadata,
    inputs: Mapping[str, Path],
    computed: str | None,
    progress: Callable[[str, int, int], None],
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
            if not is_finite(tensor):
                count = int((~tensor.isfinite()).sum())
                noun = "entry that is" if count == 1 else "entries that are"
                infinite = bool(tensor.isinf().any())
                cause = _cause(name, inputs, str(tensor.dtype).removeprefix("torch."), computed, infinite)
                yield f"{name} has {count:,} {noun} NaN or infinite{cause}"
                return


def _tensors(file: Path, names: list[str] | None = None) -> Iterator[tuple[str, Any]]:
    """The tensors of a safetensors file, one at a time: all of them, or the named ones."""
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as f:
        for name in f.keys() if names is None else names:
            yield name, f.get_tensor(name)


def _cause(name: str, inputs: Mapping[str, Path], written: str, computed: str | None, infinite: bool) -> str:
    """Name the input that a NaN comes from, or another cause.

    Slices move layers, and adapters name their tensors differently. So the same part of every layer of
    every input is searched.
    """
    part = re.sub(r"^.*\.\d+\.", "", name).rpartition(".")[0]
    searched = bool(inputs)
    for model, folder in inputs.items():
        files = sorted(folder.glob("*.safetensors"))
        searched = searched and bool(files)
        for file in files:
            for other, tensor in _tensors(file):
                if part in other and not is_finite(tensor):
                    return f"; so has {other} of {model}, in {file}: use another copy of it, or another model"
    if not searched:
        return ""
    remedies = ["lower the weights"]
    if written == "float16" and infinite:
        remedies.append("write bfloat16, because float16 ends at 65,504 (hardware.dtype=bfloat16)")
    if computed in ("float16", "bfloat16"):
        remedies.append("compute in float32 (hardware.compute_dtype, or dtype of a YAML file)")
    return f"; the inputs are finite: {', or '.join(remedies)}"


def _check_layers(facts: checkpoint.ModelMetadata) -> Iterator[str]:
    layers = facts.text_config.get("num_hidden_layers")
    for key in layer_settings.LISTS:
        value = facts.text_config.get(key)
        if isinstance(value, list) and isinstance(layers, int) and len(value) < layers:
            yield f"{facts.folder / 'config.json'} has {len(value)} {key} for {layers} layers"


def _check_keys(facts: checkpoint.ModelMetadata, inputs: Mapping[str, Path], report: Report) -> Iterator[str]:
    """Weights that the class has and the files lack, and tensors that it has no use for.

    What holds of a model that it was made from as well does not come from the merge: many encoders are
    published without their pooler, or with the head of another task.
    """
    keys = report.smoke.keys
    if not any(keys.values()):
        return
    own, tied = set(facts.tensors), {*report.smoke.twins}
    of_inputs = [
        {*theirs.tensors}
        for folder in inputs.values()
        if (folder / "config.json").exists()
        and (theirs := checkpoint.read(folder, "", pickled=True)).config.get("architectures")
        == facts.config.get("architectures")
    ]
    inherited = {
        "missing": any(theirs - tied <= own for theirs in of_inputs),
        "unexpected": any(own <= theirs for theirs in of_inputs),
    }
    known = blueprint.of(facts)
    inherited["missing"] |= {*keys["missing"]} <= {*(known.unpooled if known else ())}
    for what, names in keys.items():
        # A tensor of a layer that the class does not have was cut off; another head is another task's.
        wrong = names if what == "missing" else [n for n in names if generic(n) != n]
        if wrong and not inherited[what]:
            yield f"loaded with {what} keys: {first_few(wrong)}"
        elif names:
            verb = "lacks" if what == "missing" else "has, and has no use for,"
            report.notes.append(f"{report.smoke.kind} {verb} {first_few(names)}")
