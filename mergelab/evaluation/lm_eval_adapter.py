"""lm_eval's models with progress, exact log-likelihoods, and faster templates. Import it late."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM

from mergelab.core.errors import StepError
from mergelab.evaluation import windows

Report = Callable[[int, int], None]


@contextlib.contextmanager
def templates_compiled_once() -> Iterator[None]:
    """Have lm_eval compile each Jinja template of a task once instead of once a prompt.

    For a small model that took two thirds of an evaluation's time.
    """
    once = functools.lru_cache(maxsize=1000)(utils.env.from_string)
    with mock.patch.object(utils.env, "from_string", once):
        yield


class Counting(TemplateLM):  # type: ignore[misc]
    """A mixin for language models of lm_eval that reports how many requests have been answered.

    Documents are counted by windows because a single one may be a whole book.
    """

    report: Report | None = None
    """Called with (done, total)."""
    instances: Callable[[], Iterable[Any]] = staticmethod(lambda: ())
    """Returns all requests of the evaluation, which exist as soon as the first of them are made."""
    unread = 0
    """How many tokens a window of a document is shorter than the context."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._done = self._total = 0
        self.set_cache_hook(self)

    def watch(self, instances: Callable[[], Iterable[Any]], report: Report | None) -> None:
        """Start a new count."""
        self.instances, self.report, self._done, self._total = instances, report, 0, 0

    def add_partial(self, kind: str, *_: Any) -> None:
        """lm_eval calls this for each answer, because the model is its own cache hook."""
        if kind != "loglikelihood_rolling":
            self._answered(1)

    def _answered(self, n: int) -> None:
        if self._total == 0:
            self._total = sum(self._size(request) for request in self.instances())
        self._done += n
        if self.report is not None:
            self.report(self._done, self._total)

    def _size(self, request: Any) -> int:
        if request.request_type != "loglikelihood_rolling":
            return int(request.repeats)
        return len(self._windows(request.args[0])) * int(request.repeats)

    @functools.cached_property
    def _before(self) -> list[int]:
        """What a text is read after: the tokenizer's own special tokens, else BOS, else EOS.

        Raises:
            StepError: where there is nothing of the kind, so that a first token cannot be scored.
        """
        own = windows.lead(lambda text, special: self.tok_encode(text, add_special_tokens=special))
        if not own and self.prefix_token_id is None:
            raise StepError(
                "the tokenizer has neither a BOS nor an EOS token, after which a text could be read; "
                "give it one in tokenizer_config.json"
            )
        return own or [self.prefix_token_id]

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        tokens = self.tok_encode(text, add_special_tokens=False)
        return [*windows.cut(self._before, tokens, int(self.max_length) - self.unread)]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """The log-likelihood of each text, in nats.

        lm_eval's own takes the special tokens that the tokenizer puts before a text for a part of the text:
        where that is BOS, it would add p(BOS | BOS).
        """
        numbered = [(n, w) for n, r in enumerate(requests) for w in self._windows(r.args[0])]
        size = len(numbered) if self.batch_size == "auto" else int(self.batch_size)
        totals = [0.0] * len(requests)
        for start in range(0, len(numbered), max(size, 1)):
            batch = numbered[start : start + size]
            answers = self._loglikelihood_tokens([(None, *w) for _, w in batch], disable_tqdm=True)
            for (n, _), (likelihood, _) in zip(batch, answers, strict=True):
                totals[n] += likelihood
            self._answered(len(batch))
        return totals


class CountingLM(Counting, HFLM):  # type: ignore[misc]
    """An HFLM around a loaded model that reports its progress."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, max_length: int | None) -> None:
        # Log-softmax in float32: lm_eval would use the model's dtype, and a sum of log-likelihoods in
        # bfloat16 has only three correct digits.
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            softmax_dtype="float32",
            trust_remote_code=False,
        )

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **options: Any) -> Any:
        # lm_eval answers requests with the same input by one forward pass, but reads the likelihoods of
        # shorter continuations at the wrong position. In that case each request gets a pass of its own.
        lengths: dict[tuple[int, ...], int] = {}
        self.logits_cache = all(
            lengths.setdefault((*context, *answer[:-1]), len(answer)) == len(answer)
            for _, context, answer in requests
        )
        return super()._loglikelihood_tokens(requests, *args, **options)
