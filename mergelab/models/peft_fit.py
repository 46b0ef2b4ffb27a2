"""What peft says of an adapter and its base by the headers alone. Import it late: it takes seconds."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import set_peft_model_state_dict
from transformers import AutoConfig, PreTrainedModel

from mergelab.core.errors import first_line
from mergelab.core.findings import first_few, more_differ
from mergelab.core.library_output import silence_libraries
from mergelab.core.model_class import model_class
from mergelab.models import transformers_blueprint
from mergelab.models.adapters import copies

MATTERS = re.compile(r"ignored|[Uu]nexpected")
"""In warnings of peft: what says that something of the adapter is left out. Others advise on training."""

NO_VALUES = re.compile(r"(?i)\bmeta\b|no data")
"""In exceptions: that a tensor has no values, which says nothing about the adapter."""

MISMATCH = re.compile(
    r"size mismatch for (?P<name>\S+): copying a param with shape torch.Size\(\[(?P<own>[\d, ]*)\]\) from "
    r"checkpoint, the shape in current model is torch.Size\(\[(?P<wanted>[\d, ]*)\]\)"
)

Headers = Mapping[str, tuple[str, tuple[int, ...]]]
"""safetensors' dtype and the shape of each tensor, by name."""


def fit(base: Path, adapter: Path, headers: Headers) -> dict[str, Any]:
    """Put an adapter without values into a model without values.

    Args:
        base: The folder of the model's config.json.
        adapter: The folder of adapter_config.json.
        headers: Those of the adapter's file.

    Returns:
        `problems`, each with why the adapter cannot be used, and `warnings`, as peft words them.
    """
    with silence_libraries(), warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("always")
        problems = list(_problems(base, adapter, headers))
    texts = dict.fromkeys(" ".join(str(w.message).split()) for w in said if w.category is UserWarning)
    return {"problems": problems, "warnings": [t for t in texts if MATTERS.search(t)]}


def _problems(base: Path, adapter: Path, headers: Headers) -> Iterator[str]:
    kind = peft.PeftConfig._get_peft_type(str(adapter))
    if reason := unmergeable(kind):
        yield reason
        return
    try:
        config = PEFT_TYPE_TO_CONFIG_MAPPING[kind].from_pretrained(str(adapter))
    except Exception as e:  # peft checks what is in it, with exceptions of every type
        yield f"peft cannot read its adapter_config.json: {first_line(e)}"
        return
    theirs = AutoConfig.from_pretrained(base, trust_remote_code=False)
    made = model_class(theirs)
    if not issubclass(made, PreTrainedModel):  # an auto class: code of its own
        return
    model = transformers_blueprint.empty(made, theirs)
    config.inference_mode = True
    try:
        with torch.device("meta"):
            wrapped = peft.PeftModel(model, config, low_cpu_mem_usage=True)
    except Exception as e:  # as above
        if not NO_VALUES.search(str(e)):
            yield f"peft cannot put it on a {made.__name__}: {first_line(e)}"
        return
    wrong = list(_do_not_fit(wrapped, headers, PEFT_TYPE_TO_PREFIX_MAPPING[kind]))
    yield from wrong or _cannot_merge(wrapped.base_model)


def unmergeable(kind: str) -> str | None:
    """Why peft merges no adapter of a type, or None."""
    configs: Any = PEFT_TYPE_TO_CONFIG_MAPPING
    tuners: Any = PEFT_TYPE_TO_TUNER_MAPPING
    if kind not in configs:
        return f"peft {version('peft')} knows no adapters of the type {kind}"
    if issubclass(configs[kind], peft.PromptLearningConfig):
        return f"an adapter of prompt tokens has no weights that could be merged; its peft_type is {kind}"
    tuner = tuners[kind]
    if not issubclass(tuner, BaseTuner) or tuner.tuner_layer_cls is None:
        return f"peft cannot merge adapters of the type {kind}"
    return None


def _do_not_fit(wrapped: Any, headers: Headers, prefix: str) -> Iterator[str]:
    """The adapter's tensors for which the model has no module or one of another shape, and those it lacks."""
    tensors = {n: torch.empty(shape, device="meta") for n, (_, shape) in headers.items()}
    aliases: dict[int, set[str]] = {}  # some kinds hold one tensor in many modules
    for name, p in wrapped.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(p), set()).add(name)
    shared = {n: names for names in aliases.values() for n in names}
    try:
        found: Any = set_peft_model_state_dict(wrapped, tensors, low_cpu_mem_usage=True)
    except KeyError as e:
        yield f"it lacks {e.args[0]}"
        return
    except RuntimeError as e:
        differ = list(MISMATCH.finditer(str(e)))
        if not differ:
            if not NO_VALUES.search(str(e)):
                yield f"peft cannot load its weights: {first_line(e)}"
            return
        first, more = differ[0], more_differ(differ)
        yield f"{_plain(first['name'])} is [{first['own']}], but the model has [{first['wanted']}]{more}"
        return
    lacking = {n for n in found.missing_keys if prefix in n and "default" in n}
    missing = [n for n in found.missing_keys if n in lacking and shared.get(n, {n}) <= lacking]
    if unexpected := {*found.unexpected_keys} - copies(headers):
        yield f"the model has no module for {first_few(_plain(n) for n in sorted(unexpected))}"
    elif missing:
        yield f"it lacks {first_few(_plain(n) for n in missing)}"


def _plain(name: str) -> str:
    """The name of a tensor without what peft puts around it in memory."""
    return name.removeprefix("base_model.model.").replace(".default", "")


def _cannot_merge(tuner: Any) -> Iterator[str]:
    """Why what peft has put into a model does not become weights.

    A merge is tried with one module of each kind. It can also fail because there are no values; that says
    nothing.
    """
    try:
        tuner._check_merge_allowed()
    except (ValueError, NotImplementedError) as e:
        yield f"peft cannot merge it: {first_line(e)}"
        return
    kinds = {type(m): m for m in tuner.modules() if isinstance(m, BaseTunerLayer)}
    for kind, layer in kinds.items():
        if kind.merge is BaseTunerLayer.merge:
            yield f"peft cannot merge adapters of the type {tuner.peft_config['default'].peft_type.value}"
            return
        try:
            layer.merge()
        except Exception as e:  # peft raises exceptions of every type
            if not NO_VALUES.search(str(e)):
                yield f"peft cannot merge it: {first_line(e)}"
                return
