"""Checks of how models are loaded for evaluation and generation: hardware.quantize and eval.backend."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from mergelab import evaluation
from mergelab.core.findings import Finding, Severity, error, note
from mergelab.core.model_class import generates
from mergelab.jobs.step import asks_models, loads_models, steps_of
from mergelab.models.checkpoint import ModelMetadata
from mergelab.schema import Run

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Keys of config.json for the number of experts in a layer."""


def check(run: Run) -> Iterator[Finding]:
    """Check that models can be loaded in this way."""
    yield from _check_quantize(run)
    if run.eval.backend == "vllm" and evaluation.measures_anything(run.eval):
        yield from _check_vllm(run)


def _not_installed(run: Run, package: str, key: str, message: str, extra: str) -> Iterator[Finding]:
    """Report a missing package: an error here, and a warning for a plan, which may run elsewhere."""
    if loads_models(run) and find_spec(package) is None:
        severity: Severity = "warning" if any(s.elsewhere for s in steps_of(run)) else "error"
        yield Finding(severity, "not-installed", key, message, f"pip install 'mergelab[{extra}]'")


def _check_quantize(run: Run) -> Iterator[Finding]:
    h, key = run.hardware, "hardware.quantize"
    if h.quantize not in ("int8", "int4"):
        return
    if h.device == "cpu":
        if h.quantize == "int4":
            message = "int4 needs a CUDA device, and hardware.device=cpu"
            yield error("setting", key, message, "Set hardware.quantize=int8, or hardware=gpu.")
    else:
        message = f"{h.quantize} on {h.device} needs bitsandbytes, which is not installed"
        yield from _not_installed(run, "bitsandbytes", key, message, "quant")


def _check_vllm(run: Run) -> Iterator[Finding]:
    h, key = run.hardware, "eval.backend"
    if h.device == "cpu":
        message = "vllm needs a CUDA device, and hardware.device=cpu"
        yield error("setting", key, message, "Set eval.backend=hf, or hardware=gpu.")
    elif h.device not in ("cuda", "cuda:0"):
        n = h.device.partition(":")[2]
        message = f"vllm uses the first GPUs that it sees, but hardware.device={h.device}"
        remedy = f"Set hardware.device=cuda and the environment variable CUDA_VISIBLE_DEVICES={n}."
        yield error("setting", key, message, remedy)
    if h.quantize == "int8":
        message = "vllm quantizes weights to int4 while loading them, but not to int8"
        remedy = "Set hardware.quantize=int4, or eval.backend=hf."
        yield error("setting", "hardware.quantize", message, remedy)
    yield from _not_installed(run, "vllm", key, "vllm is not installed", "vllm")


def _wants_language(run: Run) -> tuple[str, str] | None:
    """Why the run's models have to continue text, and the remedy where they do not; None if they need not."""
    if asks_models(run):
        return f"job={run.job.name} has models answer", "Ask models that do."
    if measures_language(run):
        return (
            f"eval.kind={run.eval.kind} measures language models",
            "Set eval=none, or write a kind of evaluation for such models.",
        )
    return None


def measures_language(run: Run) -> bool:
    """Whether models are measured as language models, for which they need a tokenizer."""
    kind = evaluation.known_kind(run.eval)
    return kind is not None and kind.language_models and loads_models(run)


def check_model(run: Run, facts: ModelMetadata, key: str) -> Iterator[Finding]:
    """Report a model that cannot be asked or measured, and weights that `quantize` does not quantize."""
    if facts.config and (why := _wants_language(run)) and not generates(facts.config):
        kind = facts.config["architectures"][0]
        message = f"it is a {kind}, which does not continue text, and {why[0]}"
        yield error("not-generative", key, message, why[1])
    outdated = any(f.code == "quantization-leftover" for f in facts.findings)
    if outdated and run.eval.backend == "vllm" and loads_models(run):
        message = f"{facts.folder}: vllm would quantize it by the quantization_config in its config.json"
        remedy = "Remove that key from the file, or set eval.backend=hf."
        yield error("setting", key, message, remedy)
    experts = next((facts.text_config[k] for k in EXPERTS if facts.text_config.get(k)), 0)
    if run.hardware.quantize != "none" and loads_models(run) and isinstance(experts, int) and experts > 1:
        message = (
            f"only its attention is measured in {run.hardware.quantize}: transformers packs the weights "
            "of all experts into one tensor, which is not a linear layer"
        )
        yield note("unquantized", key, message)
