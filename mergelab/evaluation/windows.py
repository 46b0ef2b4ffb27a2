"""How a text is cut to the model's context for its rolling log-likelihood. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

VERSION = 2
"""Raised when a text's log-likelihood is computed differently: a part of what decides such a score."""

_PROBE = "a"


def lead(encode: Callable[[str, bool], Sequence[int]]) -> list[int]:
    """The special tokens that a tokenizer puts before every text, as BOS in Llama, Mistral and Gemma.

    They are what a text is read after, and no part of it.

    Args:
        encode: the ids of a text, with or without the special tokens.
    """
    bare, whole = list(encode(_PROBE, False)), list(encode(_PROBE, True))
    for at in range(len(whole) - len(bare) + 1):
        if whole[at : at + len(bare)] == bare:
            return whole[:at]
    return []


def cut(before: Sequence[int], tokens: Sequence[int], longest: int) -> Iterator[tuple[list[int], list[int]]]:
    """The windows of a text as (context, tokens to score): each token of the text is scored once.

    The first window begins with `before`, the tokens that the text is read after, which are not scored; where
    the text begins with them itself, they are not there twice. As in lm_eval, each later window begins with
    the one token before it, and the last one reaches back as far as the context does.

    Args:
        before: at least one token.
        tokens: the text.
        longest: the most tokens that the model reads at once.
    """
    before = list(before)[-longest:]
    there = list(tokens[: len(before)]) == before
    whole = [*([] if there else before), *tokens]
    at, end = len(before), min(longest + 1, len(whole))
    while at < len(whole):
        yield whole[max(0, end - longest - 1) : at], whole[at:end]
        at, end = end, min(end + longest, len(whole))
