"""Prompts and answers on the disk: generations.jsonl and generations.md in a run's folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergelab.core.run_dir import write_text
from mergelab.generation.generator import Answer
from mergelab.schema import Run

LINES, PAGE = "generations.jsonl", "generations.md"

ENDINGS = {
    "end": "",
    "max_new_tokens": "cut at generate.max_new_tokens",
    "context": "cut where its context is full",
    "stopped": "stopped by Ctrl-C",
}
"""How an answer ended, where the model did not end it."""

SEPARATORS = {c: f"\\u{c:04x}" for c in (0x85, 0x2028, 0x2029)}
"""Characters that end a line for some programs but not for JSON; they are escaped."""

NOTHING = "(nothing)"
"""What is shown for an empty answer."""


class Transcript:
    """Both files, written from the start. Each answer is appended at once, so that a run that is killed keeps
    those that it had.

    Args:
        folder: of the run.
        run: its settings.
        labels: what models are called in public, by their names in the run: a hub id, or a path.
    """

    def __init__(self, folder: Path, run: Run, labels: Mapping[str, str]):
        self.lines, self.page = folder / LINES, folder / PAGE
        self._labels, self._settings = labels, _settings(run)
        settings = ", ".join(f"{k}={v:g}" for k, v in self._settings.items())
        self._head = (
            "# Generations\n\n" + "".join(f"- {n}: `{p}`\n" for n, p in labels.items()) + f"\n{settings}\n"
        )
        self._answers: list[tuple[int, Answer]] = []
        write_text(self.lines, "")
        write_text(self.page, self._head)

    @property
    def answers(self) -> list[Answer]:
        """All of them, in the order in which they were made."""
        return [a for _, a in self._answers]

    @property
    def prompts(self) -> int:
        """How many have been answered."""
        return len({number for number, _ in self._answers})

    def summary(self) -> dict[str, dict[str, Any]]:
        """For result.json: by model the number and speed of its answers."""
        said = {name: [a for a in self.answers if a.model == name] for name in self._labels}
        return {
            name: {
                "path": self._labels[name],
                "answers": len(own),
                "tokens": sum(a.tokens for a in own),
                "tokens_per_second": rate(own),
            }
            for name, own in said.items()
        }

    def add(self, number: int, answer: Answer) -> None:
        """Append an answer to prompt `number`, counted from 1."""
        before = self._answers[-1][0] if self._answers else None
        self._answers.append((number, answer))
        line = json.dumps(self._line(answer), ensure_ascii=False)
        _append(self.lines, line.translate(SEPARATORS) + "\n")
        _append(self.page, _section(number, answer, begins=number != before))

    def close(self) -> None:
        """Write the page again, sorted by prompt."""
        answers = sorted(self._answers, key=lambda pair: pair[0])
        previous = [None, *(number for number, _ in answers)]
        parts = [_section(n, a, begins=n != last) for (n, a), last in zip(answers, previous, strict=False)]
        write_text(self.page, self._head + "".join(parts))

    def _line(self, a: Answer) -> dict[str, Any]:
        return {
            "model": a.model, "path": self._labels[a.model], "prompt": a.request.prompt,
            "messages": a.request.messages, "input": a.request.text, "text": a.text,
            "ended": a.ended, "prompt_tokens": len(a.request.ids), "tokens": a.tokens,
            "seconds": round(a.seconds, 4), "tokens_per_second": rate([a]), "settings": self._settings,
        }  # fmt: skip


def rate(answers: list[Answer]) -> float:
    """Tokens per second of one or several answers, the time for reading the prompts included."""
    seconds = sum(a.seconds for a in answers)
    return round(sum(a.tokens for a in answers) / seconds, 1) if seconds else 0.0


def _settings(run: Run) -> dict[str, float]:
    g = run.generate
    return {
        "seed": run.seed, "max_new_tokens": g.max_new_tokens, "temperature": g.temperature,
        "top_p": g.top_p, "top_k": g.top_k, "repetition_penalty": g.repetition_penalty,
    }  # fmt: skip


def _section(number: int, a: Answer, *, begins: bool) -> str:
    """An answer as Markdown, after its prompt where it `begins` a section."""
    prompt = f"\n## {number}\n\n{_fenced(a.request.prompt)}" if begins else ""
    facts = [f"{a.tokens} tokens", f"{rate([a])} tokens/s", *filter(None, [ENDINGS[a.ended]])]
    return f"{prompt}\n**{a.model}** ({', '.join(facts)})\n\n{_fenced(a.text)}"


def _fenced(text: str) -> str:
    """A text in a code fence longer than any inside it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}\n"


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as f:
        f.write(text)
