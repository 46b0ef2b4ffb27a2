"""evaluate: measure the merged model and its parents, and record the fitness."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace

from mergelab import evaluation, zoo
from mergelab.context import evaluator, fingerprint
from mergelab.core.findings import Finding, error
from mergelab.core.run_dir import RunDir, find_model
from mergelab.evaluation import SPLITS
from mergelab.jobs import Step, register
from mergelab.jobs.step import merges
from mergelab.measured_models import MERGED, models, parents
from mergelab.models import checkpoint, remote_code, tensor_checks
from mergelab.preflight import evaluation_checks
from mergelab.preflight.value_checks import pickled_allowed
from mergelab.report import score_table as table
from mergelab.report import terminal
from mergelab.schema import Run


def findings(run: Run) -> Iterator[Finding]:
    """What is wrong with the model that job=evaluate is pointed at."""
    if run.evaluate.path is None:
        return
    key = "evaluate.path"
    if merges(run):
        yield error("unused", key, f"job={run.job.name} does not measure it", "Set job=evaluate.")
    try:
        folder = find_model(run.evaluate.path)
    except LookupError as e:
        yield error("missing", key, str(e.args[0]))
        return
    facts = checkpoint.read(folder, key, pickled=pickled_allowed(run))
    yield from (f for f in facts.findings if f.code not in checkpoint.OF_MERGES)
    yield from tensor_checks.check_complete(facts, key, merged=False)
    yield from remote_code.check(folder, key, allowed=run.model.trust_remote_code)
    yield from evaluation_checks.check_model(run, facts, key)
    if facts.config and not facts.has_tokenizer:
        yield error("no-tokenizer", key, facts.no_tokenizer)


def execute(run: Run, run_dir: RunDir) -> str:
    """Record the scores of all models, the merged one first, and the fitness.

    Parents are measured on the validation split only. The search split is for the fitness.
    """
    measured = {split: evaluation.measures(run, split) for split in SPLITS}
    if not measured["validation"]:
        return "nothing to measure (eval=none)"
    subjects = models(run, run_dir)
    measure = evaluator(run).evaluate
    metrics: dict[str, dict[str, dict[str, object]]] = {}
    with terminal.progress() as progress:
        for n, (name, (folder, adapter)) in enumerate(subjects.items(), start=1):
            content = fingerprint(folder, adapter, progress)
            splits = SPLITS if name == MERGED else SPLITS[:1]
            # One list for all splits, so that the model is loaded once.
            wanted = [replace(m, name=f"{s} {m.name}") for s in splits for m in measured[s]]
            found = measure(
                folder, wanted, adapter=adapter, fingerprint=content, progress=_bar(progress, name)
            )
            metrics[name] = {}
            for split in splits:
                scores = {m.name: found[f"{split} {m.name}"] for m in measured[split]}
                metrics[name][split] = {k: asdict(score) for k, score in scores.items()}
                if name == MERGED and scores:
                    # The search split comes last, and counts where the evaluation has one.
                    value = evaluation.fitness(scores, measured[split])
                    run_dir.record({"fitness": {"value": value, "split": split}})
            run_dir.event("evaluated", model=name, done=n, of=len(subjects))
    shares = {m.name: m.share for m in measured["validation"]}
    how = {"quantize": run.hardware.quantize, "backend": run.eval.backend}
    unusual = {"measured": how} if table.how(how) else {}
    run_dir.record({"metrics": metrics, "shares": shares, **unusual})
    apart = [m.name for m in parents(run, run_dir) if m.name not in subjects]
    unmeasured = f"; not {', '.join(apart)}: adapters" if apart else ""
    return f"{len(subjects)} models on {', '.join(shares)}{table.how(how)}{unmeasured}"


def _bar(progress: zoo.Progress, model: str) -> zoo.Progress:
    return lambda what, done, total: progress(f"{model}: {what}", done, total)


STEP = register(
    Step("evaluate", execute, needs="preflight", settings="evaluate", findings=findings, measures=True)
)
