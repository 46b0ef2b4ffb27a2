"""The models: a base and the checkpoints of its family."""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

from omegaconf import MISSING

from mergelab.schema.conditions import DECIDED_BY_FILE, of_mixture
from mergelab.schema.fields import limited, one_of, setting


@dataclass
class Checkpoint:
    """Where a model is."""

    path: str = MISSING
    """A local folder, a hub id (`org/name`), either with `+adapter` for a LoRA, or `zoo:ROLE`
    for a member of the built-in tiny family."""
    revision: Optional[str] = None
    """The hub commit, tag or branch. A 40-digit commit is what makes a run repeatable."""


@dataclass
class Skill:
    """How one skill of a family is measured."""

    validation: str = MISSING
    """The lm_eval task whose score is reported."""
    search: Optional[str] = None
    """The lm_eval task over *other* data that a search may use as fitness."""
    metric: Optional[str] = None
    """The task's metric, as lm_eval names it (`exact_match`, or `exact_match,strict-match` with
    its filter). Null: the first that the task declares."""
    share: float = limited(1.0, at_least=0)
    """How much this skill counts in the fitness."""


@dataclass
class Model:
    """A base model and the checkpoints of its family, by role."""

    name: str = MISSING
    base: Checkpoint = field(default_factory=Checkpoint)
    """The common ancestor of the experts."""
    roles: Dict[str, Checkpoint] = field(default_factory=dict)
    """The fine-tunes of the base, by what they are good at."""
    skills: Dict[str, Skill] = field(default_factory=dict)
    """What `eval=skills` measures."""
    tasks: Optional[str] = None
    """A folder of the family's own lm_eval task files; `zoo:tasks` for the tiny family's."""
    architecture: Dict[str, Any] = field(default_factory=dict)
    """The part of config.json from which a plan is made when the files are not here."""
    gated: bool = False
    """The hub asks for an accepted licence before it lets anyone download."""
    allow: List[str] = field(default_factory=list)
    """Codes of findings of preflight that are known to be harmless for this family."""
    tokenizer: Optional[str] = one_of(
        None, "base", "union", no_effect=[DECIDED_BY_FILE, of_mixture("which keeps the base's tokenizer")]
    )
    """Null keeps the base's tokenizer files as they are. `base` or `union` let mergekit build one
    and fit the embeddings to it, for experts whose vocabularies differ."""
    chat_template: Optional[str] = setting(None, no_effect=[DECIDED_BY_FILE])
    """Null keeps the base's. Otherwise `auto`, one of mergekit's names, or a Jinja template."""
    prompts: Dict[str, List[str]] = field(default_factory=dict)
    """Typical prompts of each role. The gate of a mixture of experts recognizes its expert by them where
    `experts.ROLE.prompts` is empty."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model, where its architecture is not transformers' own. It can do
    whatever you can do. Read it first, and name the revision that you have read."""
    zoo_seed: int = limited(0)
    """The seed from which the tiny family is trained (only where paths begin with `zoo:`)."""
