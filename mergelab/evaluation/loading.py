"""Loading a model from its folder, as it is or quantised."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mergelab.core.errors import StepError, summary
from mergelab.core.library_output import silence_libraries
from mergelab.core.model_class import model_class
from mergelab.models.quantization import leftovers_ignored
from mergelab.schema import Hardware

log = logging.getLogger(__name__)


def load(
    path: Path,
    hardware: Hardware,
    *,
    adapter: Path | None = None,
    trust_remote_code: bool = False,
    needs_tokenizer: bool = True,
) -> tuple[Any, Any]:
    """The model in a folder as the class that its config.json names, and its tokenizer, on `hardware.device`.

    It has the dtype of its files, or is quantised as `hardware.quantize` says. The LoRA in the folder
    `adapter` is put into its modules. A model's own code runs only where `trust_remote_code` allows it.

    Args:
        needs_tokenizer: whether a tokenizer that cannot be loaded is an error; otherwise there is None.
    Raises:
        StepError: where transformers cannot load it, or where weights are missing, which transformers would
            draw at random.
    """
    from transformers import AutoConfig, AutoTokenizer

    folder = path.resolve()
    if not (folder / "config.json").is_file():
        raise StepError(f"{path} is not a model folder: it has no config.json")
    only = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    by_library = hardware.quantize != "none" and hardware.device != "cpu"
    try:
        with silence_libraries(), leftovers_ignored(folder):
            try:
                tokenizer = AutoTokenizer.from_pretrained(folder, **only)
            except Exception:
                if needs_tokenizer:
                    raise
                log.info("%s is measured without a tokenizer: none can be loaded", path, exc_info=True)
                tokenizer = None
            kind = model_class(AutoConfig.from_pretrained(folder, **only))
            model, info = kind.from_pretrained(
                folder,
                dtype="auto",
                output_loading_info=True,
                **(_bitsandbytes(hardware) if by_library else {}),
                **only,
            )
    except Exception as e:  # safetensors, tokenizers and a model's own code raise exceptions of their own
        raise StepError(f"{path} cannot be loaded: {_reason(e)}") from e
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise StepError(f"{path} lacks the weights {', '.join(missing[:3])}{more}")
    if adapter is not None:
        model = _adapted(model, adapter)
    if by_library:  # it is on its device, and must not be moved
        return model.eval(), tokenizer
    if hardware.quantize != "none":
        from mergelab.evaluation import int8

        int8.quantize(model)
    try:
        return model.to(hardware.device).eval(), tokenizer
    except (RuntimeError, AssertionError) as e:
        raise StepError(f"{path} cannot be moved to hardware.device={hardware.device}: {summary(e)}") from e


def _adapted(model: Any, adapter: Path) -> Any:
    """The model with the LoRA in its modules."""
    from peft import PeftConfig, PeftModel

    try:
        with silence_libraries():
            config = PeftConfig.from_pretrained(str(adapter))
            config.inference_mode = True
            wrapped = PeftModel(model, config)
            found = wrapped.load_adapter(str(adapter), "default")
    except Exception as e:  # peft raises exceptions of all kinds
        raise StepError(f"the adapter {adapter} does not fit its base: {summary(e)}") from e
    if odd := [*found.missing_keys, *found.unexpected_keys]:
        raise StepError(
            f"the adapter {adapter} does not fit its base: {len(odd)} weights have no match, as {odd[0]}"
        )
    return wrapped.get_base_model().eval()


def _bitsandbytes(hardware: Hardware) -> dict[str, Any]:
    """Arguments of transformers for a model quantised by bitsandbytes: LLM.int8() of Dettmers et al. 2022
    (arXiv:2208.07339), or QLoRA's four-bit NormalFloat (arXiv:2305.14314)."""
    import torch
    from transformers import BitsAndBytesConfig

    if hardware.quantize == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    return {"quantization_config": config, "device_map": hardware.device}


def _reason(e: Exception) -> str:
    """What an error says; for code that would run and for damaged weights also what to do."""
    if "trust_remote_code" in str(e):
        return (
            "it needs Python code that comes with it, and such code runs only with "
            "model.trust_remote_code=true; read it first"
        )
    if "weights_only" in str(e):
        return "its pickled weights are damaged, or hold more than weights; use safetensors"
    return summary(e)
