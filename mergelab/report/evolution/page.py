"""The page that shows a search as a whole: one file, without anything from elsewhere."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mergelab.report import score_table
from mergelab.report.evolution.data import SHUFFLES, TREES, Candidate, Evolution, Importance, validation

STYLE = """
:root { color-scheme: light dark; --ink: #22303a; --soft: #5c6b76; --line: #dfe5e9; --ground: #fbfcfd;
  --raised: #f0f4f6; --accent: #b5521c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e9ed; --soft: #9fb0bb; --line: #33414b;
  --ground: #151b20; --raised: #1f282f; --accent: #f0965c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 60rem; background: var(--ground);
  color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .8rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.verdict { font-size: 1.1rem; border-left: .25rem solid var(--accent); padding: .2rem 0 .2rem .8rem;
  margin: 0 0 1rem; }
pre { background: var(--raised); padding: .7rem .8rem; border-radius: .4rem; white-space: pre-wrap;
  margin: .6rem 0; }
code, pre { font: .88rem/1.5 ui-monospace, monospace; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { padding: .3rem .8rem .3rem 0; text-align: right; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.texts th, .texts td { text-align: left; white-space: normal; }
th { color: var(--soft); font-weight: 600; }
.first tbody tr:first-child, .second td:nth-child(2) { font-weight: 650; }
figure { margin: 1.4rem 0; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: .4rem;
  padding: .4rem; border: 1px solid var(--line); }
figcaption, .note { color: var(--soft); font-size: .92rem; margin-top: .4rem; }
"""

CAPTIONS = {
    "pareto.png": "The first two objectives; no candidate on the front is beaten in all of them.",
    "fitness.png": "Every candidate by generation, with what there was to beat.",
    "validation.png": "Scores on the validation prompts, with one standard error.",
    "importance.png": "Which parameters mattered.",
    "parameters.png": "Each parameter from candidate to candidate; darker is fitter.",
    "parallel.png": "Every candidate as a line through its parameters; darker is fitter.",
}


def page(
    evolution: Evolution,
    result: Mapping[str, Any],
    importance: Importance,
    pictures: Mapping[str, bytes],
    stand_ins: Mapping[str, str],
) -> str:
    """index.html.

    Args:
        evolution: what the journal and the result tell.
        result: the result itself.
        importance: as in importance.png.
        pictures: PNG by file name, in the order in which they are shown.
        stand_ins: what pictures show in the place of words that their font lacks.
    """
    name = (result.get("search") or {}).get("name")
    title = "Evolution of the merge" + (f": {name}" if name else "")
    heads, body = score_table.rows(
        _ordered(result.get("metrics") or {}), "validation", result.get("shares") or {}
    )
    strong = "first" if body and body[0][0] == "winner" else "plain"
    sections = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="verdict">{_text(_verdict(evolution, result))}</p>',
        f"<pre>{_text(result['command'])}</pre>" if result.get("command") else "",
        f"<p>{_text(_counts(evolution, result))}</p>",
        _genomes(evolution),
        _section("Validation", _table(heads, body, strong), "± is one standard error.") if body else "",
        _pictures(pictures, evolution.merit, importance, stand_ins),
        _failures(evolution),
        _settings(result.get("search") or {}),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(s for s in sections if s)
        + "\n</body>\n</html>\n"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _value(value: Any) -> str:
    """A gene's value as people read it."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(heads: Sequence[str], body: Sequence[Sequence[str]], kind: str) -> str:
    head = "".join(f'<th scope="col">{_text(h)}</th>' for h in heads)
    lines = "".join("<tr>" + "".join(f"<td>{_text(c)}</td>" for c in row) + "</tr>\n" for row in body)
    return (
        f'<div class="table"><table class="{kind}"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{lines}</tbody></table></div>"
    )


def _section(title: str, content: str, note: str = "") -> str:
    end = f'\n<p class="note">{_text(note)}</p>' if note else ""
    return f"<h2>{_text(title)}</h2>\n{content}{end}"


def _ordered(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The models in the order of the picture."""
    return {m.name: {"validation": m.scores} for m in validation(metrics, {})}


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
    """How many candidates there were, and what the search gained, if that is known."""
    statuses = {"evaluated": "done", "repeated": "repeated", "failed": "failed"}
    told = result.get("candidates") or {
        n: sum(c.status == s for c in evolution.candidates) for n, s in statuses.items()
    }
    text = "Candidates: " + ", ".join(f"{count} {n}" for n, count in told.items()) + "."
    gain = result.get("gain") or {}
    if gain.get("value") is not None:
        number = score_table.number(gain["value"], gain.get("stderr"))
        text += f" Gain against {gain.get('against', 'preset')}: {number}."
    return text


COLUMNS = 12
"""Of the front's candidates, those that the page shows; pareto.csv has them all."""


def _genomes(evolution: Evolution) -> str:
    """The genes of the winner, or of the front, beside the preset's."""
    if not evolution.genes:
        return ""
    on = [c for c in evolution.candidates if c.number in evolution.front]
    shown: list[tuple[str, Candidate]] = [(str(c.number), c) for c in on[:COLUMNS]]
    title, note = "Parameters of the front", "pareto.csv has the whole front." if len(on) > COLUMNS else ""
    if not evolution.several:
        name = "winner" if evolution.finished else "best so far"
        shown, title, note = (
            [(name, evolution.winner)] if evolution.winner else [],
            f"Parameters of the {name}",
            "",
        )
        number = evolution.winner.number if evolution.winner else -1
        if evolution.winner and number >= 0:
            fitness = score_table.number(evolution.winner.fitness)
            note = f"Candidate {number} of generation {evolution.winner.generation}, fitness {fitness}."
    if not shown:
        title = "Parameters"
    spaces = any(g.space for g in evolution.genes)
    heads = ["", *(n for n, _ in shown), "preset", *(["searched"] if spaces else [])]
    body = [
        [
            g.key,
            *(_value(c.genome.get(g.key)) for _, c in shown),
            _value(evolution.preset.get(g.key)),
            *([g.space] if spaces else []),
        ]
        for g in evolution.genes
    ]
    return _section(title, _table(heads, body, "plain" if evolution.several or not shown else "second"), note)


def _pictures(
    pictures: Mapping[str, bytes], merit: str, importance: Importance, stand_ins: Mapping[str, str]
) -> str:
    shown = []
    for name, content in pictures.items():
        caption = CAPTIONS[name] + (f" {_method(importance)}" if name == "importance.png" else "")
        source = "data:image/png;base64," + base64.b64encode(content).decode()
        shown.append(
            f'<figure><img src="{source}" alt="{_text(CAPTIONS[name])}">\n'
            f"<figcaption>{_text(caption)}</figcaption></figure>"
        )
    key = ", ".join(f"{short} = {word}" for word, short in stand_ins.items())
    notes = [f"In the pictures {key}."] if key else []
    if merit != "fitness":
        notes.append(f"There is no single fitness: fitter means better in the first objective, {merit}.")
    return _section("Pictures", "\n".join(shown), " ".join(notes))


def _method(importance: Importance) -> str:
    if importance.untold or importance.out_of_bag is None:
        return f"Not told here: {importance.untold}."
    return (
        f"Permutation importance of a random forest ({TREES} trees, {SHUFFLES} shuffles, seed 0) on "
        f"{importance.candidates} evaluated candidates; direction by Spearman's rank correlation. "
        f"Out-of-bag R² {importance.out_of_bag:.2f}: 1 predicts unseen candidates exactly, 0 or less "
        "no better than their mean."
    )


FAILURES = 20


def _failures(evolution: Evolution) -> str:
    failed = [c for c in evolution.candidates if c.status == "failed"]
    if not failed:
        return ""
    rest = len(failed) - FAILURES
    body = [[str(c.number), str(c.generation), c.reason or "–"] for c in failed[:FAILURES]]
    note = f"{rest} more are in candidates.csv." if rest > 0 else ""
    return _section("Failed candidates", _table(["number", "generation", "reason"], body, "texts"), note)


def _settings(search: Mapping[str, Any]) -> str:
    """How the search was set; the space stands beside the parameters."""

    def shown(value: Any) -> str:
        if value is None or value == []:
            return "–"
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)

    body = [[str(k), shown(v)] for k, v in search.items() if k != "space"]
    return _section("Settings", _table(["setting", "value"], body, "texts")) if body else ""
