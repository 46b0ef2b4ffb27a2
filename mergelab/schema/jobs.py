"""Jobs, and the settings of their single steps."""

from dataclasses import dataclass, field
from typing import List, Optional

from omegaconf import MISSING


@dataclass
class Job:
    """Which steps run, in this order."""

    name: str = MISSING
    steps: List[str] = field(default_factory=list)


@dataclass
class Check:
    """Settings of the check step."""

    path: Optional[str] = None
    """job=check: a finished model's folder; null checks the composed inputs."""
    prompt: Optional[str] = None
    """What a finished model is asked to continue. Null: a few of its own tokens."""
    distance: bool = True
    """Of composed inputs: also read all weights, for how far each expert is from the base."""
    text: Optional[str] = None
    """A UTF-8 text file on which a finished model's perplexity is compared with that of its parents. Null:
    the family's typical prompts, `model.prompts`."""


@dataclass
class Generate:
    """Settings of job=generate."""

    path: Optional[str] = None
    """A finished model's folder, or that of the run that made it: what `merged` stands for."""
    models: List[str] = field(default_factory=list)
    """Who answers, side by side: `merged`, `base`, experts by name. Empty: `merged` where there is a
    path, else the base and every expert."""
    prompts: List[str] = field(default_factory=list)
    """What is asked. Without prompts and file: what is typed, a conversation where that is a terminal."""
    file: Optional[str] = None
    """A UTF-8 text file with a prompt a line, or JSON lines with the key `prompt`."""
    system: Optional[str] = None
    """What stands before a conversation, for models with a chat template."""
    chat_template: Optional[bool] = None
    """Put prompts through the chat template. Null: where the model has one."""
    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: always the likeliest token. Above: sampled, by `seed`."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that make up this probability."""
    top_k: int = 0
    """Sample from this many tokens at most. 0: from all."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that have occurred become less likely."""


@dataclass
class Fetch:
    """Settings of job=fetch."""

    dry_run: bool = False
    """Only say what is here, what is missing, and how much that is."""
    data: bool = True
    """Also the data sets that the evaluation reads."""
    workers: int = 8
    """Files that are downloaded at once."""


@dataclass
class Publish:
    """Settings of job=publish."""

    path: Optional[str] = None
    """The finished model's folder, or that of the run that made it."""
    repo: Optional[str] = None
    """Where it goes: `owner/name`."""
    private: bool = True
    """Of a repository that is made for it."""
    revision: Optional[str] = None
    """A branch, made where it is not there. Null: main."""
    message: Optional[str] = None
    """Of the commit."""
    dry_run: bool = False
    """Only list exactly what would go."""


@dataclass
class Extract:
    """Settings of job=extract: a LoRA from the difference to the base."""

    model: Optional[str] = None
    """The expert, by name."""
    path: Optional[str] = None
    """Instead: a finished model's folder, or that of the run that made it."""
    rank: int = 32
    """The largest rank of a module's two factors."""
    epsilon: float = 0.0
    """Singular values up to this are left out."""
    embeddings: bool = False
    """Also of the embeddings, which else are saved whole where they have changed."""
    include: List[str] = field(default_factory=list)
    """Regular expressions: only modules whose names match one. Empty: all."""
    exclude: List[str] = field(default_factory=list)
    """Regular expressions: not those modules."""


@dataclass
class Analyze:
    """Settings of job=analyze."""

    top: float = 0.1
    """The share of a task vector's entries, the largest, whose overlap is counted."""
    landscape: bool = True
    """Also measure models along the line between two experts, or on the plane through three models."""
    models: List[str] = field(default_factory=list)
    """Who spans it, of `base` and the experts: two for a line, three for a plane. Empty: the two experts
    there are, else the base and the first two of them."""
    points: int = 7
    """Grid points along each axis of it."""
    margin: float = 0.25
    """How far the grid reaches beyond the models, as a share of their distance."""


@dataclass
class Monitor:
    """Settings of job=monitor."""

    folder: Optional[str] = None
    """What to look at: a run, a sweep, or any folder above them. Null: outputs/ and multirun/ here."""
    once: bool = False
    """Print what there is and return. Always so where the output is no terminal."""
    interval: float = 2.0
    """Seconds between two looks."""
    hours: float = 24.0
    """What ended longer ago is not shown, unless its folder was named."""


@dataclass
class Evaluate:
    """Settings of job=evaluate."""

    path: Optional[str] = None
    """A finished model's folder, measured beside the base and the experts."""
