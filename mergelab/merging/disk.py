"""Run a recipe through mergekit, to disk.

mergekit's own `run_merge` is a planner, an executor and a handful of files written around them.
Calling those parts gives a progress bar with a real end, and mends what `run_merge` gets wrong:
it reads files replaced since from an old map, cannot write a Qwen2, Qwen3 or Gemma whose number of
layers changed, rewrites config.json in the words of the installed transformers (older software
then misses rope_theta), drops generation_config.json, and writes weights that only the owner can
read. The weights themselves are those of `mergekit-yaml` under the same seed, bit for bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergelab import recipe as recipes
from mergelab.errors import StepError
from mergelab.preflight.checkpoint import TOKENIZER_FILES
from mergelab.preflight.resources import parse_size
from mergelab.schema import Hardware
from mergelab.workspace import umask, write_json, write_text

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration

Progress = Callable[[str, int, int], None]
"""(what, done, total)"""


def merge(
    recipe: Mapping[str, Any],
    out: Path,
    *,
    hardware: Hardware,
    seed: int,
    trust_remote_code: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> None:
    """Merge into the empty folder `out`.

    Args:
        recipe: mergekit's YAML as a dict; every model a local folder.
        out: an empty folder; after an exception its content is worthless.
        hardware: device, threads, shard size, low memory.
        seed: of the random methods.
        progress: called with the number of finished tensors.
    Raises:
        StepError: when mergekit fails, with its reason.
    """
    import torch
    import transformers
    from mergekit.architecture import get_architecture_info
    from mergekit.graph import Executor
    from mergekit.io.tasks import FinalizeModel, LoaderCache, SaveTensor
    from mergekit.merge import MergeOptions, _model_out_config, _set_chat_template
    from mergekit.plan import MergePlanner
    from mergekit.tokenizer import TokenizerInfo
    from transformers.trainer_utils import set_seed

    shard_size, _ = parse_size(hardware.shard_size, "hardware.shard_size")
    adapters = out.with_name(out.name + ".adapters")
    options = MergeOptions(
        random_seed=seed,
        device=hardware.device,
        low_cpu_memory=hardware.low_memory,
        read_to_gpu=hardware.low_memory and hardware.device != "cpu",
        out_shard_size=shard_size,
        lora_merge_cache=str(adapters),
        trust_remote_code=trust_remote_code,
        quiet=True,
    )
    transformers.logging.set_verbosity_error()  # mergekit still says torch_dtype
    threads = torch.get_num_threads()
    try:
        config = ordered(recipe)
        set_seed(seed)
        if hardware.threads:
            torch.set_num_threads(hardware.threads)
        architecture = get_architecture_info(config, options)
        LoaderCache().loaders.clear()
        LoaderCache().setup(options=options)
        out_config = _model_out_config(config, architecture, trust_remote_code=trust_remote_code)
        layer_types = _layer_types(recipe)
        if layer_types:
            out_config.layer_types = layer_types
        donor = Path(str(config.base_model or config.referenced_models()[0]).partition("+")[0])
        planner = MergePlanner(config, architecture, options=options, out_model_config=out_config)
        targets = planner.plan_to_disk(out_path=str(out))
        total = sum(isinstance(t, SaveTensor) for t in targets)
        executor = Executor(
            targets,
            math_device=torch.device(hardware.device),
            storage_device=torch.device(hardware.device if hardware.low_memory else "cpu"),
        )
        built, done = None, 0
        with torch.no_grad():
            for task, value in executor.run(quiet=True):
                if isinstance(value, TokenizerInfo):
                    built = value.tokenizer
                if isinstance(task, (SaveTensor, FinalizeModel)):
                    done += isinstance(task, SaveTensor)
                    progress("merge", done, total)
        changes = {"num_hidden_layers": _layer_total(recipe), "layer_types": layer_types}
        if built is not None:
            changes["vocab_size"] = _vocab_size(built, recipe)
        _write_config(donor, out, recipe, changes)
        if built is None and config.chat_template:
            built = _load_tokenizer(donor)
        if built is not None:
            _set_chat_template(built, config)
            built.save_pretrained(out)
        _copy_companions(donor, out, tokenizer=built is None)
        for file in out.iterdir():
            file.chmod(0o666 & ~umask())
    except (RuntimeError, ValueError, TypeError, KeyError, OSError) as e:
        raise StepError(f"the merge failed: {_reason(e)}") from e
    finally:
        torch.set_num_threads(threads)
        LoaderCache().loaders.clear()  # mergekit keeps it for the whole process
        shutil.rmtree(adapters, ignore_errors=True)


def ordered(recipe: Mapping[str, Any]) -> MergeConfiguration:
    """mergekit's configuration, with its models in the order of the file.

    mergekit collects them in a Python set: without a base model, whose config and tokenizer the
    output gets would change from process to process.
    """
    from mergekit.common import ModelReference
    from mergekit.config import MergeConfiguration

    order = [ModelReference.parse(m) for m in recipes.models(recipe)]

    class Ordered(MergeConfiguration):
        def referenced_models(self) -> list[ModelReference]:
            return list(order)

    return Ordered.model_validate(dict(recipe))


def _slices(recipe: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    modules = (recipe.get("modules") or {}).values()
    return list(recipe.get("slices") or []) + [s for m in modules for s in m.get("slices") or []]


def _layer_total(recipe: Mapping[str, Any]) -> int | None:
    spans = [s["sources"][0]["layer_range"] for s in _slices(recipe)]
    return sum(end - start for start, end in spans) if spans else None


def _layer_types(recipe: Mapping[str, Any]) -> list[str] | None:
    """The kinds of attention of the output's layers: those of the layers they are made of."""
    from transformers import AutoConfig

    out: list[str] = []
    for s in _slices(recipe):
        source = s["sources"][0]
        start, end = source["layer_range"]
        types = getattr(AutoConfig.from_pretrained(source["model"].partition("+")[0]), "layer_types", None)
        if not types:
            return None
        out += types[start:end]
    return out or None


def _vocab_size(tokenizer: Any, recipe: Mapping[str, Any]) -> int:
    size = len(tokenizer.get_vocab())
    multiple = (recipe.get("tokenizer") or {}).get("pad_to_multiple_of") or 1
    return -(-size // multiple) * multiple


def _write_config(donor: Path, out: Path, recipe: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """The donor's config.json in its own words, but for what the merge changed."""
    config = json.loads((donor / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    for key, value in changes.items():
        if value is not None and (key in text or key != "layer_types"):
            text[key] = value
    dtype = recipe.get("out_dtype") or recipe.get("dtype")
    if dtype:
        for part in (config, text):
            for key in ("dtype", "torch_dtype"):
                if key in part:
                    part[key] = str(dtype)
        if "dtype" not in config and "torch_dtype" not in config:
            config["torch_dtype"] = str(dtype)
    for note in ("_name_or_path", "transformers_version"):
        config.pop(note, None)
    write_json(out / "config.json", config)


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _copy_companions(donor: Path, out: Path, *, tokenizer: bool) -> None:
    """generation_config.json, and the tokenizer's files as they are where none was built."""
    for name in ("generation_config.json", *(TOKENIZER_FILES if tokenizer else ())):
        if (donor / name).exists():
            shutil.copyfile(donor / name, out / name)


def _reason(e: BaseException) -> str:
    if isinstance(e, OSError) and e.strerror:
        return f"{e.strerror}" + (f": {e.filename}" if e.filename else "")
    first = str(e).strip().splitlines() or [type(e).__name__]
    return first[0] if isinstance(e, (RuntimeError, OSError)) else f"{type(e).__name__}: {first[0]}"


def write_recipe(path: Path, recipe: Mapping[str, Any]) -> None:
    """recipe.yaml."""
    write_text(path, recipes.dump(recipe))
