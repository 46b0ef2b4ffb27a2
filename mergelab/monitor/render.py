"""job=monitor: what runs, here and on clusters, shown live in the terminal. It only reads."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group
from rich.filesize import decimal
from rich.live import Live
from rich.text import Text

from mergelab.core.errors import InputError
from mergelab.core.findings import stop_on_errors
from mergelab.core.run_dir import short_path
from mergelab.monitor.collector import Row, Snapshot, Sweep, Watcher
from mergelab.report import terminal
from mergelab.report.progress_table import duration
from mergelab.schema import Monitor, validation

HERE = ("outputs", "multirun")
"""Where Hydra puts runs and sweeps."""
TASKS = 10
"""Tasks of a sweep, or waiting runs of a grid, that are shown one by one."""
STYLES = {"running": "cyan", "done": "green", "pending": "dim", "submitted": "dim", "no sign": "yellow",
          "detached": "yellow", "stopped": "yellow", "interrupted": "yellow"}  # fmt: skip
FIRST = ("running", "pending", "done", "failed")


def watch(settings: Monitor, console: Console | None = None) -> None:
    """Show what runs, until Ctrl-C; only once if that is asked for, or if the output is not a terminal.

    Raises:
        InputError: where the settings are wrong.
    """
    stop_on_errors(validation.check_section(settings, "monitor"))
    folder = Path(settings.folder).expanduser().absolute() if settings.folder is not None else None
    if folder is not None and not folder.is_dir():
        raise InputError(f"monitor.folder: {settings.folder} is not a folder")
    console = console or terminal.console
    roots = [folder] if folder else [Path.cwd() / name for name in HERE]
    watcher = Watcher(roots, settings.hours)

    def seen(height: int | None = None) -> Group:
        return view(watcher.look(), roots, console.width, height)

    try:
        if settings.once or not console.is_terminal or console.is_dumb_terminal:
            console.print(seen())
            return
        with Live(seen(console.height), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(settings.interval)
                live.update(seen(console.height), refresh=True)
    except KeyboardInterrupt:
        return


# ---------------------------------------------------------------- the whole


def view(look: Snapshot, roots: Sequence[Path], width: int, height: int | None = None) -> Group:
    """All rows, and below them their number.

    Args:
        height: lines that fit; None: any number.
    """
    clock = time.strftime("%H:%M:%S", time.localtime(look.time))
    last = [Text(), Text.assemble(counts(look.rows), "   ", (clock, "dim"))]
    if look.trouble:
        last.insert(1, Text(look.trouble, style="yellow"))
    if not look.rows:
        folders = " and ".join(short_path(r) + "/" for r in roots)
        last[0] = Text(f"nothing runs under {folders}")
    lines = shortened(blocks(look, width), None if height is None else height - len(last) - 2)
    return Group(*(_one_line(line, width) for line in [*lines, *last]))


def counts(rows: Sequence[Row]) -> str:
    """`2 running, 0 pending, 5 done, 1 failed`, and other states that occur. A sweep counts as one."""
    states = ["failed" if r.state == "invalid" else r.state for r in rows]
    present = {"running", *states}
    names = [*(s for s in FIRST if s in present), *sorted(present - set(FIRST))]
    return ", ".join(f"{states.count(s)} {s}" for s in names)


def blocks(look: Snapshot, width: int) -> list[list[Text]]:
    """The lines of each row. Sweeps are set apart. Of a grid's waiting runs the last are only counted."""
    paths = {r.folder: short_path(r.folder) for r in look.rows}
    widest = min(max((cell_len(p) for p in paths.values()), default=0), max(width * 7 // 20, 12))
    names = min(max((cell_len(r.name) for r in look.rows), default=0), max(width // 4, 8))
    out: list[list[Text]] = []
    waiting: dict[Path, int] = {}
    for i, row in enumerate(look.rows):
        head = Text(_padded(_tail(paths[row.folder], widest), widest), style="bold" if row.rank == 0 else "")
        head = Text.assemble(head, "  ", _padded(row.name, names) + "  " if row.name else "")
        head.append(state(row, look.time), style=STYLES.get(row.state, "red"))
        grid = row.folder.parent
        waiting[grid] = waiting.get(grid, 0) + (row.rank == 1)
        following = look.rows[i + 1].folder.parent if i + 1 < len(look.rows) else None
        if isinstance(row, Sweep):
            block = sweep_lines(row, head, look.time, width)
        elif row.rank == 1 and waiting[grid] > TASKS:
            if following == grid and look.rows[i + 1].rank == 1:
                continue
            block = [Text(f"and {waiting[grid] - TASKS} more pending in {short_path(grid)}", style="dim")]
        else:
            block = run_lines(row, head, look.time, width)
        apart = out and (isinstance(row, Sweep) or isinstance(look.rows[i - 1], Sweep))
        out.append([Text(), *block] if apart else block)
    return out


def shortened(parts: Iterable[list[Text]], room: int | None) -> list[Text]:
    """As many lines as fit, and the number of rows that are not shown."""
    parts = list(parts)
    lines: list[Text] = []
    for i, part in enumerate(parts):
        if room is not None and len(lines) + len(part) > room:
            if not lines:  # one that alone is too long
                lines = part[: max(room, 0)]
                i += 1
            return [*lines, Text(f"and {len(parts) - i} more", style="dim")] if i < len(parts) else lines
        lines += part
    return lines


# ---------------------------------------------------------------- one row


def run_lines(row: Row, head: Text, now: float, width: int) -> list[Text]:
    """A run: its name and state, and below that its progress and node, or why it failed."""
    value = f"fitness {row.fitness:.3f}" if row.fitness is not None else ""
    head.append(_after(_fitting([value, _age(row, now)], width - cell_len(head.plain) - 2), "dim"))
    below = _below(row, width)
    return [head, below] if below is not None else [head]


def sweep_lines(row: Sweep, head: Text, now: float, width: int) -> list[Text]:
    """A sweep: its progress, its best results, and its tasks."""
    turn = f"generation {row.generation} of {row.generations}" if row.generations else ""
    head.append(_after(_age(row, now) if row.rank == 2 else turn, "dim"))
    pace = ""
    if row.rate and row.rank == 0:
        left = f", {duration((row.total - row.done) / row.rate * 60)} left" if row.done < row.total else ""
        pace = f"{row.rate:.3g} a minute{left}"
    lines = [head, Text(f"  {row.done} candidates")]
    if row.total:
        bar = _bar(row.done / row.total, 24)
        lines[1] = Text.assemble("  ", bar, f"  {row.done} of {row.total}", _after(pace, "dim"))
    found = [("best", row.fitness if row.fitness is not None else row.best), ("initial", row.initial)]
    line = Text("  " + _joined(f"{name} {value:.3f}" for name, value in found if value is not None))
    if row.failed:
        reason = f", the last: {_first(row.last_failure)}" if row.last_failure else ""
        line.append(f"{'  ' if len(line) > 2 else ''}{row.failed} failed{reason}", style="dim")
    lines += [line] if len(line) > 2 else []
    if (below := _below(row, width)) is not None:
        lines.append(below)
    return lines + task_lines(row.tasks, now, width)


def task_lines(tasks: Sequence[Row], now: float, width: int) -> list[Text]:
    """One line for each task, in columns. Of many the last ones are only counted."""
    if not tasks:
        return []
    shown, rest = tasks[:TASKS], tasks[TASKS:]
    cells = [("#", "task", "node"), *((r.name, r.job, r.node) for r in shown)]
    sizes = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    starts = ["  " + "".join(_padded(c, n) + "  " for c, n in zip(x, sizes, strict=True)) for x in cells]
    lines = [Text(starts[0] + "state", style="dim")]
    for start, row in zip(starts[1:], shown, strict=True):
        line = Text(start)
        line.append(f"{state(row, now):<7}", style=STYLES.get(row.state, ""))
        line.append(_after(_most(row, width - cell_len(line.plain) - 2)))
        lines.append(line)
    if rest:
        waiting = sum(r.rank == 1 for r in rest)
        parts = [f"{n} {word}" for n, word in ((len(rest) - waiting, "running"), (waiting, "pending")) if n]
        lines.append(Text("  and " + ", ".join(parts).replace(" ", " more ", 1), style="dim"))
    return lines


def _most(row: Row, room: int) -> str:
    """The progress of a task and what it uses: the most detailed of several texts that fits."""
    steps, far = _text_of(row.step), _progress(row)
    step, memory, gpus = steps.partition(" ")[0], _memory(row), _gpus(row.gpus)
    for parts in (
        (steps, far, memory, gpus), (step, far, memory, gpus), (step, far, gpus), (far, gpus),
        (steps, far), (step, far),
    ):  # fmt: skip
        if cell_len(line := _joined(parts)) <= room:
            return line
    return _cut(far or step, room)


def state(row: Row, now: float) -> str:
    """`running`, `no sign since 40 s`, `pending 3rd (Priority)`."""
    if row.state == "no sign":
        return f"no sign since {duration(max(now - row.when, 0))}"
    if row.state == "pending":
        position = f" {ordinal(row.position)}" if row.position else ""
        return f"pending{position}" + (f" ({_first(row.reason)})" if row.reason else "")
    return row.state


def _age(row: Row, now: float) -> str:
    """`for 4 min` of what runs, `12 min ago` of what has ended."""
    seconds = max(now - row.when, 0)
    if row.rank < 2:
        return f"for {duration(seconds)}" if row.state == "running" and row.when else ""
    return f"{duration(seconds)} ago" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days ago"


def ordinal(n: int) -> str:
    """`1st`, `2nd`, `11th`."""
    end = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{end}"


def _below(row: Row, width: int) -> Text | None:
    """The second line of a row: progress, node and what it uses; or the reason."""
    if row.rank == 2:
        where = f"{row.step}: " if row.step else ""
        reason = _first(row.reason)
        return Text(_cut(f"  {where}{reason}", width), style="dim") if reason else None
    if row.rank == 1:
        return None
    use = [row.node, _memory(row), _gpus(row.gpus), row.job]
    far = _joined([_text_of(row.step), _progress(row)])
    line = Text(f"  {far}")
    if row.share is not None and cell_len(_joined([far, *use])) + 20 <= width:
        line = Text.assemble(f"  {_text_of(row.step)}  ", _bar(row.share, 16), f"  {_progress(row)}")
    used = _fitting(use, width - cell_len(line.plain) - 2)
    line.append(_after(used, "dim") if far else Text(used, style="dim"))
    return line if line.plain.strip() else None


def _progress(row: Row) -> str:
    """`45% 12 s left`."""
    if row.share is None:
        return ""
    return f"{row.share:.0%}" + (f" {duration(row.left)} left" if row.left is not None else "")


def _memory(row: Row) -> str:
    return decimal(row.memory) if row.memory else ""


def _gpus(gpus: Sequence[Mapping[str, Any]]) -> str:
    """`GPU 0 71% 34.1 GB`; of several their number, mean use and memory in all."""
    if not gpus:
        return ""
    busy = [g["busy"] for g in gpus if isinstance(g.get("busy"), (int, float))]
    used = sum(g["used"] for g in gpus if isinstance(g.get("used"), int))
    name = f"GPU {gpus[0].get('index', '')}".strip() if len(gpus) == 1 else f"{len(gpus)} GPUs"
    return name + (f" {sum(busy) / len(busy):.0%}" if busy else "") + f" {decimal(used)}"


# ---------------------------------------------------------------- parts of lines


def _bar(share: float, size: int) -> Text:
    full = round(min(max(share, 0.0), 1.0) * size)
    return Text.assemble(("━" * full, "cyan"), ("─" * (size - full), "dim"))


def _text_of(text: str) -> str:
    """On one line, without control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


def _first(text: str) -> str:
    """The first line of a message; its others are remedies."""
    return _text_of(text.strip().partition("\n")[0])


def _joined(parts: Iterable[str]) -> str:
    return "  ".join(filter(None, parts))


def _after(text: str, style: str = "") -> Text:
    return Text(f"  {text}" if text else "", style=style)


def _fitting(parts: Sequence[str], room: int) -> str:
    """As many parts as fit."""
    line = ""
    for part in filter(None, map(_text_of, parts)):
        longer = f"{line}  {part}" if line else part
        if cell_len(longer) <= room:
            line = longer
    return line


def _padded(text: str, size: int) -> str:
    text = _cut(_text_of(text), size)
    return text + " " * (size - cell_len(text))


def _cut(text: str, size: int) -> str:
    line = Text(text)
    line.truncate(max(size, 0), overflow="ellipsis")
    return line.plain


def _tail(path: str, size: int) -> str:
    """The end of a path that is too long, from a folder's name on where that is not much shorter."""
    if cell_len(path) <= size:
        return path
    end = path
    while end and cell_len(end) > size - 1:
        end = end[1:]
    slash = end.find("/")
    return "…" + (end[slash:] if 0 <= slash < size // 2 else end)


def _one_line(line: Text, width: int) -> Text:
    line.no_wrap = True
    line.rstrip()
    line.truncate(width, overflow="ellipsis")
    return line
