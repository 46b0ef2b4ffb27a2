"""A loaded model that answers prompts, token by token."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mergelab.core.errors import StepError, summary
from mergelab.core.library_output import silence_libraries
from mergelab.evaluation import load
from mergelab.evaluation.isolation import seeded, threads
from mergelab.generation.prompting import PromptEncoder, Request
from mergelab.generation.streaming import Stream
from mergelab.schema import Generate, Run

Ended = Literal["end", "max_new_tokens", "context", "stopped"]
"""Why an answer ended: the model ended it, it has `max_new_tokens`, the context is full, or Ctrl-C."""


@dataclass(frozen=True)
class Answer:
    """A model's answer to a request."""

    model: str
    request: Request
    text: str
    """All that was streamed, without special tokens and without an incomplete last character."""
    tokens: int
    """Generated tokens, the end token included."""
    seconds: float
    """From the request to the last token."""
    ended: Ended


class Generator:
    """A loaded model with its prompt encoder.

    Args:
        encoder: its tokenizer and chat template.
        model: on its device, in evaluation mode.
        run: settings of `generate`, the seed, and `hardware.threads`.
    """

    def __init__(self, encoder: PromptEncoder, model: Any, run: Run):
        from transformers import GenerationConfig

        self.encoder, self._model, self._run = encoder, model, run
        own, tokenizer = model.generation_config, encoder.tokenizer
        self._ends = _ids(own.eos_token_id, tokenizer.eos_token_id, encoder.end_of_turn)
        self._pad = next(iter([*_ids(own.pad_token_id), *_ids(tokenizer.pad_token_id), *self._ends]), None)
        # Other values of the model's own, such as a temperature, would fill in what ours leaves open.
        model.generation_config = GenerationConfig(eos_token_id=self._ends or None, pad_token_id=self._pad)
        self._threads = threads(model, run.hardware)

    @property
    def name(self) -> str:
        """As in `generate.models`."""
        return self.encoder.name

    def answer(self, request: Request, write: Callable[[str], None], *, stoppable: bool = False) -> Answer:
        """Answer a request. Random numbers depend on the run's seed and the prompt alone, not on earlier
        answers.

        Args:
            request: from this generator's encoder.
            write: called with each piece of text as soon as it is known.
            stoppable: whether Ctrl-C ends the answer instead of the run.
        Raises:
            StepError: where the model fails, for example because there is too little memory.
        """
        import torch

        room, wanted = self.encoder.room(request), self._run.generate.max_new_tokens
        limit = wanted if room is None else min(wanted, room)
        stream = Stream(self.encoder.tokenizer, write)
        ids = torch.tensor([request.ids], device=self._model.device)
        stopped, seed = False, zlib.crc32(request.text.encode(), self._run.seed)
        start = time.monotonic()
        try:
            with silence_libraries(), seeded(seed, self._threads):
                self._model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=self._config(limit),
                    streamer=stream,
                )
        except KeyboardInterrupt:
            if not stoppable:
                raise
            stopped = True
            stream.end()
        except Exception as e:
            raise StepError(f"{self.name} could not answer {request.prompt[:60]!r}: {summary(e)}") from e
        seconds = time.monotonic() - start
        ended: Ended = "max_new_tokens" if limit == wanted else "context"
        if stopped:
            ended = "stopped"
        elif stream.tokens and stream.tokens[-1] in self._ends:
            ended = "end"
        return Answer(self.name, request, stream.text, len(stream.tokens), seconds, ended)

    def _config(self, limit: int) -> Any:
        from transformers import GenerationConfig

        g: Generate = self._run.generate
        sampling: dict[str, Any] = {"do_sample": g.temperature > 0}
        if g.temperature > 0:
            sampling |= {"temperature": g.temperature, "top_p": g.top_p, "top_k": g.top_k}
        return GenerationConfig(
            max_new_tokens=limit,
            repetition_penalty=g.repetition_penalty,
            eos_token_id=self._ends or None,
            pad_token_id=self._pad,
            **sampling,
        )


def _ids(*values: int | list[int] | None) -> list[int]:
    """Token ids of one or several fields, each once."""
    lists = [v if isinstance(v, list) else [v] for v in values if v is not None]
    return list(dict.fromkeys(i for ids in lists for i in ids))


def load_generator(encoder: PromptEncoder, folder: Path, adapter: Path | None, run: Run) -> Generator:
    """Load a model, with a LoRA adapter where there is one.

    Raises:
        StepError: where it cannot be loaded, or the adapter does not fit it.
    """
    model, _ = load(folder, run.hardware, adapter=adapter, trust_remote_code=run.model.trust_remote_code)
    return Generator(encoder, model, run)
