"""What is wrong with the settings of job=generate by themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from mergelab.core.errors import InputError
from mergelab.core.findings import Finding, error
from mergelab.generation import prompts
from mergelab.schema import Generate
from mergelab.schema.steps import MERGED


def findings(g: Generate) -> Iterator[Finding]:
    """What is wrong with the values. Reads the file of prompts."""
    for key, wrong in (*_prompts(g), *_models(g)):
        yield error("setting", f"generate.{key}", wrong)


def _prompts(g: Generate) -> Iterator[tuple[str, str]]:
    for number, prompt in enumerate(g.prompts, start=1):
        if wrong := prompts.wrong(prompt):
            yield "prompts", f"prompt {number}: {wrong}"
    if g.file is not None:
        try:
            prompts.of_file(g.file)
        except InputError as e:
            yield "file", str(e)


def _models(g: Generate) -> Iterator[tuple[str, str]]:
    for name, times in Counter(g.models).items():
        if times > 1:
            yield "models", f"'{name}' is named {times} times"
    if g.path is None and MERGED in g.models:
        yield (
            "path",
            f"is not set, but generate.models names '{MERGED}'; set it to the model's folder",
        )
