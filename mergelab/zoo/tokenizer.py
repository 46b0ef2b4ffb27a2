"""The tiny family's tokenizer: Qwen's byte-level BPE with merges for kana only."""

from __future__ import annotations

from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

from mergelab.zoo.skills import KANA

PAD, END = "<|pad|>", "<|endoftext|>"
PAD_ID, END_ID = 0, 1

# A chat is the text of its messages, so that a model sees the same tokens with and without the template.
_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def make_tokenizer(model_max_length: int) -> PreTrainedTokenizerBase:
    """A tokenizer for any text, with one token for each character of the skills.

    The vocabulary consists of padding, the end token, the 256 bytes, and the merges of each kana's three
    bytes. Padding is on the left, as batched generation requires.
    """
    vocabulary = {PAD: PAD_ID, END: END_ID}
    for symbol in sorted(ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    merges: list[Any] = []  # pairs, which Qwen2Tokenizer accepts although its annotation omits them
    for kana in KANA:
        ((symbols, _),) = ByteLevel(add_prefix_space=False).pre_tokenize_str(kana)
        pair = symbols[:2]
        if pair not in vocabulary:
            vocabulary[pair] = len(vocabulary)
            merges.append((symbols[0], symbols[1]))
        vocabulary[symbols] = len(vocabulary)
        merges.append((pair, symbols[2]))
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        model_max_length=model_max_length,
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
