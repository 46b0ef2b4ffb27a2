"""Jobs, and the settings of their single steps."""

import re
from dataclasses import dataclass, field
from typing import Any, List, Optional

from omegaconf import MISSING

from mergelab.schema.fields import Form, NoEffect, limited, setting

MERGED = "merged"
"""The name of the model of `generate.path` in `generate.models`."""


def _pattern(value: Any) -> Optional[str]:
    try:
        re.compile(value)
    except re.error as e:
        return f"'{value}' is not a regular expression: {e}"
    return None


def _branch(value: Any) -> Optional[str]:
    sound = value.strip() and not re.fullmatch("[0-9a-f]{40}", value)
    return None if sound else f"'{value}' is not a branch; null is main"


def _message(value: Any) -> Optional[str]:
    return None if value.strip() else "it is empty; null writes one"


PATTERN = Form("regular expressions", _pattern)
BRANCH = Form("the name of a branch", _branch)
MESSAGE = Form("a text that is not empty", _message)

GREEDY = NoEffect(
    "with generate.temperature=0, which always takes the most likely token",
    lambda run: run.generate.temperature == 0,
    "Set generate.temperature above 0.",
    code="setting",
)


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
    """The text that a finished model continues. Null: a few of its own tokens."""
    distance: bool = True
    """Of composed inputs: also read all weights, to measure how far each expert is from the base."""
    text: Optional[str] = None
    """A UTF-8 text file on which a finished model's perplexity is compared with that of its parents. Null:
    the family's typical prompts, `model.prompts`."""


@dataclass
class Generate:
    """Settings of job=generate."""

    path: Optional[str] = setting(
        None,
        no_effect=[
            NoEffect(
                f"unless generate.models names '{MERGED}'",
                lambda run: run.generate.models and MERGED not in run.generate.models,
                code="setting",
            )
        ],
    )
    """A finished model's folder, or that of the run that made it: what `merged` stands for."""
    models: List[str] = field(default_factory=list)
    """The models that answer, side by side: `merged`, `base`, experts by name. Empty: `merged` where there
    is a path, else the base and every expert."""
    prompts: List[str] = field(default_factory=list)
    """What is asked. Without prompts and file: what is typed, a conversation where that is a terminal."""
    file: Optional[str] = None
    """A UTF-8 text file with a prompt a line, or JSON lines with the key `prompt`."""
    system: Optional[str] = setting(
        None,
        no_effect=[
            NoEffect(
                "with generate.chat_template=false, which sends prompts as they are",
                lambda run: run.generate.chat_template is False,
                code="setting",
            )
        ],
    )
    """What stands before a conversation, for models with a chat template."""
    chat_template: Optional[bool] = None
    """Put prompts through the chat template. Null: where the model has one."""
    max_new_tokens: int = limited(256, at_least=1)
    """The largest number of tokens of an answer."""
    temperature: float = limited(0.0, at_least=0, note="0: the most likely token")
    """0: always the most likely token. Above: sampled, by `seed`."""
    top_p: float = limited(1.0, above=0, at_most=1, no_effect=[GREEDY])
    """Sample from the most likely tokens that make up this probability."""
    top_k: int = limited(0, at_least=0, note="0: all tokens", no_effect=[GREEDY])
    """Sample from this many tokens at most. 0: from all."""
    repetition_penalty: float = limited(1.0, above=0, note="1: none")
    """Above 1: tokens that have occurred become less likely."""


@dataclass
class Fetch:
    """Settings of job=fetch."""

    dry_run: bool = False
    """Only report what is here, what is missing, and how large that is."""
    data: bool = True
    """Also the data sets that the evaluation reads."""
    workers: int = limited(8, at_least=1)
    """Files that are downloaded at once."""


@dataclass
class Publish:
    """Settings of job=publish."""

    path: Optional[str] = None
    """The finished model's folder, or that of the run that made it."""
    repo: Optional[str] = None
    """The repository on the hub: `owner/name`."""
    private: bool = True
    """Whether a repository that is created for it is private."""
    revision: Optional[str] = setting(None, BRANCH)
    """A branch, which is created where there is none of this name. Null: main."""
    message: Optional[str] = setting(None, MESSAGE)
    """The commit's message."""
    dry_run: bool = False
    """Only list exactly what would be uploaded."""


@dataclass
class Extract:
    """Settings of job=extract: a LoRA from the difference to the base."""

    model: Optional[str] = None
    """The expert, by name."""
    path: Optional[str] = None
    """Instead: a finished model's folder, or that of the run that made it."""
    rank: int = limited(32, at_least=1)
    """The largest rank of a module's two factors."""
    epsilon: float = limited(0.0, at_least=0, note="0: leave nothing out")
    """Singular values up to this are left out."""
    embeddings: bool = False
    """Also factorize the embeddings, which are otherwise saved whole where they have changed."""
    include: List[str] = setting([], PATTERN)
    """Regular expressions: only modules whose names match one. Empty: all."""
    exclude: List[str] = setting([], PATTERN)
    """Regular expressions: not those modules."""


@dataclass
class Analyze:
    """Settings of job=analyze."""

    top: float = limited(0.1, above=0, below=1)
    """The share of a task vector's entries, the largest, whose overlap is counted."""
    landscape: bool = True
    """Also measure models along the line between two experts, or on the plane through three models."""
    models: List[str] = field(default_factory=list)
    """The models that span it, of `base` and the experts: two for a line, three for a plane. Empty: the two
    experts where there are two, else the base and the first two experts."""
    points: int = limited(7, at_least=3)
    """Grid points along each axis of it."""
    margin: float = limited(0.25, at_least=0)
    """How far the grid reaches beyond the models, as a share of their distance."""


@dataclass
class Monitor:
    """Settings of job=monitor."""

    folder: Optional[str] = None
    """What to show: a run, a sweep, or any folder above them. Null: outputs/ and multirun/ here."""
    once: bool = False
    """Print the state and return. Always so where the output is not a terminal."""
    interval: float = limited(2.0, above=0)
    """Seconds between two updates."""
    hours: float = limited(24.0, above=0, infinite=True)
    """What ended longer ago is not shown, unless its folder was named."""


@dataclass
class Evaluate:
    """Settings of job=evaluate."""

    path: Optional[str] = None
    """A finished model's folder, measured beside the base and the experts."""
