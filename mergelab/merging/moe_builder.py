"""Build a mixture of experts through mergekit's own MoE code, to disk.

mergekit-moe's `build` exits on an invalid configuration, does not set the random seed, saves the
tokenizer with another padding token, and omits generation_config.json. Calling its parts in the same
order gives bit for bit the weights of `mergekit-moe --random-seed`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from mergelab.core.errors import StepError
from mergelab.core.library_output import silence_libraries
from mergelab.core.run_dir import read_json
from mergelab.merging import model_files
from mergelab.merging.mergekit_backend import (
    chat_template,
    failed,
    folders,
    fresh_loaders,
    ordered,
    readable,
)
from mergelab.merging.torch_threads import threads
from mergelab.models import layer_settings, quantization
from mergelab.models.json_files import write_as_read
from mergelab.recipes import mixtures
from mergelab.schema import Hardware

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

OLD_KEYS = ("rope_theta", "rope_scaling")
"""Keys of config.json that transformers 5 replaced, and that older software needs."""


def build(
    recipe: Mapping[str, Any],
    out: Path,
    *,
    hardware: Hardware,
    seed: int,
    template: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> None:
    """Build into the empty folder `out`.

    Args:
        recipe: mergekit-moe's YAML as a dict. Every model is a local folder.
        out: An empty folder. After an exception its content is unusable.
        hardware: The device on which the base processes the prompts, threads and shard size.
        seed: The seed of random gates and noise. It is set for the whole process.
        template: A chat template by name, `auto`, or a text. None keeps the base's.
        trust_remote_code: Whether code that comes with the models may run.
        progress: Called with the number of finished prompts or tensors.

    Raises:
        StepError: The build failed, with the reason. The log has the traceback.
    """
    try:
        with (
            silence_libraries(),
            threads(hardware.threads),
            fresh_loaders(),
            _counted(recipe, progress),
            quantization.leftovers_ignored(*folders(recipe)),  # the base processes the prompts
        ):
            _build(recipe, out, hardware, seed, template, trust_remote_code)
    except Exception as e:  # mergekit and the libraries below raise exceptions of every type
        log.exception("the mixture could not be built")
        raise StepError(failed("the mixture could not be built", e, out)) from e


def _build(
    recipe: Mapping[str, Any], out: Path, hardware: Hardware, seed: int, template: str | None, trust: bool
) -> None:
    from mergekit.merge import MergeOptions
    from mergekit.moe.config import MoEMergeConfig
    from mergekit.moe.router import get_gate_params
    from mergekit.scripts.moe import select_output_arch
    from transformers import AutoTokenizer
    from transformers.trainer_utils import set_seed

    options = MergeOptions(
        random_seed=seed,
        device=hardware.device,
        trust_remote_code=trust,
        out_shard_size=hardware.shard_bytes,
    )
    config = MoEMergeConfig.model_validate(dict(recipe))
    base = Path(config.base_model.model.path)
    set_seed(seed)
    try:
        architecture = select_output_arch(config, options)
    except SystemExit:  # how mergekit reports that no architecture fits
        raise RuntimeError("mergekit has no mixture for these models") from None
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=trust)
    tokenizer.padding_side = "left"  # as in mergekit's build: gate_mode=hidden reads the last token
    tokenizer.pad_token_id = tokenizer.bos_token_id
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    shared = list(config.shared_experts or [])
    gated = shared if _is_gated(config) else []
    gates = get_gate_params(
        config.base_model,
        tokenizer,
        [*config.experts, *gated],
        mode=config.gate_mode,
        trust_remote_code=trust,
        device=hardware.device,
    )  # (layers, experts, hidden size)
    n = len(config.experts)
    architecture.write_model(
        str(out),
        config,
        options,
        router_weights=list(gates[:, :n, :]),
        shared_router_weights=list(gates[:, n:, :]),
    )
    _write_companions(base, out, recipe, template)
    readable(out)


def _is_gated(config: Any) -> bool:
    """Whether the shared experts get a gate, by the same rule as in mergekit."""
    prompted = any(e.positive_prompts for e in config.shared_experts or [])
    return prompted or config.gate_mode in ("random", "uniform_random")


def _write_companions(base: Path, out: Path, recipe: Mapping[str, Any], template: str | None) -> None:
    """Complete config.json for older software, and copy the base's other files."""
    before, config = read_json(base / "config.json"), read_json(out / "config.json")
    config |= {k: before[k] for k in OLD_KEYS if k in before and k not in config}
    config["torch_dtype"] = config.get("dtype", config.get("torch_dtype"))
    config = quantization.without(config)
    config.pop("_name_or_path", None)
    config |= _windows(before, config["architectures"][0])
    write_as_read(out / "config.json", config)
    model_files.copy_generation_config(base, out, {})
    if template is not None:
        models = [{"model": m} for m in dict.fromkeys(e["source_model"] for e in recipe["experts"])]
        linear = {"merge_method": "linear", "models": models, "chat_template": template}
        template = chat_template(ordered(linear))
    model_files.copy_companions(base, out, template)


def _windows(base: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The attention windows of the base's layers, which mergekit-moe drops or keeps without their layers."""
    windows = layer_settings.windows(base)
    kind = next((k for k in mixtures.KINDS if k.architecture == architecture), None)
    if kind is None:
        return {}
    widths = sorted({w for w in windows if w is not None})
    if not kind.windows_by_layer:
        # preflight reports windows of some layers only
        width = windows[0] if len(set(windows)) == 1 else None
        return {"sliding_window": width, "use_sliding_window": width is not None}
    return {
        "sliding_window": widths[0] if widths else None,
        "use_sliding_window": bool(widths),
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in windows],
    }


@contextlib.contextmanager
def _counted(recipe: Mapping[str, Any], progress: Progress) -> Iterator[None]:
    """Report mergekit's progress.

    mergekit has no hook for it, so its calls per expert's prompts and per finished tensor are counted.
    """
    from mergekit.io import TensorWriter
    from mergekit.moe import router

    experts = len(recipe["experts"]) + len(recipe.get("shared_experts") or [])
    total = _tensors(recipe)
    done = {"gates": 0, "write": 0}
    tokenize, save = router.tokenize_prompts, TensorWriter.save_tensor

    def counted_tokenize(*args: Any, **options: Any) -> Any:
        done["gates"] = min(done["gates"] + 1, experts)
        progress("gates", done["gates"], experts)
        return tokenize(*args, **options)

    def counted_save(writer: Any, *args: Any, **options: Any) -> None:
        save(writer, *args, **options)
        done["write"] += 1
        progress("write", min(done["write"], total), total)

    with (
        mock.patch.object(router, "tokenize_prompts", counted_tokenize),
        mock.patch.object(TensorWriter, "save_tensor", counted_save),
    ):
        yield


def _tensors(recipe: Mapping[str, Any]) -> int:
    """The maximum number of tensors: those of the base, and its MLPs again for each further expert."""
    from mergelab.models import checkpoint

    names = checkpoint.weights(Path(recipe["base_model"])).tensors
    more = len(recipe["experts"]) + len(recipe.get("shared_experts") or []) - 1
    return len(names) + more * sum(".mlp." in name for name in names)
