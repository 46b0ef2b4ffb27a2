"""generate: ask models, one or several side by side; without prompts, converse at the terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import groupby

from rich.cells import cell_len

from mergelab.context import check_settings
from mergelab.core.errors import InputError, InputErrors, Interrupted
from mergelab.core.findings import Finding
from mergelab.core.run_dir import RunDir, short_path
from mergelab.generation import prompts, settings
from mergelab.generation.chat import HELP, Screen, chat
from mergelab.generation.generator import Answer, Generator, load_generator
from mergelab.generation.prompting import PromptEncoder, Request, prompt_encoder
from mergelab.generation.select_models import Subject, choose
from mergelab.generation.transcript import ENDINGS, NOTHING, Transcript, rate
from mergelab.jobs import Step, register
from mergelab.report import terminal
from mergelab.schema import Evaluation, Run

CONTROLS = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | dict.fromkeys(range(127, 160), 0xFFFD)
"""Characters that would steer the terminal, and what is shown for them."""

TOLD = 3
"""Prompts that are named where models cannot take them; of others only the number is given."""


def findings(run: Run) -> Iterator[Finding]:
    """What is wrong with the settings by themselves."""
    return settings.findings(run.generate)


def execute(run: Run, run_dir: RunDir) -> str:
    """Ask every model every prompt, or converse. What was said is in the folder as soon as it was said.

    Raises:
        InputErrors: with what is wrong with settings, models or prompts, before a weight is read.
        StepError: where a model cannot be loaded, or fails.
    """
    check_settings(replace(run, eval=Evaluation(kind="none")), run_dir)  # nothing is measured here
    subjects = choose(run, run.overrides)
    asked = given(run)
    encoders, requests = read(run, subjects, asked)
    record = Transcript(run_dir.folder, run, {s.name: s.label for s in subjects})
    try:
        if asked:
            for subject, own, those in zip(subjects, encoders, requests, strict=True):
                ask(run, subject, own, those, record, alone=len(subjects) == 1)
                run_dir.event("generated", model=subject.name, answers=len(those))
        else:
            converse(run, subjects, encoders, record)
    except KeyboardInterrupt:
        kept = f"interrupted; what was answered is in {short_path(record.lines)}"
        raise Interrupted(kept if record.answers else "") from None
    finally:
        record.close()
        run_dir.record({"generation": record.summary()})
    if len(subjects) > 1 and asked:
        side_by_side(record.answers)
    if record.answers:
        terminal.aside(f"kept in {short_path(record.page)} and {record.lines.name}")
    what = _count(record.prompts, "prompt" if asked else "turn")
    return f"{what} x {_count(len(subjects), 'model')}, {rate(record.answers):.0f} tokens/s"


def _count(n: int, thing: str) -> str:
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


def given(run: Run) -> list[str]:
    """The prompts of the configuration and its file, else the lines of a pipe; none at a terminal.

    Raises:
        InputError: where nothing is asked.
    """
    g = run.generate
    if g.prompts or g.file is not None:
        return [*g.prompts, *(prompts.of_file(g.file) if g.file is not None else [])]
    if sys.stdin is not None and sys.stdin.isatty():
        return []
    try:
        return prompts.of_pipe(sys.stdin.buffer if sys.stdin is not None else io.BytesIO())
    except InputError as e:
        raise InputError(
            f"generate.prompts: it is empty, and {e}\n"
            "Name prompts, or a file of them: generate.file=FILE. To converse, start it at a terminal."
        ) from None


def read(
    run: Run, subjects: Sequence[Subject], asked: Sequence[str]
) -> tuple[list[PromptEncoder], list[list[Request]]]:
    """How each model reads, and what it reads of each prompt.

    Raises:
        InputErrors: with the models that cannot, and the prompts that they cannot take.
    """
    encoders: list[PromptEncoder] = []
    requests: list[list[Request]] = []
    wrong: list[str] = []
    refused: dict[str, list[str]] = {}
    for s in subjects:
        try:
            trust = run.model.trust_remote_code
            encoders.append(
                prompt_encoder(s.name, s.folder, run.generate, s.context, trust_remote_code=trust)
            )
        except InputError as e:
            wrong.append(str(e))
            continue
        requests.append([])
        for number, prompt in enumerate(asked, start=1):
            try:
                requests[-1].append(encoders[-1].encode([{"role": "user", "content": prompt}]))
            except InputError as e:
                refused.setdefault(f"prompt {number}: {e}", []).append(s.name)
    wrong += [f"{what}: {', '.join(names)}" for what, names in [*refused.items()][:TOLD]]
    if len(refused) > TOLD:
        wrong.append(f"and so on, {_count(len(refused) - TOLD, 'more refusal')}")
    if wrong:
        raise InputErrors(wrong)
    return encoders, requests


# ---------------------------------------------------------------- asking


def ask(
    run: Run,
    subject: Subject,
    own: PromptEncoder,
    requests: Sequence[Request],
    record: Transcript,
    *,
    alone: bool,
) -> None:
    """Load one model, and let it answer; when this returns, its memory is free for the next.

    Args:
        alone: whether answers are shown as they are made, or wait for those of other models.
    """
    with terminal.waiting() as wait:
        wait(f"loading {subject.name}")
        generator = load_generator(own, subject.folder, subject.adapter, run)
    if alone:
        for number, request in enumerate(requests, start=1):
            _prompt(request.prompt)
            answer = generator.answer(request, _write)
            record.add(number, answer)
            _write("\n" if answer.text else f"{NOTHING}\n")
            _cut([answer])
            terminal.say("")
        return
    with terminal.progress() as progress:
        for number, request in enumerate(requests, start=1):
            progress(subject.name, number - 1, len(requests))
            record.add(number, generator.answer(request, lambda piece: None))


def converse(
    run: Run, subjects: Sequence[Subject], encoders: Sequence[PromptEncoder], record: Transcript
) -> None:
    """Load all models, and converse with them."""
    generators: list[Generator] = []
    with terminal.waiting() as wait:
        for subject, own in zip(subjects, encoders, strict=True):
            wait(f"loading {subject.name}")
            generators.append(load_generator(own, subject.folder, subject.adapter, run))
    alone = len(generators) == 1
    terminal.aside(f"{', '.join(v.name for v in generators)}: {HELP}")
    if plain := [v.name for v in generators if not v.encoder.templated]:
        terminal.aside(f"Without a chat template each line is asked by itself: {', '.join(plain)}.")

    def label(name: str) -> None:
        if not alone:
            terminal.console.out(f"{name}  ", style="dim", end="")

    with suppress(ImportError):  # with it the arrow keys work; not every Python has it
        import readline  # noqa: F401
    chat(generators, record, Screen(_typed, label, _write, terminal.aside))


def _typed() -> str:
    """A line from the terminal; what ends it otherwise leaves the cursor at the beginning of one."""
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        terminal.say("")
        raise


# ---------------------------------------------------------------- showing


def shown(text: str) -> str:
    """A model's text as a terminal may have it: what would steer the terminal is made visible."""
    return text.translate(CONTROLS)


def _write(piece: str) -> None:
    terminal.console.out(shown(piece), end="")


def _prompt(prompt: str) -> None:
    terminal.console.out("\n".join(f"> {line}" for line in shown(prompt).split("\n")), style="bold")


def _cut(answers: Sequence[Answer]) -> None:
    """Tell of answers that the models did not end by themselves."""
    for ended, told in ENDINGS.items():
        cut = [a.model for a in answers if a.ended == ended]
        if told and cut:
            who = ", ".join(f"{_count(cut.count(name), 'answer')} of {name}" for name in dict.fromkeys(cut))
            terminal.aside(f"{told}: {who}")


def side_by_side(answers: Sequence[Answer]) -> None:
    """Answers of several models: in one table where that fits the terminal, else a block for each prompt.

    Args:
        answers: of all models in turn, each to all prompts in the same order.
    """
    models = {name: [*own] for name, own in groupby(answers, key=lambda a: a.model)}
    asked = [shown(a.request.prompt) for a in next(iter(models.values()))]
    said = list(zip(*([shown(a.text) or NOTHING for a in own] for own in models.values()), strict=True))
    rows = [[prompt, *texts] for prompt, texts in zip(asked, said, strict=True)]
    widths = [max(map(cell_len, column)) + 2 for column in zip(["", *models], *rows, strict=True)]
    if sum(widths) <= terminal.console.width and not any("\n" in cell for row in rows for cell in row):
        terminal.table("", ["", *models], rows)
    else:
        for prompt, texts in zip(asked, said, strict=True):
            _prompt(prompt)
            terminal.table("", ["", ""], [list(pair) for pair in zip(models, texts, strict=True)])
            terminal.say("")
    _cut(answers)


STEP = register(
    Step(
        "generate",
        execute,
        settings="generate",
        findings=findings,
        recorded=False,
        loads_models=True,
        asks_models=True,
    )
)
