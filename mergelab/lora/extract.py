"""A LoRA adapter from the difference of two models, by mergekit's extract-lora.

The factors are mergekit's: the singular value decomposition of each module's difference, cut off at a
rank and shared out evenly (`TaskVectorDecompositionTask`). What its command does around it is done
anew here, for it saves norms and embeddings whole though nothing in them has changed, writes modules of
rank 0, which peft refuses, the difference of a bias under a name that peft passes over in silence, and
its list of modules in another order every time.

What was written is then loaded by peft onto the base, and what it leaves of the difference is measured.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergelab.core.errors import MergelabError, StepError
from mergelab.core.findings import some
from mergelab.core.library_output import silence_libraries
from mergelab.lora.verify import Part, bias_in, distance, load, read_back, tensor_of
from mergelab.merging import mergekit_backend, smoke_test
from mergelab.merging.torch_threads import threads
from mergelab.models.checkpoint import ModelMetadata
from mergelab.schema import Extract, Hardware

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""(what, done, total)"""

PREFIX = "base_model.model."
"""What peft puts before the names of a model's own modules."""


@dataclass
class _Plan:
    """What becomes of the modules that differ; what is in none of these is left out."""

    factors: list[str] = field(default_factory=list)
    """Modules whose weight is decomposed."""
    whole: list[str] = field(default_factory=list)
    """Modules that are saved as they are: embeddings and norms."""
    biases: list[str] = field(default_factory=list)
    """Tensors: biases of linear modules, saved as they are."""
    tied: dict[str, str] = field(default_factory=dict)
    """For a module that is saved whole the one that shares its weight."""


def extract(
    base: ModelMetadata,
    expert: ModelMetadata,
    out: Path,
    *,
    known_as: tuple[str, str | None],
    settings: Extract,
    hardware: Hardware,
    trust_remote_code: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> list[Part]:
    """Write `expert` - `base` into the empty folder `out` as a LoRA of peft, and read it back.

    Args:
        base: a sound model.
        expert: one that fits it.
        out: after an exception its content is worthless.
        known_as: the base's path or hub id, and its revision, for those who get the adapter.
        settings: rank, epsilon, embeddings, include, exclude.
        hardware: device and threads of the decompositions.
        trust_remote_code: whether code that comes with the base may run.
        progress: called with the numbers of tensors compared, and modules decomposed and read back.
    Returns:
        every tensor in which the models differ, in the model's order.
    Raises:
        StepError: where no decomposition is left, or something fails, with the reason.
    """
    import torch

    try:
        with (
            silence_libraries(),
            threads(hardware.threads),
            mergekit_backend.fresh_loaders(),
            torch.no_grad(),
        ):
            model = _skeleton(base, trust_remote_code)
            norms = _differences(base, expert, model, progress)
            plan = _plan(norms, model, settings)
            factors = _decompose(base, expert, plan.factors, model, settings, hardware, progress)
            if not factors:
                raise StepError(_nothing(norms, plan, settings))
            _write(out, factors, plan, expert, model, known_as)
            adapted = load(base, out, trust_remote_code=trust_remote_code)
            found = read_back(adapted, expert, norms, plan.biases, progress)
            parts = {p.tensor: p for p in found}
    except MergelabError:
        raise
    except Exception as e:  # mergekit, peft and the libraries below raise every kind
        log.exception("the extraction failed")
        raise StepError(mergekit_backend.failed("the extraction failed", e, out)) from e
    if odd := [p.tensor for p in parts.values() if not math.isfinite(p.residual)]:
        raise StepError(f"the adapter is not finite at {some(odd)}, and was removed")
    return [parts.get(name, Part(name, norm, norm)) for name, norm in norms.items()]


def _skeleton(base: ModelMetadata, trust: bool) -> Any:
    """transformers' model of the base, without weights."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base.folder, trust_remote_code=trust)
    with torch.device("meta"):
        return smoke_test.empty(config, trust_remote_code=trust)


def _differences(
    base: ModelMetadata, expert: ModelMetadata, model: Any, progress: Progress
) -> dict[str, float]:
    """The norm of the difference of each tensor in which they differ, in the model's order."""
    tied = _tied(model)
    twins = {f"{second}.weight" for second in tied.values()}
    there = base.tensors.keys() & expert.tensors.keys() - twins
    order = [n for n in model.state_dict() if n in there]
    order += sorted(there - {*order})
    norms: dict[str, float] = {}
    for i, name in enumerate(order):
        progress("compare", i, len(order))
        norm = distance(tensor_of(expert, name), tensor_of(base, name))
        if not math.isfinite(norm):
            raise StepError(
                f"{name} has entries that are NaN or infinite, in {expert.folder} or {base.folder}"
            )
        if norm > 0:
            norms[name] = norm
    return norms


def _tied(model: Any) -> dict[str, str]:
    """From the module of the input embeddings to the head that shares their weight, if it does."""
    if not model.config.get_text_config().tie_word_embeddings:
        return {}
    names = {m: n for n, m in model.named_modules()}
    pair = [names[m] for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m in names]
    return {pair[0]: pair[1]} if len(pair) == 2 else {}


def _plan(norms: Mapping[str, float], model: Any, settings: Extract) -> _Plan:
    """Who is decomposed and who is saved whole, of the modules that have changed and are asked for."""
    from torch import nn

    plan, tied = _Plan(), _tied(model)
    modules = dict(model.named_modules())
    embeddings = {model.get_input_embeddings(), model.get_output_embeddings()}
    for tensor in norms:
        name, _, leaf = tensor.rpartition(".")
        module = modules.get(name)
        if module is None or not selected(name, settings):
            continue  # the experts of a mixture are files apart, and one module in transformers
        if (module in embeddings and not settings.embeddings) or _is_vector(module):
            if name not in plan.whole:
                plan.whole.append(name)
                plan.tied |= {name: tied[name]} if name in tied else {}
        elif leaf == "weight" and isinstance(module, (nn.Linear, nn.Embedding)):
            plan.factors.append(name)
        elif leaf == "bias" and isinstance(module, nn.Linear):
            plan.biases.append(tensor)
    return plan


def selected(module: str, settings: Extract) -> bool:
    """Whether `include` and `exclude` ask for a module, as mergekit reads them: somewhere in its name."""
    wanted = not settings.include or any(re.search(r, module) for r in settings.include)
    return wanted and not any(re.search(r, module) for r in settings.exclude)


def _is_vector(module: Any) -> bool:
    """Whether a module has only vectors of its own, as a norm."""
    own = list(module.parameters(recurse=False))
    return bool(own) and all(p.ndim == 1 for p in own)


def _decompose(
    base: ModelMetadata,
    expert: ModelMetadata,
    modules: Sequence[str],
    model: Any,
    settings: Extract,
    hardware: Hardware,
    progress: Progress,
) -> dict[str, tuple[Any, Any]]:
    """For each module the factors A, of shape (rank, inputs), and B, (outputs, rank): ΔW ≈ B A, or for
    an embedding its transpose. Without those of rank 0."""
    import torch
    from mergekit.architecture import WeightInfo
    from mergekit.common import ModelPath, ModelReference
    from mergekit.graph import Executor
    from mergekit.io.tasks import LoadTensor
    from mergekit.scripts.extract_lora import TaskVectorDecompositionTask, TaskVectorTask

    ours, theirs = (ModelReference(model=ModelPath(path=str(f.folder))) for f in (base, expert))
    targets = []
    for name in modules:
        tensor = f"{name}.weight"
        difference = TaskVectorTask(
            base_tensor=LoadTensor(model=ours, tensor=tensor),
            model_tensor=LoadTensor(model=theirs, tensor=tensor),
        )
        task = TaskVectorDecompositionTask(
            weight_info=WeightInfo(name=tensor),
            input_task=difference,
            max_rank=settings.rank,
            transpose=_is_embedding(model.get_submodule(name)),
            sv_epsilon=settings.epsilon,
        )
        targets.append(task)
    executor = Executor(targets, math_device=torch.device(hardware.device))
    out: dict[str, tuple[Any, Any]] = {}
    progress("decompose", 0, len(targets))
    for i, (task, (a, b)) in enumerate(executor.run(quiet=True), start=1):
        progress("decompose", i, len(targets))
        if a.shape[0]:
            out[task.weight_info.name.removesuffix(".weight")] = a.contiguous(), b.contiguous()
    return out


def _is_embedding(module: Any) -> bool:
    from torch import nn

    return isinstance(module, nn.Embedding)


def _nothing(norms: Mapping[str, float], plan: _Plan, settings: Extract) -> str:
    """Why there is nothing to decompose."""
    if not norms:
        return "the models do not differ: there is nothing to extract"
    if plan.factors:
        return f"no singular value is above extract.epsilon={settings.epsilon:g}: there is nothing to extract"
    return f"what differs cannot be decomposed, or is not asked for: {some(norms)}"


def _write(
    out: Path,
    factors: Mapping[str, tuple[Any, Any]],
    plan: _Plan,
    expert: ModelMetadata,
    model: Any,
    known_as: tuple[str, str | None],
) -> None:
    """adapter_model.safetensors and adapter_config.json; the same bytes for the same numbers."""
    from mergekit.common import ModelPath, ModelReference
    from mergekit.scripts.extract_lora import make_config_dict
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {}
    for name, pair in factors.items():
        embedding = _is_embedding(model.get_submodule(name))
        for letter, factor in zip("AB", pair, strict=True):
            end = f"lora_embedding_{letter}" if embedding else f"lora_{letter}.weight"
            tensors[f"{PREFIX}{name}.{end}"] = factor
    for name in plan.whole:
        for leaf, _ in model.get_submodule(name).named_parameters(recurse=False):
            tensors[f"{PREFIX}{name}.{leaf}"] = tensor_of(expert, f"{name}.{leaf}")
    for name, twin in plan.tied.items():
        tensors[f"{PREFIX}{twin}.weight"] = tensors[f"{PREFIX}{name}.weight"].clone()
    for tensor in plan.biases:
        tensors[PREFIX + bias_in(tensor, factors)] = tensor_of(expert, tensor)
    ranks = {name: int(a.shape[0]) for name, (a, _) in factors.items()}
    path, revision = known_as
    everything = [name for name, _ in model.named_modules()]
    config = make_config_dict(
        base_ref=ModelReference(model=ModelPath(path=path)),
        max_rank=max(ranks.values()),
        modules_to_save=_short({*plan.whole, *plan.tied.values()}, everything) or None,
        target_modules=_short({*factors}, everything),
        module_ranks=ranks,
    )
    config |= {"revision": revision, "bias": "all" if plan.biases else "none"}
    if plan.tied:
        config["ensure_weight_tying"] = True
    save_file(dict(sorted(tensors.items())), out / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (out / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    mergekit_backend.readable(out)


def _short(chosen: set[str], everything: Iterable[str]) -> list[str]:
    """How peft is told some modules: `q_proj` where all that end in it are meant, else the whole name."""
    alike: dict[str, set[str]] = {}
    for last in {name.rpartition(".")[2] for name in chosen}:
        alike[last] = {name for name in everything if name.endswith(last)}
    lasts = ((name, name.rpartition(".")[2]) for name in chosen)
    return sorted({last if alike[last] <= chosen else name for name, last in lasts})
