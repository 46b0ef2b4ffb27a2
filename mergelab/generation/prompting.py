"""From a prompt to a model's input: its chat template, its tokenizer, the length of its context.

None of it needs the weights, so that errors show before any are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.core.errors import InputError, summary
from mergelab.core.library_output import silence_libraries
from mergelab.schema import Generate

Message = dict[str, str]
"""`role` (system, user or assistant) and `content`, as chat templates take them."""


@dataclass(frozen=True)
class Request:
    """The input of a model."""

    prompt: str
    """The last message of the user."""
    messages: list[Message] | None
    """The conversation, where a chat template was applied."""
    text: str
    """What was tokenised."""
    ids: list[int]


@dataclass(frozen=True)
class PromptEncoder:
    """Turns conversations into the input of one model."""

    name: str
    tokenizer: Any
    templated: bool
    """Whether its chat template is applied."""
    system: str | None
    context: int | None
    """Tokens that prompt and answer may have together; None: no limit is known."""
    end_of_turn: int | None
    """The token that its chat template writes after an assistant's message."""

    def encode(self, conversation: Sequence[Message]) -> Request:
        """The request for a conversation; without a chat template only its last message.

        Raises:
            InputError: where the template rejects it, or the context has no room for an answer.
        """
        prompt = conversation[-1]["content"]
        if self.templated:
            first = [] if self.system is None else [{"role": "system", "content": self.system}]
            messages = [*first, *conversation]
            text = _rendered(self.tokenizer, messages)
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            request = Request(prompt, messages, text, ids)
        else:
            request = Request(prompt, None, prompt, self.tokenizer(prompt, verbose=False)["input_ids"])
        if not request.ids:
            raise InputError("the tokenizer returns no tokens for it")
        if self.context is not None and len(request.ids) >= self.context:
            raise InputError(
                f"{len(request.ids)} tokens leave no room for an answer in a context of {self.context}"
            )
        return request

    def room(self, request: Request) -> int | None:
        """Tokens that an answer may have; None: any number."""
        return None if self.context is None else self.context - len(request.ids)


def prompt_encoder(
    name: str, folder: Path, settings: Generate, context: int | None, *, trust_remote_code: bool = False
) -> PromptEncoder:
    """The encoder of the model in a folder.

    Args:
        name: as in `generate.models`.
        folder: the model's.
        settings: whether a chat template is to be applied, and the system message.
        context: tokens that prompt and answer may have together, where that is known.
        trust_remote_code: whether a tokenizer's own code may run.
    Raises:
        InputError: where its tokenizer cannot be loaded, or its chat template is missing or cannot be used.
    """
    from transformers import AutoTokenizer

    try:
        with silence_libraries():
            tokenizer = AutoTokenizer.from_pretrained(
                folder.resolve(), local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as e:  # tokenizers raise exceptions of their own
        raise InputError(f"{name}: the tokenizer in {folder} cannot be loaded: {summary(e)}") from e
    has = bool(getattr(tokenizer, "chat_template", None))
    if settings.chat_template and not has:
        raise InputError(f"generate.chat_template: {name} has none\nLeave it out, or ask other models.")
    if settings.system is not None and not has:
        raise InputError(
            f"generate.system: it has no effect on {name}, which has no chat template\n"
            "Leave it out, or ask other models."
        )
    templated = has and settings.chat_template is not False
    try:
        end = _end_of_turn(tokenizer, settings.system) if templated else None
    except InputError as e:
        raise InputError(f"{name}: {e}") from e
    return PromptEncoder(name, tokenizer, templated, settings.system, context, end)


def _end_of_turn(tokenizer: Any, system: str | None) -> int | None:
    """The special token that a template writes after an assistant's message, None where it writes none.

    The merged model has the base's generation_config, which may not contain it. Without it an answer would
    continue with the user's next turn.

    Raises:
        InputError: where the template rejects a conversation, or leaves the system message out.
    """
    mark = "answer"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}]
    first = [] if system is None else [{"role": "system", "content": system}]
    before, _, after = _rendered(tokenizer, [*first, *turns], answered=True).rpartition(mark)
    if system is not None and system.strip() not in before:
        raise InputError("its chat template leaves generate.system out")
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    return int(ids[0]) if ids and ids[0] in added and added[ids[0]].special else None


def _rendered(tokenizer: Any, messages: list[Message], *, answered: bool = False) -> str:
    """Messages as text, through the chat template.

    Raises:
        InputError: where it rejects them.
    """
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not answered
        )
    except (TemplateError, ValueError, TypeError) as e:  # what templates raise
        raise InputError(f"its chat template rejects it: {summary(e)}") from e
    return text
