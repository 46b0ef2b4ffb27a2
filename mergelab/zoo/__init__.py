"""`model=tiny`: a weak base and five experts of a small Qwen2, trained on first use.

With it every part of mergelab runs offline in seconds. The experts are real fine-tunes of one base, each
good at one skill, and a merge of them is better than any of them. They are toys: results about merging
methods need not hold for large models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergelab.core.cache_dir import home
from mergelab.zoo.curriculum import Curriculum
from mergelab.zoo.skills import SKILLS
from mergelab.zoo.store import open_at

__all__ = ["ROLES", "SKILLS", "Family", "Progress", "family_path", "open_family"]

ROLES = ("math", "physics", "code", "japanese", "general")

Progress = Callable[[str, int, int], None]
"""Called with the activity, the optimisation steps done, and their constant total."""


@dataclass(frozen=True)
class Family:
    """A complete family in the folder `root`."""

    root: Path

    def checkpoint(self, role: str) -> Path:
        """The folder of a model in Hugging Face's format.

        Args:
            role: `base`, or one of ROLES.

        Raises:
            LookupError: There is no such role.
        """
        if role not in ("base", *ROLES):
            raise LookupError(f"no role {role!r} in the tiny family; choose base, {', '.join(ROLES)}")
        return self.root / role

    @property
    def tasks(self) -> Path:
        """The folder of the lm_eval tasks `tiny_<skill>_search` and `tiny_<skill>`."""
        return self.root / "tasks"


def family_path(seed: int = 0) -> Path:
    """The folder of the family of this seed, whether it exists or not."""
    return home() / "zoo" / f"qwen2-seed{seed}-{Curriculum().fingerprint()}"


def open_family(seed: int = 0, progress: Progress | None = None) -> Family:
    """The verified family of this seed. It is trained first (20 s on one core) if it does not exist.

    Raises:
        OSError: The family has to be trained and its folder cannot be written.
    """
    path = family_path(seed)
    open_at(path, lambda folder: build_family(folder, seed, Curriculum(), progress))
    return Family(path)


def build_family(
    folder: Path, seed: int, curriculum: Curriculum, progress: Progress | None = None
) -> Mapping[str, Any]:
    """Train a family into an empty folder.

    Returns:
        What the manifest says about the family. Its validation scores are for information only and not
        part of any evaluation.
    """
    total = sum(stage.steps for stage in curriculum.stages)
    report = progress or (lambda what, done, total: None)
    report("preparing", 0, total)

    from mergelab.zoo.tasks import write_tasks  # imports torch and transformers
    from mergelab.zoo.training import train_family

    write_tasks(folder / "tasks", curriculum.search_prompts, curriculum.validation_prompts)
    scores = train_family(folder, seed, curriculum, _counting(report, total))
    return {
        "seed": seed,
        "curriculum": asdict(curriculum),
        "versions": {package: version(package) for package in ("torch", "transformers")},
        "scores": scores,
    }


def _counting(report: Progress, total: int) -> Callable[[str], None]:
    """A function to call after each step. It reports a stage's first step, and then every 0.2 s."""
    done, last_role, last_time = 0, "", 0.0

    def step(role: str) -> None:
        nonlocal done, last_role, last_time
        done += 1
        now = time.monotonic()
        if role != last_role or now - last_time > 0.2 or done == total:
            last_role, last_time = role, now
            report(f"training {role}", done, total)

    return step
