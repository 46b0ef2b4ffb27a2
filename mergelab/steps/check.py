"""check: compare the composed models, or look at a finished one (check.path=DIR)."""

from __future__ import annotations

from collections.abc import Callable

from mergelab.analysis import finished_model
from mergelab.analysis.comparison import Subjects, compared
from mergelab.context import check_settings, make_plan, tell
from mergelab.core.findings import stop_on_errors
from mergelab.core.run_dir import RunDir
from mergelab.jobs import Step, register
from mergelab.models import compatibility
from mergelab.models.checkpoint import ModelMetadata
from mergelab.report import terminal
from mergelab.schema import Run

ROWS: dict[str, Callable[[ModelMetadata], object]] = {
    "architecture": lambda f: f.config["architectures"][0].removesuffix("ForCausalLM"),
    "layers": lambda f: f.text_config.get("num_hidden_layers"),
    "hidden size": lambda f: f.text_config.get("hidden_size"),
    "heads": lambda f: f.text_config.get("num_attention_heads"),
    "kv heads": lambda f: f.text_config.get("num_key_value_heads"),
    "vocabulary": lambda f: f.text_config.get("vocab_size"),
    "rope": lambda f: compatibility.rope_text(compatibility.rope(f.text_config)),
    "norm eps": lambda f: f.text_config.get("rms_norm_eps"),
    "dtype": lambda f: f.dtype,
    "tied": lambda f: f.text_config.get("tie_word_embeddings"),
    "parameters": lambda f: f"{f.parameters:,}",
    "tokenizer": lambda f: f.tokenizer.digest[:8] if f.tokenizer else "none",
    "chat template": lambda f: "yes" if f.tokenizer and f.tokenizer.chat_template else "no",
}
"""What is shown of each model."""


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
    rows = []
    for label, read in ROWS.items():
        values = [str(read(f)) for f in sound.values()]
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
