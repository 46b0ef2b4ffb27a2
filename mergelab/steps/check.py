"""check: compare the composed models, or look at a finished one (check.path=DIR)."""

from __future__ import annotations

from collections.abc import Callable

from mergelab.analysis import finished_model
from mergelab.analysis.comparison import Subjects, compared
from mergelab.context import check_settings, make_plan, tell
from mergelab.core.findings import stop_on_errors
from mergelab.core.run_dir import RunDir
from mergelab.jobs import Step, register
from mergelab.models import compatibility, config_meaning
from mergelab.models.checkpoint import ModelMetadata
from mergelab.models.config_meaning import Meaning
from mergelab.report import terminal
from mergelab.schema import Run

ROWS: dict[str, Callable[[ModelMetadata, Meaning], object]] = {
    "architecture": lambda f, m: f.config["architectures"][0].removesuffix("ForCausalLM"),
    "layers": lambda f, m: m.text.get("num_hidden_layers"),
    "hidden size": lambda f, m: m.text.get("hidden_size"),
    "heads": lambda f, m: m.text.get("num_attention_heads"),
    "kv heads": lambda f, m: m.text.get("num_key_value_heads"),
    "vocabulary": lambda f, m: m.text.get("vocab_size"),
    "rope": lambda f, m: compatibility.rope_text(m.rope) if m.rope else None,
    "norm eps": lambda f, m: compatibility.norm_eps(m.text),
    "dtype": lambda f, m: f.dtype,
    "tied": lambda f, m: m.text.get("tie_word_embeddings"),
    "parameters": lambda f, m: f"{f.parameters:,}",
    "tokenizer": lambda f, m: f.tokenizer.digest[:8] if f.tokenizer else "none",
    "chat template": lambda f, m: "yes" if f.tokenizer and f.tokenizer.chat_template else "no",
}
"""What is shown of each model. A family that has no such setting gets a dash."""


def execute(run: Run, run_dir: RunDir) -> str:
    """Show the table and the findings; an unsound model is a failure."""
    if run.check.path:
        check_settings(run, run_dir)
        return finished_model.check_finished_model(run, run_dir)
    plan = make_plan(run, run_dir, merges=False)
    show(plan.facts)
    tell(plan, "warning", "note")
    stop_on_errors(plan.findings)
    if run.check.distance:
        compared(run, run_dir, Subjects.of(run, run_dir))
    run_dir.record({"models": sorted(plan.facts)})
    return f"{len(plan.facts)} models fit together"


def show(facts: dict[str, ModelMetadata]) -> None:
    """A row for each property, a column for each model; what differs from the first is marked."""
    sound = {n: f for n, f in facts.items() if f.config}
    if not sound:
        return
    meanings = {n: config_meaning.of(f.config) for n, f in sound.items()}
    rows = []
    for label, read in ROWS.items():
        found = [read(f, meanings[n]) for n, f in sound.items()]
        values = ["-" if v is None else str(v) for v in found]
        rows.append([label, values[0]] + [v if v == values[0] else f"{v} *" for v in values[1:]])
    terminal.table("* differs from the first", ["", *sound], rows)


STEP = register(
    Step(
        "check",
        execute,
        settings="check",
        findings=finished_model.findings,
        read_only=True,
        recorded=False,
        on_login_node=True,
    )
)
