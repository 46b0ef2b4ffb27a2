"""Build a mixture of experts through mergekit's own MoE code, to disk.

mergekit-moe's `build` ends the process on a bad configuration, leaves the random seed to its caller,
saves the tokenizer with another padding token, and forgets generation_config.json. Calling its parts in
its order gives the weights of `mergekit-moe --random-seed`, bit for bit.
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
from mergelab.core.run_dir import read_json, write_json
from mergelab.core.sizes import parse_size
from mergelab.merging import model_files
from mergelab.merging.mergekit_backend import chat_template, failed, fresh_loaders, ordered, readable
from mergelab.merging.torch_threads import threads
from mergelab.schema import Hardware

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

OLD_WORDS = ("rope_theta", "rope_scaling")
"""Keys of config.json that transformers 5 writes in other words, and older software looks for."""


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
        recipe: mergekit-moe's YAML as a dict; every model a local folder.
        out: an empty folder; after an exception its content is worthless.
        hardware: the device on which the base answers the prompts, threads, shard size.
        seed: of random gates and noise; it becomes the process's.
        template: a chat template by name, `auto`, or a text; None keeps the base's.
        progress: called with the number of finished prompts or tensors.
    Raises:
        StepError: when it fails, with the reason; the log has the traceback.
    """
    try:
        with silence_libraries(), threads(hardware.threads), fresh_loaders(), _counted(recipe, progress):
            _build(recipe, out, hardware, seed, template, trust_remote_code)
    except Exception as e:  # mergekit and the libraries below raise every kind
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
        out_shard_size=parse_size(hardware.shard_size),
    )
    config = MoEMergeConfig.model_validate(dict(recipe))
    base = Path(config.base_model.model.path)
    set_seed(seed)
    try:
        architecture = select_output_arch(config, options)
    except SystemExit:  # how mergekit says that it knows none
        raise RuntimeError("mergekit has no mixture for these models") from None
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=trust)
    tokenizer.padding_side = "left"  # as mergekit's build has it: `hidden` reads the last token
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
    """Whether the shared experts get a gate, by mergekit's rule."""
    prompted = any(e.positive_prompts for e in config.shared_experts or [])
    return prompted or config.gate_mode in ("random", "uniform_random")


def _write_companions(base: Path, out: Path, recipe: Mapping[str, Any], template: str | None) -> None:
    """config.json in words that older software knows as well, and the base's other files as they are."""
    before, config = read_json(base / "config.json"), read_json(out / "config.json")
    config |= {k: before[k] for k in OLD_WORDS if k in before and k not in config}
    config["torch_dtype"] = config.get("dtype", config.get("torch_dtype"))
    config.pop("_name_or_path", None)
    write_json(out / "config.json", config)
    model_files.copy_generation_config(base, out, {})
    if template is not None:
        models = [{"model": m} for m in dict.fromkeys(e["source_model"] for e in recipe["experts"])]
        asked = {"merge_method": "linear", "models": models, "chat_template": template}
        template = chat_template(ordered(asked))
    model_files.copy_tokenizer(base, out, template)


@contextlib.contextmanager
def _counted(recipe: Mapping[str, Any], progress: Progress) -> Iterator[None]:
    """Tell how far mergekit is: it has no hook, so its calls for one expert's prompts and for one
    finished tensor are counted."""
    from mergekit.io import TensorWriter
    from mergekit.moe import router

    experts = len(recipe["experts"]) + len(recipe.get("shared_experts") or [])
    total = _tensors(recipe)
    done = {"gates": 0, "write": 0}
    tokenize, save = router.tokenize_prompts, TensorWriter.save_tensor

    def asked(*args: Any, **options: Any) -> Any:
        done["gates"] = min(done["gates"] + 1, experts)
        progress("gates", done["gates"], experts)
        return tokenize(*args, **options)

    def saved(writer: Any, *args: Any, **options: Any) -> None:
        save(writer, *args, **options)
        done["write"] += 1
        progress("write", min(done["write"], total), total)

    with (
        mock.patch.object(router, "tokenize_prompts", asked),
        mock.patch.object(TensorWriter, "save_tensor", saved),
    ):
        yield


def _tensors(recipe: Mapping[str, Any]) -> int:
    """How many tensors a mixture has at most: those of the base, and its MLPs once more for each expert."""
    from mergelab.models import checkpoint

    names = checkpoint.weights(Path(recipe["base_model"])).tensors
    more = len(recipe["experts"]) + len(recipe.get("shared_experts") or []) - 1
    return len(names) + more * sum(".mlp." in name for name in names)
