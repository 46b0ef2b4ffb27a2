"""A finished model beside its parents: is it whole, and does it still know language?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergelab import evaluation
from mergelab.context import evaluator, family, hashes, on_this_machine, verify_model
from mergelab.core import hashing, model_class
from mergelab.core.errors import StepError
from mergelab.core.findings import Finding, error
from mergelab.core.run_dir import RunDir, find_model, finished_model, read_memo, write_text
from mergelab.evaluation import perplexity
from mergelab.models import checkpoint
from mergelab.preflight import resolve_inputs
from mergelab.report import score_table, terminal
from mergelab.schema import Evaluation, Run

NOISE = 8.0
"""Bits per byte of a model that knows nothing at all: every byte is as likely as any other."""

FAR = 1.5
"""Times the worst parent's bits per byte above which no merge of sound parents lies."""

FITS = ("hidden_size", "num_hidden_layers", "vocab_size")
"""Keys of config.json in which a model is like the models that it was made of."""


def check_finished_model(run: Run, run_dir: RunDir) -> str:
    """Read all of the model at check.path, load it, run it, and compare its perplexity if it continues text.

    Raises:
        InputError: where there is no model.
        StepError: when it is not sound, when that could not be found out, or where its parents know language
            and it does not.
    """
    run = on_this_machine(run)
    assert run.check.path is not None
    folder = finished_model(run.check.path, "check.path")
    made_of = parents(run, folder)
    report = verify_model(folder, run, made_of)
    run_dir.record({"check": report.json(), "model": str(folder)})
    if not report.sound:
        raise StepError(f"{folder} {report.verdict()}")
    for note in report.notes:
        terminal.finding("note", note)
    if report.smoke.ran == "generates":
        terminal.aside(f"{report.smoke.prompt!r} continues as {report.smoke.text!r}")
    facts = checkpoint.read(folder, "check.path")
    if not model_class.generates(facts.config):
        terminal.aside(f"no perplexity: {report.smoke.kind} does not continue text")
    elif not facts.has_tokenizer:
        terminal.aside("no perplexity: it has no tokenizer")
    else:
        _compare(run, run_dir, folder, made_of)
    return report.summary()


def findings(run: Run) -> Iterator[Finding]:
    """What is wrong with check.path and check.text."""
    if run.check.path is not None:
        try:
            find_model(run.check.path)
        except LookupError as e:
            yield error("setting", "check.path", str(e.args[0]))
    if run.check.text is not None:
        try:
            perplexity.documents(Path(run.check.text).expanduser())
        except StepError as e:
            yield error("setting", "check.text", str(e))


def parents(run: Run, folder: Path) -> dict[str, Path]:
    """The models that a finished one was made of, by name: as its run's record has them, else those of
    the composition that are of its shape. Empty where none is on this machine."""
    record = read_memo(folder.parent / "result.json")
    if str(folder) in (record.get("model"), record.get("set_aside")):
        listed = [(m["name"], Path(m["folder"])) for m in record.get("inputs", []) if not m["adapter"]]
        return {name: f for name, f in listed if (f / "config.json").exists()}
    own = checkpoint.weights(folder).text_config
    out = {}
    for s in resolve_inputs.find(run, lambda role: family(run).checkpoint(role)).sources:
        if s.folder and not s.adapter:
            theirs = checkpoint.weights(s.folder).text_config
            if all(own.get(k) == theirs.get(k) for k in FITS):
                out[s.name] = s.folder
    return out


def _text(run: Run, run_dir: RunDir) -> Path | None:
    """What perplexity is measured on: a file of the user's, else the family's typical prompts."""
    if run.check.text is not None:
        return Path(run.check.text).expanduser().resolve()
    prompts = dict.fromkeys(p for those in run.model.prompts.values() for p in those)
    if not prompts:
        return None
    path = run_dir.folder / "check.txt"
    write_text(path, "\n\n".join(prompts) + "\n")
    return path


def _compare(run: Run, run_dir: RunDir, folder: Path, made_of: dict[str, Path]) -> None:
    """Show bits per byte and perplexity beside those of the parents, and what that comes to."""
    asked_on = _text(run, run_dir)
    if asked_on is None:
        terminal.aside("no text to measure perplexity on: check.text=FILE")
        return
    settings = Evaluation(kind="perplexity", text=str(asked_on), batch_size=4, cache=run.eval.cache)
    asked = replace(run, eval=settings, hardware=replace(run.hardware, quantize="none"))
    measures, bench = evaluation.measures(asked), evaluator(asked)
    found: dict[str, Any] = {}
    with terminal.progress() as progress:
        for name, place in {"this model": folder, **made_of}.items():
            content = hashing.digest(hashes(place, progress))
            found[name] = bench.evaluate(place, measures, fingerprint=content)[measures[0].name]
    terminal.gap()
    rows = [
        [name, score_table.number(s.value, s.stderr), score_table.number(2 ** min(s.value, 1000))]
        for name, s in found.items()
    ]
    title = f"on {asked_on.name} ({found['this model'].samples} texts; lower is better)"
    terminal.table(title, ["", "bits per byte", "perplexity of a byte"], rows, first_bold=True, texts=1)
    terminal.gap()
    values = {n: {"bits_per_byte": s.value, "stderr": s.stderr} for n, s in found.items()}
    run_dir.record({"perplexity": values})
    _judge(found.pop("this model").value, {n: s.value for n, s in found.items()})


def _judge(own: float, theirs: dict[str, float]) -> None:
    """Say what the numbers come to.

    Raises:
        StepError: when the model has become noise.
    """
    if not theirs:
        terminal.aside("no parents here to compare it with; name them: model=..., experts=...")
        return
    worst = max(theirs, key=lambda n: theirs[n])
    if own > max(NOISE, FAR * theirs[worst]):
        raise StepError(
            f"the model has become noise: {own:.2f} bits per byte, where {worst}, the worst of its parents, "
            f"needs {theirs[worst]:.2f} and guessing needs {NOISE:g}"
        )
    if own > theirs[worst]:
        terminal.finding(
            "warning",
            f"it needs {own:.2f} bits per byte, more than any of its parents ({worst}: {theirs[worst]:.2f})\n"
            "Measure it on tasks (job=evaluate) before it is used.",
        )
