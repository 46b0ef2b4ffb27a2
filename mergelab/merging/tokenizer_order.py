"""The order in which mergekit adds tokens when it builds the union of several tokenizers.

It takes new tokens as `get_vocab` lists them, and a fast tokenizer lists them as a hash map of Rust's, in
another order in every process: the ids and rows of new tokens would change from run to run. Listed by id they
do not, and where mergekit's order is not chance it is this one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def by_id() -> Iterator[None]:
    """Have every fast tokenizer list its vocabulary and its added tokens by id."""
    from transformers import PreTrainedTokenizerFast as Fast

    listed, added = Fast.get_vocab, Fast.added_tokens_decoder

    def get_vocab(self: Any) -> dict[str, int]:
        return dict(sorted(listed(self).items(), key=lambda item: (item[1], item[0])))

    def added_tokens_decoder(self: Any) -> dict[int, Any]:
        return dict(sorted(added.fget(self).items()))

    with (
        mock.patch.object(Fast, "get_vocab", get_vocab),
        mock.patch.object(Fast, "added_tokens_decoder", property(added_tokens_decoder)),
    ):
        yield
