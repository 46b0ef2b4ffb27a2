"""A conversation at the terminal, with one model or several at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mergelab.core.errors import InputError, did_you_mean
from mergelab.generation.generator import Generator
from mergelab.generation.prompting import Message
from mergelab.generation.prompts import wrong
from mergelab.generation.transcript import ENDINGS, NOTHING, Transcript

COMMANDS = ("/reset", "/exit")
HELP = "/reset starts over, /exit ends, Ctrl-C stops an answer."


@dataclass(frozen=True)
class Screen:
    """Where a conversation is read from and shown.

    Args:
        read: returns a line that was typed; raises EOFError at Ctrl-D.
        label: shows which model answers next.
        write: shows a piece of its answer.
        note: shows a message of ours.
    """

    read: Callable[[], str]
    label: Callable[[str], None]
    write: Callable[[str], None]
    note: Callable[[str], None]


def chat(generators: Sequence[Generator], transcript: Transcript, screen: Screen) -> int:
    """Converse until /exit or Ctrl-D; returns the number of turns.

    Every model has a conversation of its own, with its own answers. A model without a chat template is asked
    each line by itself.
    """
    histories: dict[str, list[Message]] = {g.name: [] for g in generators}
    turns = 0
    while True:
        try:
            line = screen.read().strip()
            if line == "/exit":
                return turns
            if line == "/reset":
                for history in histories.values():
                    history.clear()
                screen.note("A new conversation.")
            elif re.fullmatch(r"/\w+", line):
                screen.note(f"There is no command {line}.{did_you_mean(line, COMMANDS)} {HELP}")
            elif line and (problem := wrong(line)):
                screen.note(problem)
            elif line:
                turns += 1
                for generator in generators:
                    _turn(turns, line, generator, histories[generator.name], transcript, screen)
        except EOFError:
            return turns
        except KeyboardInterrupt:  # while an answer is made, `answer` catches it
            screen.note(HELP)


def _turn(
    number: int,
    line: str,
    generator: Generator,
    history: list[Message],
    transcript: Transcript,
    screen: Screen,
) -> None:
    """One model's answer, added to its conversation. A line that the model cannot take is reported, and not
    added."""
    asked: Message = {"role": "user", "content": line}
    try:
        request = generator.encoder.encode([*history, asked])
    except InputError as e:
        screen.note(f"{generator.name} was not asked: {e}. /reset starts over.")
        return
    screen.label(generator.name)
    answer = generator.answer(request, screen.write, stoppable=True)
    screen.write("\n" if answer.text else f"{NOTHING}\n")
    if ENDINGS[answer.ended]:
        screen.note(ENDINGS[answer.ended])
    history += [asked, {"role": "assistant", "content": answer.text}]
    transcript.add(number, answer)
