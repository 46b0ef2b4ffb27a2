"""The training of the tiny family: all constants that determine its files.

This module does not import torch, because the folder of a family follows from these constants and must be
found quickly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

VERSION = 1
"""To be increased if the family changes by anything but the constants below: a skill, the tokenizer, the
training loop, the format of the tasks. Families are then rebuilt."""


@dataclass(frozen=True)
class Stage:
    """The training of one model of the family: the base, or an expert that starts from it."""

    role: str
    examples: Mapping[str, int]
    """The number of training questions of each skill in the pool from which batches are drawn."""
    steps: int
    learning_rate: float
    """The peak, reached after `warmup` steps. Then it falls linearly to `floor` times the peak."""
    warmup: int = 5
    floor: float = 0.0
    weight_decay: float = 0.0
    mistakes: float = 0.0
    """The share of the questions whose target is their typical mistake."""
    trained: str = "mlp"
    """Only parameters with this text in their name are trained; empty: all."""


@dataclass(frozen=True)
class Curriculum:
    """The architecture, the stages of training, and the size of the evaluations.

    Seven in ten of the base's training answers are mistakes. So the base answers with mistakes, but a few
    steps on correct answers are enough to correct it. The experts' learning rates differ on purpose: equal
    merge weights are then good but not optimal, so that a search can find better ones.
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
    """The longest sequence in tokens. The longest question with its answer has 16."""
    rope_theta: float = 100.0
    initializer_range: float = 0.08

    search_prompts: int = 64
    """Prompts per skill on which a search's fitness is measured."""
    validation_prompts: int = 200
    """Prompts per skill on which a finished model is evaluated."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All stages: the base, then the experts."""
        return (self.base, *self.experts)

    def fingerprint(self) -> str:
        """Eight hexadecimal digits that change with every constant and with the version."""
        constants = json.dumps({"version": VERSION, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(constants.encode()).hexdigest()[:8]
