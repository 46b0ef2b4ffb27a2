"""How a model reads what it is asked: its chat template, its tokenizer, the room in its context.

None of it needs a weight, so what is wrong shows before any is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergelab.core.errors import InputError
from mergelab.core.library_output import silence_libraries
from mergelab.evaluation.results import gist
from mergelab.schema import Generate

Message = dict[str, str]
"""`role` (system, user or assistant) and `content`, as chat templates know them."""


@dataclass(frozen=True)
class Request:
    """What a model is given."""

    prompt: str
    """What was asked last."""
    messages: list[Message] | None
    """The conversation, where it went through a chat template."""
    text: str
    """What was tokenised."""
    ids: list[int]


@dataclass(frozen=True)
class PromptEncoder:
    """One model's way of reading."""

    name: str
    tokenizer: Any
    templated: bool
    """Whether prompts go through its chat template."""
    system: str | None
    context: int | None
    """Tokens that prompt and answer may have together; None: not known to be limited."""
    end_of_turn: int | None
    """The token that its chat template writes after an assistant's message."""

    def read(self, conversation: Sequence[Message]) -> Request:
        """The request that a conversation comes to; without a chat template only its last message.

        Raises:
            InputError: where the template refuses it, or the context has no room for an answer.
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
            raise InputError("the tokenizer makes nothing of it")
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
    """How the model in a folder reads.

    Args:
        name: as in `generate.models`.
        folder: the model's.
        settings: whether there shall be a chat template, and the system message.
        context: tokens that prompt and answer may have together, where that is known.
        trust_remote_code: whether a tokenizer's own code may run.
    Raises:
        InputError: where its tokenizer cannot be loaded, or its chat template is missing or of no use.
    """
    from transformers import AutoTokenizer

    try:
        with silence_libraries():
            tokenizer = AutoTokenizer.from_pretrained(
                folder.resolve(), local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as e:  # tokenizers raise kinds of their own
        raise InputError(f"{name}: the tokenizer in {folder} cannot be loaded: {gist(e)}") from e
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

    The merged model has the base's generation_config, which need not know it; without it an answer
    would go on with the user's next turn.

    Raises:
        InputError: where the template refuses a conversation, or leaves the system message out.
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
    """What a chat template makes of messages.

    Raises:
        InputError: where it refuses them.
    """
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not answered
        )
    except (TemplateError, ValueError, TypeError) as e:  # what templates raise by themselves
        raise InputError(f"its chat template refuses it: {gist(e)}") from e
    return text
