"""A LoRA adapter from the difference of two models, by mergekit's extract-lora.

The factors are mergekit's: a truncated singular value decomposition of each module's difference, with
the singular values split evenly between both factors (`TaskVectorDecompositionTask`). The rest of its
command is reimplemented here because it saves norms and embeddings whole even if they are unchanged,
writes modules of rank 0, which peft rejects, writes bias differences under a name that peft silently
ignores, and lists the modules in a different order every time.

The written adapter is then loaded onto the base by peft, and the difference that remains is measured.
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
from mergelab.core.findings import first_few
from mergelab.core.library_output import silence_libraries
from mergelab.core.model_class import empty
from mergelab.lora.verify import Part, bias_in, distance, load, read_back, tensor_of
from mergelab.merging import mergekit_backend
from mergelab.merging.torch_threads import threads
from mergelab.models.checkpoint import ModelMetadata
from mergelab.schema import Extract, Hardware

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""(what, done, total)"""

PREFIX = "base_model.model."
"""The prefix that peft puts before the names of a model's own modules."""


@dataclass
class _Plan:
    """How the modules that differ are stored; a module in none of these is left out."""

    factors: list[str] = field(default_factory=list)
    """Modules whose weight is decomposed."""
    whole: list[str] = field(default_factory=list)
    """Modules that are saved as they are: embeddings and norms."""
    biases: list[str] = field(default_factory=list)
    """Tensors: biases of linear modules, saved as they are."""
    tied: dict[str, str] = field(default_factory=dict)
    """The module that shares its weight with a module saved whole, by the latter."""


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
    """Write `expert` - `base` into the empty folder `out` as a peft LoRA, and read it back.

    Args:
        base: A sound model.
        expert: A model that is compatible with it.
        out: The folder. After an exception its content is unusable.
        known_as: The base's path or hub id and its revision, for the users of the adapter.
        settings: rank, epsilon, embeddings, include, exclude.
        hardware: Device and threads of the decompositions.
        trust_remote_code: Whether code that comes with the base may run.
        progress: Called with the numbers of compared tensors, and of decomposed and verified modules.

    Returns:
        Every tensor that differs between the models, in the model's order.

    Raises:
        StepError: There is nothing to extract, or something fails, with the reason.
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
                raise StepError(_nothing_to_extract(norms, plan, settings))
            _write(out, factors, plan, expert, model, known_as)
            adapted = load(base, out, trust_remote_code=trust_remote_code)
            found = read_back(adapted, expert, norms, plan.biases, progress)
            parts = {p.tensor: p for p in found}
    except MergelabError:
        raise
    except Exception as e:  # mergekit, peft and the libraries below raise exceptions of every type
        log.exception("the extraction failed")
        raise StepError(mergekit_backend.failed("the extraction failed", e, out)) from e
    if odd := [p.tensor for p in parts.values() if not math.isfinite(p.residual)]:
        raise StepError(f"the adapter is not finite at {first_few(odd)}, and was removed")
    return [parts.get(name, Part(name, norm, norm)) for name, norm in norms.items()]


def _skeleton(base: ModelMetadata, trust: bool) -> Any:
    """transformers' model of the base without weights."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base.folder, trust_remote_code=trust)
    with torch.device("meta"):
        return empty(config, trust_remote_code=trust)


def _differences(
    base: ModelMetadata, expert: ModelMetadata, model: Any, progress: Progress
) -> dict[str, float]:
    """The norm of the difference of each tensor that differs, in the model's order."""
    tied = _tied(model)
    twins = {f"{second}.weight" for second in tied.values()}
    common = base.tensors.keys() & expert.tensors.keys() - twins
    order = [n for n in model.state_dict() if n in common]
    order += sorted(common - {*order})
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
    """The module of the input embeddings and the head that shares their weight, if there is one."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is not getattr(embedding, "weight", embedding):
        return {}
    names = {m: n for n, m in model.named_modules()}
    return {names[embedding]: names[head]}


def _plan(norms: Mapping[str, float], model: Any, settings: Extract) -> _Plan:
    """Decide which of the changed and selected modules are decomposed, and which are saved whole."""
    from torch import nn

    plan, tied = _Plan(), _tied(model)
    modules = dict(model.named_modules())
    embeddings = {model.get_input_embeddings(), model.get_output_embeddings()}
    for tensor in norms:
        name, _, leaf = tensor.rpartition(".")
        module = modules.get(name)
        if module is None or not selected(name, settings):
            continue  # the experts of a mixture are separate tensors on disk, but one module in transformers
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
    """Whether `include` and `exclude` select a module: as in mergekit, by a match anywhere in its name."""
    wanted = not settings.include or any(re.search(r, module) for r in settings.include)
    return wanted and not any(re.search(r, module) for r in settings.exclude)


def _is_vector(module: Any) -> bool:
    """Whether a module's own parameters are all vectors, like a norm's."""
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
    """Decompose the difference of each module.

    Returns:
        The factors A, of shape (rank, inputs), and B, of shape (outputs, rank), with ΔW ≈ B A, or for an
        embedding its transpose. Modules of rank 0 are left out.
    """
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


def _nothing_to_extract(norms: Mapping[str, float], plan: _Plan, settings: Extract) -> str:
    """The message if there is nothing to decompose."""
    if not norms:
        return "the models do not differ: there is nothing to extract"
    if plan.factors:
        return f"no singular value is above extract.epsilon={settings.epsilon:g}: there is nothing to extract"
    return f"the tensors that differ cannot be decomposed or are not selected: {first_few(norms)}"


def _write(
    out: Path,
    factors: Mapping[str, tuple[Any, Any]],
    plan: _Plan,
    expert: ModelMetadata,
    model: Any,
    known_as: tuple[str, str | None],
) -> None:
    """Write adapter_model.safetensors and adapter_config.json: the same bytes for the same numbers."""
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
    modules = [name for name, _ in model.named_modules()]
    config = make_config_dict(
        base_ref=ModelReference(model=ModelPath(path=path)),
        max_rank=max(ranks.values()),
        modules_to_save=_short({*plan.whole, *plan.tied.values()}, modules) or None,
        target_modules=_short({*factors}, modules),
        module_ranks=ranks,
    )
    config |= {"revision": revision, "bias": "all" if plan.biases else "none"}
    if plan.tied:
        config["ensure_weight_tying"] = True
    save_file(dict(sorted(tensors.items())), out / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (out / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    mergekit_backend.readable(out)


def _short(chosen: set[str], modules: Iterable[str]) -> list[str]:
    """The shortest names for peft: `q_proj` if all modules that end in it are chosen, else whole names."""
    by_suffix: dict[str, set[str]] = {}
    for last in {name.rpartition(".")[2] for name in chosen}:
        by_suffix[last] = {name for name in modules if name.endswith(last)}
    lasts = ((name, name.rpartition(".")[2]) for name in chosen)
    return sorted({last if by_suffix[last] <= chosen else name for name, last in lasts})
