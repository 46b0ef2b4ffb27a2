"""What the tiny family is taught: every constant that determines its files, in one place.

No torch here: the place of a family in the cache follows from these constants, and looking for it
must be cheap.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

VERSION = 1
"""Raise it when the family changes by anything but the constants below: a skill, the tokenizer,
the training loop, the form of the tasks. Families of another version are then built anew."""


@dataclass(frozen=True)
class Stage:
    """The training of one model of the family: the base, or an expert that starts from it."""

    role: str
    examples: Mapping[str, int]
    """How many training questions of each skill the pool has; batches are drawn from the pool."""
    steps: int
    learning_rate: float
    """Reached after `warmup` steps, then falling linearly to `floor` times itself."""
    warmup: int = 5
    floor: float = 0.0
    weight_decay: float = 0.0
    mistakes: float = 0.0
    """The share of the questions that are answered by their typical mistake."""
    trained: str = "mlp"
    """Only parameters with this in their name are trained; an empty text means all."""


@dataclass(frozen=True)
class Curriculum:
    """The architecture, the stages of training, and the size of the evaluations.

    Seven answers in ten are mistakes where the base learns, so it gives mistakes, and yet has seen
    enough to be set right in a few steps on clean answers. The experts' learning rates are uneven
    on purpose: equal merge weights are then good but not the best, and a search has something to
    find.
    """

    base: Stage = Stage(
        "base",
        {"math": 4160, "physics": 3200, "code": 4160, "japanese": 4480},
        steps=450,
        learning_rate=4e-3,
        warmup=30,
        floor=0.1,
        weight_decay=0.01,
        mistakes=0.7,
        trained="",
    )
    experts: tuple[Stage, ...] = (
        Stage("math", {"math": 4000}, steps=50, learning_rate=3e-3),
        Stage("physics", {"physics": 4000}, steps=60, learning_rate=1e-3),
        Stage("code", {"code": 4000}, steps=60, learning_rate=2e-3),
        Stage("japanese", {"japanese": 4000}, steps=80, learning_rate=1e-3),
        Stage(
            "general",
            {"math": 1000, "physics": 1000, "code": 1000, "japanese": 1000},
            steps=20,
            learning_rate=1e-4,
        ),
    )
    batch: int = 64
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's."""
    gradient_norm: float = 1.0
    """Longer gradients are clipped to this norm."""

    hidden_size: int = 64
    intermediate_size: int = 192
    layers: int = 2
    heads: int = 4
    positions: int = 64
    """The longest sequence in tokens; the longest question with its answer has 16."""
    rope_theta: float = 100.0
    initializer_range: float = 0.08

    search_prompts: int = 64
    """Prompts of a skill that a search's fitness is measured on."""
    validation_prompts: int = 200
    """Prompts of a skill that a finished model is judged by."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All stages: the base, then the experts."""
        return (self.base, *self.experts)

    def fingerprint(self) -> str:
        """Eight hexadecimal digits that change with any constant or with the version."""
        constants = json.dumps({"version": VERSION, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(constants.encode()).hexdigest()[:8]
