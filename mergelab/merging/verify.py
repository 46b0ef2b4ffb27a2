"""Whether a written model is whole: read back from the disk, before anybody is shown it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergelab.errors import StepError
from mergelab.preflight import checkpoint
from mergelab.schema import Hardware


@dataclass
class Report:
    """What was checked, and what was found."""

    folder: Path
    tensors: int = 0
    parameters: int = 0
    nbytes: int = 0
    tied: bool = False
    dtype: str | None = None
    text: str = ""
    """What the model wrote after the prompt."""
    prompt: str = ""
    problems: list[str] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        """As result.json has it."""
        return {
            "tensors": self.tensors, "parameters": self.parameters, "bytes": self.nbytes,
            "tied": self.tied, "dtype": self.dtype, "prompt": self.prompt, "text": self.text,
            "problems": self.problems,
        }  # fmt: skip


def verify(
    folder: Path,
    *,
    hardware: Hardware,
    inputs: dict[str, Path] | None = None,
    prompt: str | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Report:
    """Check a model folder by reading all of it, loading it in transformers and generating.

    Args:
        folder: the model.
        hardware: the device on which it generates.
        inputs: the models it was merged from, to name the one that brought in a NaN.
        prompt: what it is asked to continue.
    Returns:
        a report; its `problems` are empty for a sound model.
    Raises:
        StepError: when it cannot be read at all.
    """
    facts = checkpoint.read(folder, str(folder))
    report = Report(
        folder, len(facts.tensors), facts.parameters, facts.nbytes, dtype=facts.dtype,
        problems=[f"{f.message}" for f in facts.findings if f.severity == "error"],
    )  # fmt: skip
    if report.problems:
        return report
    report.problems += _check_finite(facts, inputs or {}, progress)
    report.problems += _check_companions(facts, folder)
    if not report.problems:
        report.problems += _check_shapes(facts)
    if not report.problems:
        report.problems += _check_loads(facts, report, hardware, prompt)
    return report


def _check_finite(
    facts: checkpoint.Facts, inputs: dict[str, Path], progress: Callable[[str, int, int], None]
) -> Iterator[str]:
    from safetensors import safe_open

    files: dict[str, list[str]] = {}
    for name, header in facts.tensors.items():
        files.setdefault(header.file, []).append(name)
    done = 0
    for file, names in files.items():
        with safe_open(file, framework="pt") as f:
            for name in names:
                tensor = f.get_tensor(name)
                done += 1
                progress("check", done, len(facts.tensors))
                if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                    count = int((~tensor.isfinite()).sum())
                    yield (f"{name} holds {count:,} values that are NaN or infinite{_culprit(name, inputs)}")
                    return


def _culprit(name: str, inputs: dict[str, Path]) -> str:
    """Which input brought it in, or what else to look at."""
    from safetensors import safe_open

    for who, folder in inputs.items():
        header = checkpoint.read(folder, who).tensors.get(name)
        if header is None:
            continue
        with safe_open(header.file, framework="pt") as f:
            tensor = f.get_tensor(name)
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            return f"; so does {who}: {header.file} is damaged, fetch it again"
    return "; the inputs are finite: lower the weights, or compute in float32"


def _check_companions(facts: checkpoint.Facts, folder: Path) -> Iterator[str]:
    if not facts.has_tokenizer:
        yield f"{folder} has no tokenizer"
    types, layers = facts.text_config.get("layer_types"), facts.text_config.get("num_hidden_layers")
    if isinstance(types, list) and len(types) != layers:
        yield f"config.json has {len(types)} layer_types and {layers} layers"


def _check_shapes(facts: checkpoint.Facts) -> Iterator[str]:
    """Every tensor there, with the shape that transformers' own model has for this config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(facts.folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError) as e:
        yield f"transformers cannot build a model from {facts.folder}/config.json: {_first_line(e)}"
        return
    wanted = {n: tuple(p.shape) for n, p in model.state_dict().items()}
    for name, header in facts.tensors.items():
        if name in wanted and header.shape != wanted[name]:
            yield f"{name} is {list(header.shape)}, config.json says {list(wanted[name])}"


def _check_loads(
    facts: checkpoint.Facts, report: Report, hardware: Hardware, prompt: str | None
) -> Iterator[str]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(facts.folder)
        model, info = AutoModelForCausalLM.from_pretrained(
            facts.folder, dtype="auto", output_loading_info=True, device_map=None
        )
    except (OSError, ValueError, RuntimeError, KeyError) as e:
        yield f"transformers cannot load it: {_first_line(e)}"
        return
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(k) for k in info.get(what) or [])
        if names:
            yield f"loaded with {what.replace('_', ' ')}: {checkpoint._some(names)}"
    report.tied = _is_tied(model)
    if bool(facts.text_config.get("tie_word_embeddings", report.tied)) != report.tied:
        yield "config.json and the loaded model disagree on tied embeddings"
    stored = {n: facts.tensors.get(n) for n in ("model.embed_tokens.weight", "lm_head.weight")}
    if report.tied and all(stored.values()) and not _equal(facts, *stored):
        yield "embeddings are tied, but lm_head.weight and model.embed_tokens.weight differ on disk"
    sample = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) if (
        tokenizer.chat_template
    ) else None  # fmt: skip
    if tokenizer.chat_template and not sample:
        yield "the chat template gives an empty text"
    model = model.to(hardware.device).eval()
    ids = _prompt_ids(tokenizer, prompt)
    ids = ids.to(hardware.device)
    report.prompt = tokenizer.decode(ids[0], skip_special_tokens=True)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
        if not bool(logits.isfinite().all()):
            yield "its logits are not finite"
            return
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        )  # fmt: skip
    report.text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    if made.shape[1] <= ids.shape[1]:
        yield "it generates nothing"


def _prompt_ids(tokenizer: Any, prompt: str | None) -> Any:
    """The prompt's ids; without a prompt, a short text that any tokenizer can write and read back.

    Raises:
        StepError: when the tokenizer does not give back the text it was given.
    """
    text = prompt or "1+1="
    ids = tokenizer(text, return_tensors="pt").input_ids
    back = tokenizer.decode(ids[0], skip_special_tokens=True)
    if back.strip() != text.strip():
        raise StepError(f"its tokenizer turns {text!r} into {back!r}")
    return ids


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _equal(facts: checkpoint.Facts, first: str, second: str) -> bool:
    from safetensors import safe_open

    tensors = []
    for name in (first, second):
        with safe_open(facts.tensors[name].file, framework="pt") as f:
            tensors.append(f.get_tensor(name))
    return bool(tensors[0].shape == tensors[1].shape and (tensors[0] == tensors[1]).all())


def _first_line(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]
