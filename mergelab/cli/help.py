"""`--help`: a page for somebody who sees mergelab for the first time."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from mergelab.report.terminal import console

GROUPS = {
    "preset": "whole named experiments",
    "model": "a base model and the checkpoints of its family, by role",
    "experts": "who takes part, with weight and density",
    "method": "how they are combined",
    "hardware": "where it runs",
    "eval": "how the result is judged",
    "search": "what evolves, with -m",
    "job": "which steps run",
    "tracking": "where runs are recorded besides their own folder",
}
"""The groups in the order in which one thinks of them."""

EXAMPLES = (
    ("python -m mergelab", "the tiny family, DARE-TIES, in about a minute"),
    ("python -m mergelab method=ties experts=stem experts.math.weight=0.7", "other parts, one value"),
    ("python -m mergelab -m method=linear,ties,dare_ties", "three runs and a comparison"),
    ("python -m mergelab -m search=cma", "evolve the weights and densities of the merge itself"),
    ("python -m mergelab -m search=cma hardware=slurm", "the same on a Slurm cluster"),
    ("python -m mergelab method=moe", "a mixture of experts, and where its gates send the tokens"),
    ("python -m mergelab preset=qwen32b_stem_focused_physics_math model=tiny", "a whole experiment by name"),
    ("python -m mergelab job=analyze", "how alike the experts are, and the landscape between them"),
    ("python -m mergelab job=generate generate.path=DIR", "ask a finished model: a chat"),
    ("python -m mergelab job=monitor", "what runs, here and on the cluster"),
    ("python -m mergelab model=qwen32b method=dare_ties job=plan", "what would run, and what it needs"),
    ("python -m mergelab method=mergekit method.path=my.yaml", "a mergekit YAML of yours"),
)


def show(folders: list[Path], defaults: dict[str, str]) -> None:
    """Print the page.

    Args:
        folders: the configuration folders, the user's own first.
        defaults: for each group the option that a bare command uses.
    """
    say = console.print
    say(Text("mergelab", style="bold"), "merges fine-tuned language models, checks and evaluates the")
    say("result, and records everything needed to understand and repeat it.\n")
    say("  python -m mergelab [-m] [group=option ...] [key=value ...]\n")
    for group, meaning in GROUPS.items():
        say(Text.assemble((group, "bold"), f"   {meaning}"))
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2), pad_edge=True)
        table.add_column(no_wrap=True, min_width=20)
        table.add_column(style="dim")
        for name, line in options(folders, group).items():
            table.add_row(f"{name} *" if defaults.get(group) == name else name, line)
        say(table)
    say(Text("  * what a bare command uses\n", style="dim"))
    say(Text("Examples", style="bold"))
    for command, meaning in EXAMPLES:
        say(f"  {command}")
        say(Text(f"      {meaning}", style="dim"))
    say(Text("\nFlags", style="bold"))
    for flag, meaning in (
        ("-m", "run every combination of comma-separated values"),
        ("--cfg job", "print the composed run and stop; with --resolve, all values filled in"),
        ("--config-dir DIR", "add models, experts, methods of your own: DIR/model/mine.yaml ..."),
        ("--version, --help", "this program's version; this page"),
        ("--hydra-help", "flags of Hydra, which does the composing"),
    ):
        say(Text.assemble(f"  {flag:<20}", (meaning, "dim")))
    say(
        Text("\nExit status", style="bold"),
        "  0 done, 1 a step failed, 2 the input was wrong, 130 interrupted",
    )


def options(folders: list[Path], group: str) -> dict[str, str]:
    """The options of a group, each with the first line of its file."""
    found: dict[str, str] = {}
    for folder in folders:
        for file in sorted((folder / group).glob("[!_]*.yaml")):
            with file.open(encoding="utf-8") as f:
                lines = (line.strip() for line in f)
                first = next((x for x in lines if x and not x.startswith("# @package")), "")
            found.setdefault(file.stem, first.removeprefix("#").strip() if first.startswith("#") else "")
    return dict(sorted(found.items()))
