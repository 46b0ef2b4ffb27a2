"""What is wrong with the settings of job=generate by themselves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from mergelab.core.errors import InputError
from mergelab.core.findings import Finding, error
from mergelab.generation import prompts
from mergelab.schema import Generate

MERGED = "merged"
"""The name of the model in `generate.path`."""

GREEDY = "it has no effect because generate.temperature=0 always takes the likeliest token"


def findings(g: Generate) -> Iterator[Finding]:
    """What is wrong with the values. Reads the file of prompts."""
    for key, wrong in (*_ranges(g), *_asked(g), *_without_effect(g)):
        yield error("setting", f"generate.{key}", wrong)


def _ranges(g: Generate) -> Iterator[tuple[str, str]]:
    if g.max_new_tokens < 1:
        yield "max_new_tokens", f"{g.max_new_tokens} is out of range; at least 1"
    if not 0 <= g.temperature < math.inf:
        yield "temperature", f"{g.temperature:g} is out of range; 0 (the likeliest token) or above"
    if not 0 < g.top_p <= 1:
        yield "top_p", f"{g.top_p:g} is out of range; above 0 to 1"
    if g.top_k < 0:
        yield "top_k", f"{g.top_k} is out of range; at least 1, or 0 for all tokens"
    if not 0 < g.repetition_penalty < math.inf:
        yield "repetition_penalty", f"{g.repetition_penalty:g} is out of range; above 0, and 1 is none"


def _asked(g: Generate) -> Iterator[tuple[str, str]]:
    for number, prompt in enumerate(g.prompts, start=1):
        if wrong := prompts.wrong(prompt):
            yield "prompts", f"prompt {number}: {wrong}"
    if g.file is not None:
        try:
            prompts.of_file(g.file)
        except InputError as e:
            yield "file", str(e)
    for name, times in Counter(g.models).items():
        if times > 1:
            yield "models", f"'{name}' is named {times} times"


def _without_effect(g: Generate) -> Iterator[tuple[str, str]]:
    if g.temperature == 0 and g.top_p != 1:
        yield "top_p", GREEDY
    if g.temperature == 0 and g.top_k != 0:
        yield "top_k", GREEDY
    if g.system is not None and g.chat_template is False:
        yield "system", "it has no effect because generate.chat_template=false sends prompts as they are"
    if g.path is not None and g.models and MERGED not in g.models:
        yield "path", f"it has no effect because generate.models does not name '{MERGED}'"
    if g.path is None and MERGED in g.models:
        yield (
            "path",
            f"is not set, but generate.models names '{MERGED}'; set it to the model's folder",
        )
