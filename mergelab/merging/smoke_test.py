"""Smoke test of a model: transformers loads it through its own class, and it runs.

A class that continues text generates a few tokens. Any other class, such as a reward model or an encoder,
makes one forward pass. A problem of the model and a part of the test that could not be carried out, which
says nothing against the model, are kept apart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mergelab.core.errors import first_line
from mergelab.core.model_class import continues_text, model_class
from mergelab.merging import model_inputs
from mergelab.merging.model_inputs import is_finite, tensors_in
from mergelab.models.quantization import leftovers_ignored
from mergelab.schema import Hardware

log = logging.getLogger(__name__)

T = TypeVar("T")

NEW_TOKENS = 8
PROMPT = "1+1="
PROBE = "1 + 1 ="
"""A text with spaces, which a tokenizer without its decoder does not restore."""

MARGIN = 1.1
"""Device memory needed to generate a few tokens, relative to the size of the weights."""


@dataclass
class SmokeTest:
    """The result of a smoke test."""

    kind: str = ""
    """The class that transformers made of it."""
    ran: str = ""
    """`generates`, or `runs` for a forward pass; empty where it did neither."""
    tied: bool = False
    prompt: str = ""
    text: str = ""
    """What the model generated after the prompt."""
    problems: list[str] = field(default_factory=list)
    """What is wrong with the model."""
    unchecked: list[str] = field(default_factory=list)
    """Parts of the test that failed themselves, with the reason."""
    keys: dict[str, list[str]] = field(default_factory=dict)
    """`missing`: weights of the class that the files lack; `unexpected`: tensors that it has no use for."""
    twins: list[str] = field(default_factory=list)
    """Weights that are tied to others, so that a file need not have them."""

    def attempt(self, what: str, work: Callable[[], T]) -> T | None:
        """The result of a part of the test, or None where it failed, which is then noted."""
        try:
            return work()
        except Exception as e:  # libraries and a model's own code raise exceptions of every type
            log.exception("%s", what)
            self.unchecked.append(f"{what}: {first_line(e)}{_conversion(e)}")
            return None


def run(
    folder: Path,
    nbytes: int,
    *,
    hardware: Hardware,
    prompt: str | None,
    trust_remote_code: bool = False,
    has_tokenizer: bool = True,
) -> SmokeTest:
    """Load a model and its tokenizer, and generate a few tokens or make a forward pass.

    Args:
        folder: The model.
        nbytes: The size of its weights.
        hardware: The device on which it runs, if it fits there.
        prompt: The text to continue; None: a short text, or a few tokens of its vocabulary.
        trust_remote_code: Whether code that comes with it may run.
        has_tokenizer: Whether there is a tokenizer. Otherwise it runs on a few ids.
    """
    from transformers import AutoConfig, AutoTokenizer

    result, code = SmokeTest(), {"trust_remote_code": trust_remote_code}
    cannot_load = "transformers cannot load it"
    config: Any = result.attempt(cannot_load, lambda: AutoConfig.from_pretrained(folder, **code))
    if config is None:
        return result
    tokenizer: Any = None
    if has_tokenizer:
        tokenizer = result.attempt(
            "transformers cannot load its tokenizer", lambda: AutoTokenizer.from_pretrained(folder, **code)
        )

    def load() -> tuple[Any, dict[str, Any]]:
        # With the sizes that differ ignored, it says which they are; otherwise only that there are some.
        with leftovers_ignored(folder):
            loaded: tuple[Any, dict[str, Any]] = model_class(config).from_pretrained(
                folder, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True, **code
            )
        return loaded

    loaded = result.attempt(cannot_load, load)
    if loaded is not None:
        model, info = loaded
        result.kind = type(model).__name__
        result.twins = sorted(getattr(model, "all_tied_weights_keys", None) or {})
        result.tied = bool(result.twins)
        result.keys = {k: sorted(map(str, info.get(f"{k}_keys") or [])) for k in ("missing", "unexpected")}
        result.problems += _check_loaded(model, info)
    if tokenizer is not None:
        result.attempt("its chat template cannot be rendered", lambda: _check_template(tokenizer, result))
        if loaded is None or continues_text(type(model)):
            result.problems += _check_tokenizer(tokenizer)
    if loaded is not None and not result.problems:
        device = _device(hardware, nbytes)
        result.attempt("it could not be run", lambda: _try(model, tokenizer, result, device, prompt))
    return result


def _conversion(e: BaseException) -> str:
    """Why transformers could not convert tensors while it loaded them: its message refers to a report."""
    frame = e.__traceback__
    while frame is not None:
        info = frame.tb_frame.f_locals.get("loading_info")
        if errors := getattr(info, "conversion_errors", None):
            name, reason = next(iter(errors.items()))
            return f" ({name}: {' '.join(str(reason).split())[:300]})"
        frame = frame.tb_next
    return ""


def _check_loaded(model: Any, info: dict[str, Any]) -> Iterator[str]:
    """Check that the shapes are those of config.json, and that the tensors that it ties are equal."""
    for name, stored, wanted in sorted(info.get("mismatched_keys") or []):
        yield f"{name} has shape {list(stored)}, but by config.json it has {list(wanted)}"
    if hasattr(model, "get_expanded_tied_weights_keys"):
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        for first, second in model.get_expanded_tied_weights_keys(all_submodels=True).items():
            if first not in tied:
                yield f"{first} differs from {second}, although config.json says that they are tied"


def _check_template(tokenizer: Any, result: SmokeTest) -> None:
    """Check that the chat template renders the simplest conversation.

    Of several named templates, only the one called `default` is checked.
    """
    templates = tokenizer.chat_template
    if not templates or (isinstance(templates, dict) and "default" not in templates):
        return
    text = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], tokenize=False)
    if PROMPT not in text:
        result.problems.append(f"its chat template drops the user's message; it renders {text[:60]!r}")


def _check_tokenizer(tokenizer: Any) -> Iterator[str]:
    """Check that decoding a text's ids adds no characters to it.

    Spaces may change (SentencePiece prepends one), and a small vocabulary may lack a character. But a
    tokenizer without its decoder shows its internal symbols for spaces.
    """
    ids = tokenizer(PROBE, add_special_tokens=False).input_ids
    back = tokenizer.decode(ids, skip_special_tokens=True)
    if tokenizer.unk_token_id not in ids and set(back) - set(PROBE) - set(" \n\t"):
        yield f"its tokenizer turns {PROBE!r} into {back!r}"


def _try(model: Any, tokenizer: Any, result: SmokeTest, device: str, prompt: str | None) -> None:
    """Run the model on the device where it fits, and on the CPU where it did not fit after all."""
    import torch

    ids = model_inputs.text_ids(tokenizer, prompt or PROMPT, fixed=prompt is not None) if tokenizer else None
    if ids == []:
        result.problems.append(f"its tokenizer turns {prompt or PROMPT!r} into no tokens")
        return
    rows = model_inputs.embedding_rows(model)
    if ids and rows and max(ids) >= rows:
        result.problems.append(
            f"its tokenizer turns {prompt or PROMPT!r} into id {max(ids)}, and the embedding has {rows} rows"
        )
        return
    ids = ids or model_inputs.some_ids(model)
    model.eval()
    with torch.inference_mode():
        try:
            _run_on(device, model, tokenizer, ids, result)
        except torch.OutOfMemoryError:
            log.warning("too little memory on %s: it runs on the CPU", device)
            _run_on("cpu", model, tokenizer, ids, result)


def _run_on(device: str, model: Any, tokenizer: Any, ids: list[int], result: SmokeTest) -> None:
    """Generate, or make a forward pass with a model that cannot; every number has to be finite."""
    import torch

    def shown(those: list[int]) -> str:
        return tokenizer.decode(those, skip_special_tokens=True) if tokenizer else f"ids {those}"

    model.to(device)
    result.prompt = shown(ids)
    if not continues_text(type(model)):
        made = tensors_in(model_inputs.forward(model, ids, device))
        finite = all(is_finite(t) for t in made)
        result.ran = "runs"
    else:
        given = torch.tensor([ids], device=device)
        out = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=NEW_TOKENS, do_sample=False,
            output_logits=True, return_dict_in_generate=True, **_unset(model, ids),
        )  # fmt: skip
        finite = all(is_finite(step) for step in out.logits)
        result.ran = "generates"
        result.text = shown(out.sequences[0, -len(out.logits) :].tolist())
    if not finite:
        what = "its logits are" if result.ran == "generates" else "its outputs are"
        result.problems.append(f"{what} not finite{_overflow(model)}")
        result.ran = ""


def _unset(model: Any, ids: list[int]) -> dict[str, int]:
    """Ids that generate needs, where the model's own configuration has none."""
    own = model.generation_config
    padding, start = own.pad_token_id, own.decoder_start_token_id
    out = {"pad_token_id": ids[-1]} if padding is None else {}
    if getattr(model.config, "is_encoder_decoder", False) and start is None and own.bos_token_id is None:
        out["decoder_start_token_id"] = ids[-1] if padding is None else padding
    return out


def _overflow(model: Any) -> str:
    """What to do about numbers that are not finite in float16, whose largest is 65504."""
    import torch

    if getattr(model, "dtype", None) != torch.float16:
        return ""
    return " in float16, whose largest number is 65,504; write it in bfloat16 (hardware.dtype=bfloat16)"


def _device(hardware: Hardware, nbytes: int) -> str:
    """The run's device if the model fits on it, else the CPU: a check must not fail for lack of memory."""
    if hardware.device == "cpu":
        return "cpu"
    import torch

    free, _ = torch.cuda.mem_get_info(hardware.device)
    return hardware.device if nbytes * MARGIN < free else "cpu"
