"""Run a recipe through mergekit, to disk: everything that our own kernels do not support.

mergekit's own `run_merge` consists of a planner, an executor and the code that writes a few more files.
Calling these parts gives a progress bar with a known total, and avoids errors of `run_merge`: it reads
replaced files from an old memory map, cannot write a Qwen2, Qwen3 or Gemma whose number of layers
changed, rewrites config.json (see `model_files`), and writes weights that only the owner can read. The
weights are bit for bit those of `mergekit-yaml` with the same seed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock
from zipfile import is_zipfile

from mergelab.core.errors import MergelabError, StepError, first_line, typed_line
from mergelab.core.library_output import silence_libraries
from mergelab.core.run_dir import umask
from mergelab.merging import (
    adapted_models,
    converted_tensors,
    mergekit_planner,
    model_files,
    tokenizer_order,
)
from mergelab.merging.adapted_models import Prepared
from mergelab.merging.torch_threads import threads
from mergelab.models import checkpoint, moved_layers
from mergelab.models.quantization import leftovers_ignored
from mergelab.recipes import recipe as recipes
from mergelab.recipes import slices
from mergelab.schema import Hardware

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""(what, done, total)"""

REMEDIES = {
    "No space left on device": "Free some, or set output=DIR on another disk.",
    "Disk quota exceeded": "Free some, or set output=DIR on another disk.",
    "CUDA out of memory": "Set hardware.low_memory=false, or hardware=cpu.",
}
"""The remedy for a failure, by words in its reason."""


def merge(
    recipe: Mapping[str, Any],
    out: Path,
    *,
    hardware: Hardware,
    seed: int,
    trust_remote_code: bool = False,
    own_dtypes: Mapping[str, str] = {},
    progress: Progress = lambda what, done, total: None,
) -> None:
    """Merge into the empty folder `out`.

    Args:
        recipe: mergekit's YAML as a dict. Every model is a local folder.
        out: An empty folder. After an exception its content is unusable.
        hardware: Device, threads, shard size and low_memory.
        seed: The seed of random methods. It is set for the whole process.
        trust_remote_code: Whether code that comes with the models may run.
        own_dtypes: Tensors that are written in another dtype than the recipe's, as
            `tensor_plan.own_dtypes` gives them.
        progress: Called with the number of finished tensors.

    Raises:
        StepError: The merge failed, with the reason. The log has the traceback.
    """
    try:
        with (
            silence_libraries(),
            threads(hardware.threads),
            fresh_loaders(),
            _files_by_the_index(),
            tokenizer_order.by_id(),
            leftovers_ignored(*folders(recipe)),  # of the base of an adapter
        ):
            _merge(recipe, out, hardware, seed, trust_remote_code, own_dtypes, progress)
    except MergelabError:
        raise
    except Exception as e:  # mergekit, its methods and the libraries below raise exceptions of every type
        log.exception("the merge failed")
        raise StepError(failed("the merge failed", e, out)) from e


def _merge(
    recipe: Mapping[str, Any],
    out: Path,
    hardware: Hardware,
    seed: int,
    trust: bool,
    own_dtypes: Mapping[str, str],
    progress: Progress,
) -> None:
    from transformers.trainer_utils import set_seed

    # Before the adapters, because peft draws their first values, and mergekit's masks are drawn after that.
    set_seed(seed)
    adapters = out / ".adapters"
    with adapted_models.plain(
        recipe, adapters, shard=hardware.shard_bytes, trust_remote_code=trust, progress=progress
    ) as plain:
        _merge_plain(recipe, plain, out, hardware, trust, own_dtypes, progress)
    shutil.rmtree(adapters, ignore_errors=True)
    readable(out)


def _merge_plain(
    recipe: Mapping[str, Any],
    plain: Prepared,
    out: Path,
    hardware: Hardware,
    trust: bool,
    own_dtypes: Mapping[str, str],
    progress: Progress,
) -> None:
    """Merge a recipe whose adapters have been put on.

    Args:
        recipe: The recipe as it was.
        plain: The recipe without adapters.
        out: See `merge`, as for the others.
        hardware: As there.
        trust: `trust_remote_code`.
        own_dtypes: As there.
        progress: As there.
    """
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import MergeOptions, _model_out_config
    from mergekit.plan import MergePlanner

    options = MergeOptions(
        device=hardware.device,
        low_cpu_memory=hardware.low_memory,
        read_to_gpu=hardware.low_memory and hardware.device != "cpu",
        out_shard_size=hardware.shard_bytes,
        trust_remote_code=trust,
        # What differs without being allowed has been refused in preflight.
        allow_crimes=True,
        unsafe_truncate_embeddings=True,
    )
    config = ordered(plain.recipe)
    models = config.referenced_models()
    config_source = Path(recipes.models(recipe)[0].partition("+")[0])
    architecture = converted_tensors.architecture(config, options)
    LoaderCache().setup(options=options)
    for i, model in enumerate(models):
        progress("open inputs", i, len(models))
        LoaderCache().get(model)
    changes = _layers(recipe, architecture, config_source, trust)
    out_config = _model_out_config(config, architecture, trust_remote_code=trust)
    for key, value in changes.items():  # some layers' tensors depend on them
        _set(out_config, key, value)
    own = mergekit_planner.planner(MergePlanner, mergekit_planner.tied_in(models), own_dtypes)
    planner = converted_tensors.planner(own, models)(
        config, architecture, options=options, out_model_config=out_config
    )
    tokenizer = _run(planner.plan_to_disk(out_path=str(out)), hardware, progress)

    changes |= mergekit_planner.changes(config_source, out) | plain.config
    ids: dict[int, int | None] = {}
    vocab_size = architecture.vocab_size_config_key or "vocab_size"
    if tokenizer is None:
        rows = _truncated(config_source, out, out_config, architecture)
        changes |= {vocab_size: rows} if rows else {}
    else:
        changes[vocab_size] = _vocab_size(tokenizer, recipe)
        ids = model_files.special_ids(config_source, tokenizer, trust_remote_code=trust)
    model_files.write_config(config_source, out, changes, ids)
    model_files.copy_generation_config(config_source, out, ids)
    template = chat_template(config)
    if tokenizer is None:
        model_files.copy_companions(config_source, out, template)
    else:
        model_files.copy_companions(config_source, out, template, built=True)
        tokenizer.chat_template = template or tokenizer.chat_template
        tokenizer.save_pretrained(out)


def failed(what: str, e: BaseException, out: Path) -> str:
    """The message for an exception in mergekit: at which tensor, why, and the remedy."""
    tensor, reason = _failing_tensor(e), _reason(e, out)
    remedy = next((r for words, r in REMEDIES.items() if words in reason), "")
    text = f"{what}{f' at {tensor}' if tensor else ''}: {reason}"
    return f"{text}\n{remedy}" if remedy else text


def readable(out: Path) -> None:
    """Set file permissions by the umask, because mergekit's files can only be read by their owner."""
    for file in out.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask())


def _run(targets: list[Any], hardware: Hardware, progress: Progress) -> Any:
    """Execute mergekit's tasks and return the tokenizer that one of them built, or None."""
    import torch
    from mergekit.graph import Executor
    from mergekit.io.tasks import SaveTensor
    from mergekit.tokenizer import TokenizerInfo

    executor = Executor(
        targets,
        math_device=torch.device(hardware.device),
        storage_device=torch.device(hardware.device if hardware.low_memory else "cpu"),
    )
    total = sum(isinstance(t, SaveTensor) for t in targets)
    tokenizer, done = None, 0
    with torch.no_grad():
        for task, value in executor.run(quiet=True):
            if isinstance(value, TokenizerInfo):
                tokenizer = value.tokenizer
            if isinstance(task, SaveTensor):
                done += 1
                progress("merge", done, total)
    return tokenizer


def folders(recipe: Mapping[str, Any]) -> list[Path]:
    """The folders of a recipe's models, without their adapters."""
    return [Path(m.partition("+")[0]) for m in recipes.models(recipe)]


@contextlib.contextmanager
def fresh_loaders() -> Iterator[None]:
    """Clear what mergekit keeps by path for the whole process: memory maps, inferred architectures."""
    from mergekit.architecture.auto import infer_architecture_info
    from mergekit.io.tasks import LoaderCache

    LoaderCache().loaders.clear()
    infer_architecture_info.cache_clear()
    try:
        yield
    finally:
        LoaderCache().loaders.clear()
        infer_architecture_info.cache_clear()


@contextlib.contextmanager
def _files_by_the_index() -> Iterator[None]:
    """Have mergekit read a tensor from the file that the index names, and map pickled files into memory.

    By itself it looks into the file that is open first. Where that has a tensor of the same name which the
    index does not mean, as the base's files do below an adapter, it would take the wrong one.
    """
    import torch
    from mergekit.io import LazyTensorLoader, loader

    def open_file(self: Any, path: str, device: str | None = None) -> None:
        self.tensors = torch.load(path, map_location=device, weights_only=True, mmap=is_zipfile(path))

    read = LazyTensorLoader.get_tensor

    def get_tensor(self: Any, key: str, *args: Any, **options: Any) -> Any:
        file = self.index.tensor_paths.get(key)
        if file != getattr(self, "file", None):
            self.flush()
            self.file = file
        return read(self, key, *args, **options)

    with (
        mock.patch.object(loader.DumbPytorchLoader, "__init__", open_file),
        mock.patch.object(LazyTensorLoader, "get_tensor", get_tensor),
    ):
        yield


def ordered(recipe: Mapping[str, Any]) -> MergeConfiguration:
    """mergekit's configuration with the models in the order of the file.

    mergekit collects them in a Python set. Without a base model, the model whose config and tokenizer the
    output gets would then change from process to process.
    """
    from mergekit.common import ModelReference
    from mergekit.config import MergeConfiguration

    order = [ModelReference.parse(m) for m in recipes.models(recipe)]

    class Ordered(MergeConfiguration):  # type: ignore[misc]
        def referenced_models(self) -> list[ModelReference]:
            return list(order)

    return Ordered.model_validate(dict(recipe))


def chat_template(config: MergeConfiguration) -> str | None:
    """The text of the chat template that a configuration requests by name, `auto` or text; else None."""
    from mergekit.merge import _set_chat_template

    holder = SimpleNamespace(chat_template=None)
    _set_chat_template(holder, config)
    template: str | None = holder.chat_template
    return template


def _layers(recipe: Mapping[str, Any], architecture: Any, source: Path, trust: bool) -> dict[str, Any]:
    """What slices change in config.json: the number of layers, and the settings of single ones."""
    changes: dict[str, Any] = {}
    for name, _, own in slices.stacks(recipe, list(architecture.modules)):
        found = moved_layers.moved(
            source,
            slices.layers(own, lambda reference: Path(reference.partition("+")[0])),
            # mergekit has no key where it inferred the tensors
            key=architecture.modules[name].architecture.num_layers_config_key(),
            trust_remote_code=trust,
        )
        unfit = [p["message"] for p in found["problems"] if p["kind"] == moved_layers.UNFIT]
        if unfit:  # preflight refuses it where it knows the models
            raise RuntimeError(unfit[0])
        changes |= found["changes"]
    return changes


def _set(config: Any, key: str, value: Any) -> None:
    """Set a key of a config of transformers, which has parts where a flat config.json has none."""
    *path, last = key.split(".")
    for name in path:
        config = getattr(config, name)
    if hasattr(config, last):
        setattr(config, last, value)


def _vocab_size(tokenizer: Any, recipe: Mapping[str, Any]) -> int:
    size = len(tokenizer.get_vocab())
    multiple = (recipe.get("tokenizer") or {}).get("pad_to_multiple_of") or 1
    return -(-size // multiple) * multiple


def _truncated(config_source: Path, out: Path, config: Any, architecture: Any) -> int | None:
    """The rows for tokens in the output, where they are fewer than in the model whose config it gets."""
    before, after = (checkpoint.weights(folder).tensors for folder in (config_source, out))
    for module in architecture.modules.values():
        for weight in (*module.architecture.pre_weights(config), *module.architecture.post_weights(config)):
            name, axis = f"{module.weight_prefix or ''}{weight.name}", weight.vocabulary_axis
            if axis is not None and name in before and name in after:
                rows = int(after[name].shape[axis])
                return rows if rows < before[name].shape[axis] else None
    return None


def _failing_tensor(e: BaseException) -> str | None:
    """The tensor that was being merged. mergekit's messages do not name it, but its stack frames do."""
    for frame, _ in traceback.walk_tb(e.__traceback__):
        task = frame.f_locals.get("self")
        name = getattr(getattr(task, "output_weight", None), "name", None) or getattr(task, "tensor", None)
        if isinstance(name, str):
            return name
    return None


def _reason(e: BaseException, out: Path) -> str:
    """One line about a failure; the operating system's own message for its errors."""
    code = re.search(r"\(os error (\d+)\)", str(e))  # how safetensors reports an OSError
    if code:
        return f"{os.strerror(int(code[1]))}: {out}"
    if isinstance(e, OSError) and e.strerror:
        return f"{e.strerror}: {e.filename or out}"
    return first_line(e) if type(e) is RuntimeError else typed_line(e)
