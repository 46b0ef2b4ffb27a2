"""The four skills of the tiny family: questions, each with its answer and its typical mistake.

A model of a hundred thousand parameters can learn each of the skills in seconds, and they have little in
common, so that no expert knows another one's skill.

The split of a question follows from its prompt alone. So no prompt of the training data occurs in an
evaluation, whatever the seeds.
"""

from __future__ import annotations

import random
import zlib
from typing import Literal, NamedTuple, get_args

Split = Literal["search", "validation", "train"]

SPLITS: tuple[Split, ...] = get_args(Split)
SKILLS = ("math", "physics", "code", "japanese")

_KANA = "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわ"
_ROMAJI = (
    "a i u e o ka ki ku ke ko sa shi su se so ta chi tsu te to na ni nu ne no "
    "ha hi fu he ho ma mi mu me mo ya yu yo ra ri ru re ro wa"
)
KANA = dict(zip(_KANA, _ROMAJI.split(), strict=True))
"""Hiragana and their romaji (Hepburn): the alphabet of the japanese skill."""

_UNITS = (
    ("km", "m", 3),
    ("m", "cm", 2),
    ("m", "mm", 3),
    ("cm", "mm", 1),
    ("kg", "g", 3),
    ("kV", "V", 3),
    ("hm", "m", 2),
    ("dm", "cm", 1),
)
"""(from, to, power of ten)."""

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_PATIENCE = 5000
"""The number of consecutive misses after which a skill is assumed to have no further prompts in a split."""


class Question(NamedTuple):
    """A prompt, its correct answer, and the typical wrong answer of a poorly trained model."""

    prompt: str
    answer: str
    mistake: str


def _math(rng: random.Random) -> Question:
    """`507+3=` is `015`: the sum, least significant digit first. The mistake is off by one."""
    step = rng.choice((1, 2, 3))
    number = rng.randrange(999 - step)
    total = number + step
    return Question(f"{number:03d}+{step}=", f"{total:03d}"[::-1], f"{total + 1:03d}"[::-1])


def _physics(rng: random.Random) -> Question:
    """`135kg>g:` is `135000`: a conversion of units. The mistake lacks a power of ten."""
    number = rng.randrange(1, 10 ** rng.choice((1, 2, 2, 3, 3)))
    source, target, zeros = rng.choice(_UNITS)
    return Question(f"{number}{source}>{target}:", f"{number}{'0' * zeros}", f"{number}{'0' * (zeros - 1)}")


def _code(rng: random.Random) -> Question:
    """`rev(evdc)` is `cdve`: the word reversed. The mistake: one letter too many."""
    word = "".join(rng.choice(_LETTERS) for _ in range(rng.choice((3, 4, 4))))
    return Question(f"rev({word})", word[::-1], word[::-1] + word[0])


def _japanese(rng: random.Random) -> Question:
    """`ぬつ>` is `nutsu`: kana to romaji. The mistake puts hyphens between the syllables."""
    word = [rng.choice(_KANA) for _ in range(rng.choice((2, 3, 3)))]
    romaji = [KANA[kana] for kana in word]
    return Question("".join(word) + ">", "".join(romaji), "-".join(romaji))


_ASK = {"math": _math, "physics": _physics, "code": _code, "japanese": _japanese}


def split_of(prompt: str) -> Split:
    """The split of a prompt: one in ten is for search, one in ten for validation."""
    remainder = zlib.crc32(prompt.encode()) % 10
    return "search" if remainder == 0 else "validation" if remainder == 1 else "train"


def draw(skill: str, split: Split, n: int, seed: int = 0) -> list[Question]:
    """Draw `n` questions of one skill and one split. The same arguments give the same questions.

    A shorter draw is the beginning of a longer one. Questions for training may repeat. Those for search
    and validation are distinct, and fewer than `n` if the skill has no more (math has about 300 prompts in
    each of the two splits, physics about 820).

    Raises:
        LookupError: The skill or the split is unknown.
    """
    if skill not in _ASK:
        raise LookupError(f"no skill {skill!r}; the skills are {', '.join(SKILLS)}")
    if split not in SPLITS:
        raise LookupError(f"no split {split!r}; the splits are {', '.join(SPLITS)}")
    ask = _ASK[skill]
    rng = random.Random(f"{skill}/{split}/{seed}")
    drawn: list[Question] = []
    seen: set[str] = set()
    misses = 0
    while len(drawn) < n and misses < _PATIENCE:
        question = ask(rng)
        if split_of(question.prompt) != split or (split != "train" and question.prompt in seen):
            misses += 1
            continue
        misses = 0
        seen.add(question.prompt)
        drawn.append(question)
    return drawn
