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
HELP = "/reset begins anew, /exit ends, Ctrl-C stops an answer."


@dataclass(frozen=True)
class Screen:
    """Where a conversation is read from and shown.

    Args:
        read: a line that is typed; raises EOFError at Ctrl-D.
        label: shows whose answer begins.
        write: shows a piece of it.
        note: shows a line on what happens.
    """

    read: Callable[[], str]
    label: Callable[[str], None]
    write: Callable[[str], None]
    note: Callable[[str], None]


def chat(speakers: Sequence[Generator], record: Transcript, screen: Screen) -> int:
    """Converse until /exit or Ctrl-D; returns the number of turns.

    Every model has a conversation of its own, in which its own answers are. One without a chat template
    is asked each line by itself.
    """
    histories: dict[str, list[Message]] = {s.name: [] for s in speakers}
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
                screen.note(f"There is no {line}.{did_you_mean(line, COMMANDS)} {HELP}")
            elif line and (problem := wrong(line)):
                screen.note(problem)
            elif line:
                turns += 1
                for speaker in speakers:
                    _turn(turns, line, speaker, histories[speaker.name], record, screen)
        except EOFError:
            return turns
        except KeyboardInterrupt:  # an answer catches its own
            screen.note(HELP)


def _turn(
    number: int, line: str, speaker: Generator, history: list[Message], record: Transcript, screen: Screen
) -> None:
    """One model's answer, added to its conversation; what it cannot take is told, and not added."""
    asked: Message = {"role": "user", "content": line}
    try:
        request = speaker.reader.read([*history, asked])
    except InputError as e:
        screen.note(f"{speaker.name} was not asked: {e}. /reset begins anew.")
        return
    screen.label(speaker.name)
    answer = speaker.answer(request, screen.write, stoppable=True)
    screen.write("\n" if answer.text else f"{NOTHING}\n")
    if ENDINGS[answer.ended]:
        screen.note(ENDINGS[answer.ended])
    history += [asked, {"role": "assistant", "content": answer.text}]
    record.add(number, answer)
