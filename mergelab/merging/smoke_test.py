"""A model tried out as somebody would use it: transformers loads it, and it generates."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergelab.core.findings import some
from mergelab.schema import Hardware

log = logging.getLogger(__name__)

NEW_TOKENS = 8
PROMPT = "1+1="
PROBE = "1 + 1 ="
"""A text with blanks, which a tokenizer that lost its decoder does not give back."""

MARGIN = 1.1
"""Memory of a device that a model takes to generate a few tokens, over the size of its weights."""


@dataclass
class SmokeTest:
    """What came of it."""

    tied: bool = False
    prompt: str = ""
    text: str = ""
    """What the model wrote after the prompt."""
    problems: list[str] = field(default_factory=list)


def run(
    folder: Path, nbytes: int, *, hardware: Hardware, prompt: str | None, trust_remote_code: bool = False
) -> SmokeTest:
    """Load a model and its tokenizer, and generate.

    Args:
        folder: the model.
        nbytes: the size of its weights.
        hardware: the device on which it generates, where that has room for it.
        prompt: what it is asked to continue; None: a short text, or a few of its own tokens.
        trust_remote_code: whether code that comes with it may run.
    """
    from transformers import AutoConfig, AutoTokenizer

    trial, what = SmokeTest(), "load its tokenizer"
    code = {"trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **code)
        what = "load it"
        model, info = model_class(AutoConfig.from_pretrained(folder, **code)).from_pretrained(
            folder, dtype="auto", output_loading_info=True, **code
        )
    except Exception as e:  # whatever transformers says of a model that it cannot use
        log.exception("it does not load")
        trial.problems.append(f"transformers cannot {what}: {line(e)}")
        return trial
    trial.tied = _is_tied(model)
    trial.problems += [*_check_loaded(model, info, trial.tied), *_check_template(tokenizer)]
    trial.problems += _check_tokenizer(tokenizer)
    try:
        _generate(model, tokenizer, trial, _device(hardware, nbytes), prompt)
    except Exception as e:
        log.exception("it does not generate")
        trial.problems.append(f"it cannot generate: {line(e)}")
    return trial


def model_class(config: Any) -> Any:
    """The class of transformers that config.json names; of a model with code of its own, what loads it."""
    import transformers

    own = type(config).__module__.startswith("transformers.")
    named = getattr(transformers, config.architectures[0], None) if own else None
    return named or transformers.AutoModelForCausalLM


def empty(config: Any, *, trust_remote_code: bool = False) -> Any:
    """A model of a configuration, with weights that mean nothing."""
    kind = model_class(config)
    if hasattr(kind, "_from_config"):
        return kind._from_config(config)
    return kind.from_config(config, trust_remote_code=trust_remote_code)


def is_finite(tensor: Any) -> bool:
    """Whether all entries are; aminmax hands NaN on, and is many times faster than isfinite."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return all(bool(t.isfinite()) for t in tensor.aminmax())


def line(e: BaseException) -> str:
    """The first line of a message; transformers' own go on for pages."""
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _check_loaded(model: Any, info: dict[str, Any], tied: bool) -> Iterator[str]:
    """That nothing was missing or left over, and what shall be tied is."""
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(k) for k in info.get(key) or [])
        if names:
            yield f"loaded with {key.replace('_', ' ')}: {some(names)}"
    if model.config.get_text_config().tie_word_embeddings != tied:
        yield "config.json and the loaded model disagree on tie_word_embeddings"


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
        yield f"its chat template cannot be rendered: {line(e)}"
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


def _generate(model: Any, tokenizer: Any, trial: SmokeTest, device: str, prompt: str | None) -> None:
    import torch

    ids = _prompt_ids(tokenizer, prompt)
    if not ids:
        trial.problems.append(f"its tokenizer makes no tokens of {prompt or PROMPT!r}")
        return
    trial.prompt = tokenizer.decode(ids, skip_special_tokens=True)
    given = torch.tensor([ids], device=device)
    with torch.inference_mode():
        made = model.to(device).eval().generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=NEW_TOKENS, do_sample=False,
            pad_token_id=ids[-1], output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    if not all(is_finite(step) for step in made.logits):
        trial.problems.append("its logits are not finite")
    trial.text = tokenizer.decode(made.sequences[0, len(ids) :], skip_special_tokens=True)


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
