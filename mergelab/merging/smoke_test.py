"""Smoke test of a model: transformers loads it, and it generates."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergelab.core.errors import first_line
from mergelab.core.findings import first_few
from mergelab.models.quantization import leftovers_ignored
from mergelab.schema import Hardware

log = logging.getLogger(__name__)

NEW_TOKENS = 8
PROMPT = "1+1="
PROBE = "1 + 1 ="
"""A text with spaces, which a tokenizer without its decoder does not restore."""

MARGIN = 1.1
"""Device memory needed to generate a few tokens, relative to the size of the weights."""


@dataclass
class SmokeTest:
    """The result of a smoke test."""

    tied: bool = False
    prompt: str = ""
    text: str = ""
    """What the model generated after the prompt."""
    problems: list[str] = field(default_factory=list)


def run(
    folder: Path, nbytes: int, *, hardware: Hardware, prompt: str | None, trust_remote_code: bool = False
) -> SmokeTest:
    """Load a model and its tokenizer, and generate a few tokens.

    Args:
        folder: The model.
        nbytes: The size of its weights.
        hardware: The device on which it generates, if it fits there.
        prompt: The text to continue; None: a short text, or a few tokens of its vocabulary.
        trust_remote_code: Whether code that comes with it may run.
    """
    from transformers import AutoConfig, AutoTokenizer

    result, what = SmokeTest(), "load its tokenizer"
    code = {"trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **code)
        what = "load it"
        kind = model_class(AutoConfig.from_pretrained(folder, **code))
        with leftovers_ignored(folder):
            model, info = kind.from_pretrained(folder, dtype="auto", output_loading_info=True, **code)
    except Exception as e:  # transformers raises exceptions of every type for a model that it cannot load
        log.exception("it does not load")
        result.problems.append(f"transformers cannot {what}: {first_line(e)}")
        return result
    result.tied = _is_tied(model)
    result.problems += [*_check_loaded(model, info, result.tied), *_check_template(tokenizer)]
    result.problems += _check_tokenizer(tokenizer)
    try:
        _generate(model, tokenizer, result, _device(hardware, nbytes), prompt)
    except Exception as e:
        log.exception("it does not generate")
        result.problems.append(f"it cannot generate: {first_line(e)}")
    return result


def model_class(config: Any) -> Any:
    """The transformers class that config.json names, or the auto class for a model with its own code."""
    import transformers

    own = type(config).__module__.startswith("transformers.")
    named = getattr(transformers, config.architectures[0], None) if own else None
    return named or transformers.AutoModelForCausalLM


def empty(config: Any, *, trust_remote_code: bool = False) -> Any:
    """A model of a configuration with untrained weights."""
    kind = model_class(config)
    if hasattr(kind, "_from_config"):
        return kind._from_config(config)
    return kind.from_config(config, trust_remote_code=trust_remote_code)


def is_finite(tensor: Any) -> bool:
    """Whether all entries are finite. aminmax propagates NaN and is many times faster than isfinite."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return all(bool(t.isfinite()) for t in tensor.aminmax())


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _check_loaded(model: Any, info: dict[str, Any], tied: bool) -> Iterator[str]:
    """Check that no weight was missing or left over, and that tied weights are tied."""
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(k) for k in info.get(key) or [])
        if names:
            yield f"loaded with {key.replace('_', ' ')}: {first_few(names)}"
    if model.config.get_text_config().tie_word_embeddings != tied:
        yield "config.json and the loaded model disagree on tie_word_embeddings"


def _check_template(tokenizer: Any) -> Iterator[str]:
    """Check that the chat template renders the simplest conversation.

    Of several named templates, only the one called `default` is checked.
    """
    templates = tokenizer.chat_template
    if not templates or (isinstance(templates, dict) and "default" not in templates):
        return
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], tokenize=False)
    except Exception as e:  # jinja's errors, and those that a template raises itself
        log.exception("the chat template fails")
        yield f"its chat template cannot be rendered: {first_line(e)}"
        return
    if PROMPT not in text:
        yield f"its chat template drops the user's message; it renders {text[:60]!r}"


def _check_tokenizer(tokenizer: Any) -> Iterator[str]:
    """Check that decoding a text's ids adds no characters to it.

    Spaces may change (SentencePiece prepends one), and a small vocabulary may lack a character. But a
    tokenizer without its decoder shows its internal symbols for spaces.
    """
    ids = tokenizer(PROBE, add_special_tokens=False).input_ids
    back = tokenizer.decode(ids, skip_special_tokens=True)
    if tokenizer.unk_token_id not in ids and set(back) - set(PROBE) - set(" \n\t"):
        yield f"its tokenizer turns {PROBE!r} into {back!r}"


def _generate(model: Any, tokenizer: Any, result: SmokeTest, device: str, prompt: str | None) -> None:
    import torch

    ids = _prompt_ids(tokenizer, prompt)
    if not ids:
        result.problems.append(f"its tokenizer turns {prompt or PROMPT!r} into no tokens")
        return
    result.prompt = tokenizer.decode(ids, skip_special_tokens=True)
    given = torch.tensor([ids], device=device)
    with torch.inference_mode():
        made = model.to(device).eval().generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=NEW_TOKENS, do_sample=False,
            pad_token_id=ids[-1], output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    if not all(is_finite(step) for step in made.logits):
        result.problems.append("its logits are not finite")
    result.text = tokenizer.decode(made.sequences[0, len(ids) :], skip_special_tokens=True)


def _prompt_ids(tokenizer: Any, prompt: str | None) -> list[int]:
    """The ids of the prompt, or of a short text if there is none.

    If the vocabulary cannot express that text, the first few tokens of the vocabulary.
    """
    ids = list(tokenizer(prompt or PROMPT).input_ids)
    special = set(tokenizer.all_special_ids)
    if prompt is None and set(ids) <= special:
        return [i for i in range(len(tokenizer)) if i not in special][:4]
    return ids


def _device(hardware: Hardware, nbytes: int) -> str:
    """The run's device if the model fits on it, else the CPU: a check must not fail for lack of memory."""
    if hardware.device == "cpu":
        return "cpu"
    import torch

    free, _ = torch.cuda.mem_get_info(hardware.device)
    return hardware.device if nbytes * MARGIN < free else "cpu"
