"""The page that shows a search as a whole: one file, without anything from elsewhere."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mergelab.report import score_table
from mergelab.report.evolution.data import Candidate, Evolution
from mergelab.report.evolution.importance import SHUFFLES, TREES, Importance
from mergelab.report.evolution.validation import validation
from mergelab.search_history import INITIAL, WINNER, row_label

CAPTIONS = {
    "pareto.png": "The first two objectives; no candidate on the front is beaten in all of them.",
    "fitness.png": "Every candidate by generation, with what there was to beat.",
    "validation.png": "Scores on the validation prompts, with one standard error.",
    "importance.png": "Which parameters mattered.",
    "parameters.png": "Each parameter from candidate to candidate; darker is fitter.",
    "parallel.png": "Every candidate as a line through its parameters; darker is fitter.",
}

COLUMNS = 12
"""Candidates of the front that the page shows; pareto.csv has them all."""

FAILURES = 20
"""Failed candidates that the page shows; candidates.csv has them all."""


@dataclass(frozen=True)
class Table:
    """A table of the page, with its heading."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    kind: str = "plain"
    """`first`: its first row is bold; `second`: its second column; `texts`: it holds words."""
    note: str = ""


def page(
    evolution: Evolution,
    result: Mapping[str, Any],
    importance: Importance,
    pictures: Mapping[str, bytes],
    placeholders: Mapping[str, str],
) -> str:
    """The text of index.html.

    Args:
        evolution: the search.
        result: its result.json.
        importance: as in importance.png.
        pictures: PNG by file name, in the order in which they are shown.
        placeholders: what pictures show in place of words that their font cannot draw.
    """
    name = (result.get("search") or {}).get("name")
    loader = PackageLoader("mergelab.report.evolution", "")
    environment = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        undefined=StrictUndefined,
    )  # fmt: skip
    return environment.get_template("page.html.jinja").render(
        title="Evolution of the merge" + (f": {name}" if name else ""),
        verdict=_verdict(evolution, result),
        command=result.get("command"),
        counts=_counts(evolution, result),
        tables=[t for t in (_genomes(evolution), _validation(result)) if t.rows],
        pictures=[_picture(name, content, importance) for name, content in pictures.items()],
        pictures_note=_pictures_note(evolution.merit, placeholders),
        closing_tables=[t for t in (_failures(evolution), _settings(result)) if t.rows],
    )


def _verdict(evolution: Evolution, result: Mapping[str, Any]) -> str:
    if result.get("verdict"):
        return str(result["verdict"])
    if not evolution.measured:
        return "No candidate has been evaluated yet."
    if evolution.several:
        return f"{len(evolution.front)} candidates are on the front so far."
    best = evolution.winner.merit if evolution.winner else None
    return f"No verdict yet: the best fitness so far is {score_table.number(best)}."


def _counts(evolution: Evolution, result: Mapping[str, Any]) -> str:
    """How many candidates there were, and what the search gained where that is known."""
    statuses = {"evaluated": "done", "repeated": "repeated", "failed": "failed"}
    counts = result.get("candidates") or {
        n: sum(c.status == s for c in evolution.candidates) for n, s in statuses.items()
    }
    text = "Candidates: " + ", ".join(f"{count} {n}" for n, count in counts.items()) + "."
    gain = result.get("gain") or {}
    if gain.get("value") is not None:
        number = score_table.number(gain["value"], gain.get("stderr"))
        text += f" Gain over the initial point: {number}."
    return text


def _genomes(evolution: Evolution) -> Table:
    """The genes of the winner, or of the front, beside those of the initial point."""
    on_front = [c for c in evolution.candidates if c.number in evolution.front]
    shown: list[tuple[str, Candidate]] = [(str(c.number), c) for c in on_front[:COLUMNS]]
    title = "Parameters of the front"
    note = "pareto.csv has the whole front." if len(on_front) > COLUMNS else ""
    if not evolution.several:
        winner, name = evolution.winner, evolution.winner_name
        shown, title, note = [(name, winner)] if winner else [], f"Parameters of the {name}", ""
        if winner and winner.number >= 0:
            fitness = score_table.number(winner.fitness)
            note = f"Candidate {winner.number} of generation {winner.generation}, fitness {fitness}."
    spaces = any(g.space for g in evolution.genes)
    heads = ["", *(n for n, _ in shown), row_label(INITIAL), *(["searched"] if spaces else [])]
    rows = [
        [
            g.key,
            *(_value(c.genome.get(g.key)) for _, c in shown),
            _value(evolution.initial.get(g.key)),
            *([g.space] if spaces else []),
        ]
        for g in evolution.genes
    ]
    kind = "second" if shown and not evolution.several else "plain"
    return Table(title if shown else "Parameters", heads, rows, kind, note)


def _value(value: Any) -> str:
    """A gene's value as people read it."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _validation(result: Mapping[str, Any]) -> Table:
    """The models in the order of the picture."""
    metrics = {m.name: {"validation": m.scores} for m in validation(result.get("metrics") or {}, {})}
    heads, rows = score_table.rows(metrics, "validation", result.get("shares") or {})
    kind = "first" if rows and rows[0][0] == WINNER else "plain"
    labelled = [[row_label(first), *cells] for first, *cells in rows]
    return Table("Validation", heads, labelled, kind, "± is one standard error.")


def _picture(name: str, content: bytes, importance: Importance) -> dict[str, str]:
    caption = CAPTIONS[name] + (f" {_method(importance)}" if name == "importance.png" else "")
    return {"alt": CAPTIONS[name], "caption": caption, "base64": base64.b64encode(content).decode()}


def _method(importance: Importance) -> str:
    """How importance was computed, or why it was not."""
    if importance.reason or importance.out_of_bag is None:
        return f"Not shown here: {importance.reason}."
    return (
        f"Permutation importance of a random forest ({TREES} trees, {SHUFFLES} shuffles, seed 0) on "
        f"{importance.candidates} evaluated candidates; direction by Spearman's rank correlation. "
        f"Out-of-bag R² {importance.out_of_bag:.2f}: 1 predicts unseen candidates exactly, 0 or less "
        "no better than their mean."
    )


def _pictures_note(merit: str, placeholders: Mapping[str, str]) -> str:
    key = ", ".join(f"{short} = {word}" for word, short in placeholders.items())
    notes = [f"In the pictures {key}."] if key else []
    if merit != "fitness":
        notes.append(f"There is no single fitness: fitter means better in the first objective, {merit}.")
    return " ".join(notes)


def _failures(evolution: Evolution) -> Table:
    failed = [c for c in evolution.candidates if c.status == "failed"]
    rest = len(failed) - FAILURES
    rows = [[str(c.number), str(c.generation), c.reason or "–"] for c in failed[:FAILURES]]
    note = f"{rest} more are in candidates.csv." if rest > 0 else ""
    return Table("Failed candidates", ["number", "generation", "reason"], rows, "texts", note)


def _settings(result: Mapping[str, Any]) -> Table:
    """The settings of the search, without the space, which stands beside the parameters."""

    def shown(value: Any) -> str:
        if value is None or value == []:
            return "–"
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)

    rows = [[str(k), shown(v)] for k, v in (result.get("search") or {}).items() if k != "space"]
    return Table("Settings", ["setting", "value"], rows, "texts")
