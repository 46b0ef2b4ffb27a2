"""Text while it is generated: whole characters as soon as they are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

BROKEN = "�"
"""What a tokenizer returns for bytes that are not a character, or not yet."""

CONTEXT = 8
"""Tokens of the prompt that the first pieces are decoded with."""


class Stream:
    """A streamer for `model.generate`, which passes text on piece by piece.

    transformers' own streamers hold text back until a space or a kanji follows, so that kana would not
    appear before the answer ends. Here the last tokens are decoded with and without the newest one, and
    the difference is passed on once it ends in a whole character. Decoding begins a few tokens before
    the end of the prompt because some tokenizers strip the space at the beginning of a text.

    Args:
        tokenizer: decodes the tokens; special ones are left out.
        write: called with each piece.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        self._tokenizer, self._write = tokenizer, write
        self._ids: list[int] = []
        self._start = self._read = 0
        self._prompt = True
        self.tokens: list[int] = []
        """All that was generated, the end token included."""
        self.pieces: list[str] = []

    @property
    def text(self) -> str:
        """All that was written."""
        return "".join(self.pieces)

    def put(self, value: Any) -> None:
        """Take token ids, shape (tokens) or (1, tokens): first those of the prompt, then one at a time."""
        ids = value.flatten().tolist()
        if self._prompt:
            self._prompt, self._ids = False, ids[-CONTEXT:]
            self._read = len(self._ids)
            return
        for token in ids:
            self.tokens.append(token)
            self._ids.append(token)
            piece = self._new()
            if piece and not piece.endswith(BROKEN):
                self._pass_on(piece)
                self._start, self._read = self._read, len(self._ids)

    def end(self) -> None:
        """Pass on what is left, except an incomplete character."""
        self._pass_on(self._new().rstrip(BROKEN))
        self._start = self._read = len(self._ids)

    def _new(self) -> str:
        """The text of the tokens that have not been passed on."""
        before = self._decoded(self._ids[self._start : self._read])
        return self._decoded(self._ids[self._start :])[len(before) :]

    def _decoded(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _pass_on(self, piece: str) -> None:
        if piece:
            self.pieces.append(piece)
            self._write(piece)
