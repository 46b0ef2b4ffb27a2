"""How a model is evaluated."""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

from mergelab.schema.fields import Form, Limits, limited, number, one_of, setting


def _limit(value: Any) -> Optional[str]:
    sound = 0 < value < 1 or (value >= 1 and float(value).is_integer())
    message = "is neither a number of prompts (1, 2, ...) nor a share of them below 1; null is all of them"
    return None if sound else f"{number(value)} {message}"


PROMPTS = Form("a number of prompts (1, 2, ...), or a share of them below 1", _limit)


@dataclass
class Evaluation:
    """How a model is evaluated, in process: by lm_eval, or by a kind of evaluation of your own."""

    kind: str = "skills"
    """`skills` (the family's own), `tasks` (named lm_eval tasks), `perplexity` (of a text file), `none`, or
    the name of a kind of your own."""
    options: Dict[str, Any] = field(default_factory=dict)
    """Settings of a kind of your own, which declares their names, types and defaults."""
    tasks: List[str] = field(default_factory=list)
    """kind=tasks: names of lm_eval tasks or groups."""
    search_tasks: List[str] = field(default_factory=list)
    """kind=tasks: tasks over *other* data, which a search may use as fitness."""
    allow_test_split: bool = False
    """Let a search optimize on the prompts that its result is reported on, where there are no others.
    The reported scores are then too good, and the report says so."""
    shares: Dict[str, float] = setting({}, Limits(at_least=0))
    """How much a task or skill counts in the fitness; 1 where it is not named."""
    metrics: Dict[str, str] = field(default_factory=dict)
    """The metric of a task, where it should not be the first that the task declares."""
    include_path: Optional[str] = None
    """A folder of your own lm_eval task files."""
    text: Optional[str] = None
    """kind=perplexity: the UTF-8 text file. Blank lines separate documents."""
    num_fewshot: Optional[int] = limited(None, at_least=0, note="null: the task's own")
    """Null: what each task says."""
    limit: Optional[float] = setting(None, PROMPTS)
    """The first N prompts of each task (or, below 1, that share of them). Null: all."""
    batch_size: int = limited(16, at_least=1)
    """Prompts that are measured at once."""
    backend: str = one_of("hf", "vllm")
    """What answers the prompts: `hf` (transformers) or `vllm`, on as many CUDA devices at once as
    `hardware.devices` says (tensor parallel), in batches of its own."""
    chat_template: bool = False
    """Put prompts through the model's chat template."""
    max_length: Optional[int] = limited(None, at_least=2, note="null: the model's own")
    """Tokens of context. Null: the model's own."""
    baselines: bool = True
    """Also measure the base and every expert."""
    cache: bool = True
    """Reuse scores of models, tasks and settings that have not changed."""
