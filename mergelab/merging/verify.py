"""Whether a written model is whole: read back from the disk, before anybody is shown it.

Every tensor is read once, one at a time, in search of NaN. Then transformers loads the model as a
user would; on the CPU that maps the files and copies nothing, so that memory beyond the size of
the model is not needed, and a machine with less reads from the disk again.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergelab.merging.quiet import quiet
from mergelab.preflight import checkpoint
from mergelab.preflight.findings import some
from mergelab.schema import Hardware

log = logging.getLogger(__name__)

NEW_TOKENS = 8
PROMPT = "1+1="
PROBE = "1 + 1 ="
"""A text with blanks, which a tokenizer that lost its decoder does not give back."""

MARGIN = 1.1
"""Memory of a device that a model takes to generate a few tokens, over the size of its weights."""


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
    inputs: Mapping[str, Path] | None = None,
    prompt: str | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Report:
    """Check a model folder by reading all of it, loading it in transformers and generating.

    Args:
        folder: the model.
        hardware: the device on which it generates, where that has room for it.
        inputs: the models and adapters it was made from, to name the one that brought in a NaN.
        prompt: what it is asked to continue; None: a short text, or a few of its own tokens.
        progress: called with the number of tensors read.
    Returns:
        a report; its `problems` are empty for a sound model.
    """
    facts = checkpoint.read(folder, str(folder))
    report = Report(folder, len(facts.tensors), facts.parameters, facts.nbytes, dtype=facts.dtype)
    report.problems = [f.message for f in facts.findings if f.severity == "error"]
    if not report.problems:
        report.problems = [*_check_finite(facts, inputs or {}, progress), *_check_companions(facts)]
    if not report.problems:
        with quiet():
            report.problems = list(_check_shapes(facts)) or list(_check_use(facts, report, hardware, prompt))
    return report


# ---------------------------------------------------------------- the files


def _check_finite(
    facts: checkpoint.Facts, inputs: Mapping[str, Path], progress: Callable[[str, int, int], None]
) -> Iterator[str]:
    """The first tensor that is not finite: what follows from it is not worth a line."""
    files: dict[str, list[str]] = {}
    for name, header in facts.tensors.items():
        files.setdefault(header.file, []).append(name)
    done = 0
    for file, names in files.items():
        for name, tensor in _tensors(Path(file), names):
            done += 1
            progress("check", done, len(facts.tensors))
            if not _is_finite(tensor):
                count = int((~tensor.isfinite()).sum())
                yield f"{name} has {count:,} entries that are NaN or infinite{_culprit(name, inputs)}"
                return


def _tensors(file: Path, names: list[str] | None = None) -> Iterator[tuple[str, Any]]:
    """The tensors of a safetensors file, one at a time; all of them, or those named."""
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as f:
        for name in f.keys() if names is None else names:
            yield name, f.get_tensor(name)


def _is_finite(tensor: Any) -> bool:
    """Whether all entries are; aminmax hands NaN on, and is many times faster than isfinite."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return all(bool(t.isfinite()) for t in tensor.aminmax())


def _culprit(name: str, inputs: Mapping[str, Path]) -> str:
    """Which input brought it in, or what else to look at.

    Slices move layers, and an adapter has names of its own: looked at is every tensor of this
    part of a layer, in every layer of every input.
    """
    part = re.sub(r"^.*\.\d+\.", "", name).rpartition(".")[0]
    for who, folder in inputs.items():
        for file in sorted(folder.glob("*.safetensors")):
            for other, tensor in _tensors(file):
                if part in other and not _is_finite(tensor):
                    return f"; so has {other} of {who}: {file} is damaged, fetch it again"
    return "; the inputs are finite: lower the weights, or compute in float32" if inputs else ""


def _check_companions(facts: checkpoint.Facts) -> Iterator[str]:
    if not facts.has_tokenizer:
        yield f"{facts.folder} has no tokenizer"
    types, layers = facts.text_config.get("layer_types"), facts.text_config.get("num_hidden_layers")
    if isinstance(types, list) and len(types) != layers:
        yield f"{facts.folder / 'config.json'} has {len(types)} layer_types for {layers} layers"


def _check_shapes(facts: checkpoint.Facts) -> Iterator[str]:
    """Every shape as in transformers' own model of this config, and tied tensors equal."""
    import torch
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(facts.folder)
        with torch.device("meta"):
            model = _model_class(config)._from_config(config)
    except Exception as e:  # whatever transformers says of a config that it cannot use
        log.exception("no model of this config")
        yield f"transformers cannot build a model from {facts.folder / 'config.json'}: {_line(e)}"
        return
    wanted = {n: tuple(p.shape) for n, p in model.state_dict().items()}
    for name, header in facts.tensors.items():
        if name in wanted and header.shape != wanted[name]:
            yield f"{name} is {list(header.shape)}, and config.json makes it {list(wanted[name])}"
    if config.get_text_config().tie_word_embeddings:
        for first, second in dict(model._tied_weights_keys or {}).items():
            if {first, second} <= set(facts.tensors) and not _equal(facts, first, second):
                yield f"{first} differs from {second}, and config.json says that they are tied"


def _model_class(config: Any) -> Any:
    """The class that config.json names."""
    import transformers

    name = config.architectures[0]
    return getattr(transformers, name, None) or transformers.AutoModelForCausalLM


def _equal(facts: checkpoint.Facts, *names: str) -> bool:
    one, other = (next(_tensors(Path(facts.tensors[n].file), [n]))[1] for n in names)
    return bool(one.shape == other.shape and (one == other).all())


# ---------------------------------------------------------------- in use


def _check_use(
    facts: checkpoint.Facts, report: Report, hardware: Hardware, prompt: str | None
) -> Iterator[str]:
    """That transformers loads it, with nothing missing or left over, and that it generates."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        what = "load its tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(facts.folder)
        what = "load it"
        model, info = _model_class(AutoConfig.from_pretrained(facts.folder)).from_pretrained(
            facts.folder, dtype="auto", output_loading_info=True
        )
    except Exception as e:  # whatever transformers says of a model that it cannot use
        log.exception("it does not load")
        yield f"transformers cannot {what}: {_line(e)}"
        return
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(k) for k in info.get(key) or [])
        if names:
            yield f"loaded with {key.replace('_', ' ')}: {some(names)}"
    report.tied = _is_tied(model)
    if model.config.get_text_config().tie_word_embeddings != report.tied:
        yield "config.json and the loaded model disagree on tie_word_embeddings"
    yield from _check_template(tokenizer)
    yield from _check_tokenizer(tokenizer)
    try:
        yield from _check_generates(model, tokenizer, report, hardware, prompt)
    except Exception as e:
        log.exception("it does not generate")
        yield f"it cannot generate: {_line(e)}"


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _check_template(tokenizer: Any) -> Iterator[str]:
    """That the chat template makes a prompt of the simplest conversation.

    Where there are several by name it is the default one, and none where that is missing.
    """
    templates = tokenizer.chat_template
    if not templates or (isinstance(templates, dict) and "default" not in templates):
        return
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], tokenize=False)
    except Exception as e:  # jinja's errors, and those that templates raise themselves
        log.exception("the chat template fails")
        yield f"its chat template cannot be rendered: {_line(e)}"
        return
    if PROMPT not in text:
        yield f"its chat template drops what the user says; it gives {text[:60]!r}"


def _check_tokenizer(tokenizer: Any) -> Iterator[str]:
    """That a text comes back from its ids without signs that were not in it.

    Blanks may change (SentencePiece puts one in front), and a small vocabulary may lack a sign; a
    tokenizer without the decoder that it needs shows its inner marks for blanks.
    """
    ids = tokenizer(PROBE, add_special_tokens=False).input_ids
    back = tokenizer.decode(ids, skip_special_tokens=True)
    if tokenizer.unk_token_id not in ids and set(back) - set(PROBE) - set(" \n\t"):
        yield f"its tokenizer turns {PROBE!r} into {back!r}"


def _check_generates(
    model: Any, tokenizer: Any, report: Report, hardware: Hardware, prompt: str | None
) -> Iterator[str]:
    import torch

    ids = _prompt_ids(tokenizer, prompt)
    if not ids:
        yield f"its tokenizer makes no tokens of {prompt or PROMPT!r}"
        return
    report.prompt = tokenizer.decode(ids, skip_special_tokens=True)
    device = _device(hardware, report.nbytes)
    given = torch.tensor([ids], device=device)
    with torch.inference_mode():
        made = model.to(device).eval().generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=NEW_TOKENS, do_sample=False,
            pad_token_id=ids[-1], output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    if not all(_is_finite(step) for step in made.logits):
        yield "its logits are not finite"
    report.text = tokenizer.decode(made.sequences[0, len(ids) :], skip_special_tokens=True)


def _prompt_ids(tokenizer: Any, prompt: str | None) -> list[int]:
    """The prompt's ids; without one those of a short text, or where the vocabulary has no words for
    it, the first few of its own tokens."""
    ids = list(tokenizer(prompt or PROMPT).input_ids)
    special = set(tokenizer.all_special_ids)
    if prompt is None and set(ids) <= special:
        return [i for i in range(len(tokenizer)) if i not in special][:4]
    return ids


def _device(hardware: Hardware, nbytes: int) -> str:
    """The run's device if the model fits on it; checking is no reason to fail for want of memory."""
    if hardware.device == "cpu":
        return "cpu"
    import torch

    free, _ = torch.cuda.mem_get_info(hardware.device)
    return hardware.device if nbytes * MARGIN < free else "cpu"


def _line(e: BaseException) -> str:
    """The first line of a message; transformers' own go on for pages."""
    return (str(e).strip().splitlines() or [type(e).__name__])[0]
