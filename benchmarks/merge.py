"""Our engine beside `mergekit-yaml` and beside a bare copy of the bytes: `python -m benchmarks.merge`.

Whole processes, run in turn: start, imports, configuration and preflight are in the numbers. Both
merge by the same recipe (arithmetic in float32, written in the models' dtype). The floor ("bare") is
a process that reads every weight file of the merge and writes as many bytes as come out, with plain
system calls. What a process writes is removed after it, outside the measured time.

A first run of ours for each method, not measured, leaves the recipe, brings the inputs into the page
cache and makes mergelab remember their hashes, which it computes once for every file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from benchmarks.models import Shape, make
from benchmarks.printing import console, say, table
from benchmarks.processes import Measured, measure
from mergelab.core.conf_dir import CONF
from mergelab.core.machine import available_processors
from mergelab.core.sizes import format_size
from mergelab.methods import registry

DEFAULT = ["linear", "slerp", "task_arithmetic", "dare_ties", "ties", "della", "sce", "breadcrumbs"]
ALL = sorted(
    p.stem for p in (CONF / "method").glob("*.yaml") if p.stem not in ("mergekit", "mergekit_moe", "moe")
)
HARDWARE = sorted(p.stem for p in (CONF / "hardware").glob("*.yaml"))

SETTINGS = {
    "della": ["method.parameters.epsilon=0.1"], "della_linear": ["method.parameters.epsilon=0.1"],
    "sce": ["method.parameters.select_topk=0.5"], "slerp": ["method.parameters.t=0.4"],
    "nearswap": ["method.parameters.t=0.001"], "multislerp": ["method.base=none"],
}  # fmt: skip
"""What differs from the method's file. In bfloat16 the experts' norms and biases round to the base's, and
mergekit's multislerp ends with an error at task vectors of zero: here it averages parameters."""
PER_EXPERT = {"weight": 0.4, "density": 0.5}

FLOOR = """
import sys
out, size, *files = sys.argv[1:]
block = bytearray(1 << 20)
for name in files:
    with open(name, "rb", buffering=0) as f:
        while f.readinto(block):
            pass
with open(out, "wb", buffering=0) as f:
    left = int(size)
    while left:
        left -= f.write(memoryview(block)[:min(left, 1 << 20)])
"""


def main() -> None:
    """Parse, measure, print."""
    options = _options()
    with ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory
        folder = options.folder or Path(stack.enter_context(temporary(prefix="mergelab-")))
        folder.mkdir(parents=True, exist_ok=True)
        # What is removed after a run has a name that nobody else's folder has.
        out = stack.enter_context(temporary(prefix="run-", dir=folder))
        bench = Bench(options, folder.resolve(), Path(out).resolve())
        if options.deep:
            bench.deep()
        else:
            bench.compare()


def _options() -> argparse.Namespace:
    """What was typed, as `shape`, `methods` and the rest; ends with status 2 where it cannot be meant."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.merge",
        description=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shape = Shape()
    for name in ("hidden", "layers", "intermediate", "heads", "kv_heads", "vocab", "experts"):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=_count, default=getattr(shape, name), help="default %(default)s")
    parser.add_argument("--tied", action="store_true", help="one tensor for embedding and head")
    parser.add_argument("--dtype", default=shape.dtype, choices=["bfloat16", "float16", "float32"])
    parser.add_argument(
        "--methods", default=",".join(DEFAULT), help="with commas, or all; default %(default)s"
    )
    parser.add_argument("--rounds", type=_count, default=3, help="default %(default)s")
    parser.add_argument(
        "--folder", type=Path, help="keep the models here and use them again; those of another shape go"
    )
    parser.add_argument(
        "--hardware", default="cpu", choices=HARDWARE, help="of ours; with a GPU, mergekit gets --cuda"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="an override of ours; repeatable"
    )
    parser.add_argument("--no-mergekit", action="store_true", help="leave mergekit out")
    parser.add_argument(
        "--deep", action="store_true", help="only our memory, at this depth and twice as deep, one run each"
    )
    parser.add_argument("--json", type=Path, help="write every single measurement here")
    options = parser.parse_args()

    options.shape = Shape(**{f.name: getattr(options, f.name) for f in fields(Shape)})
    options.methods = ALL if options.methods == "all" else list(dict.fromkeys(options.methods.split(",")))
    if unknown := set(options.methods) - set(ALL):
        parser.error(f"no such method: {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    if few := [m for m in options.methods if _experts(m)[0] > options.experts]:
        parser.error(f"--experts {options.experts} is too few for {', '.join(few)}")
    if options.heads % options.kv_heads or options.hidden < options.heads:
        parser.error("--heads has to be a multiple of --kv-heads, and no more than --hidden")
    if options.folder and options.folder.exists() and not options.folder.is_dir():
        parser.error(f"--folder: {options.folder} is no folder")
    if options.json and (options.json.is_dir() or not options.json.parent.is_dir()):
        parser.error(f"--json: {options.json} cannot be written")
    return options


def _experts(method: str) -> tuple[int, int | None]:
    """The fewest and the most experts that a method takes."""
    conf = yaml.safe_load((CONF / "method" / f"{method}.yaml").read_text(encoding="utf-8"))
    return registry.get(method).inputs.experts(conf["base"])


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 on")
    return int(text)


@dataclass(frozen=True)
class Case:
    """One method on one family of models."""

    commands: dict[str, list[str]]
    """By who does it: bare, ours, mergekit."""
    reads: int
    """Bytes of the weight files."""
    writes: int


class Bench:
    """The measurements, in a folder that keeps models and hashes, and one for what the processes write."""

    def __init__(self, options: argparse.Namespace, folder: Path, out: Path):
        self._options, self._folder = options, folder
        self._shape: Shape = options.shape
        self._recipes, self._out = out, out / "out"
        self._environment = {"MERGELAB_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
        self._moved: dict[str, dict[str, int]] = {}
        self._singles: list[dict[str, Any]] = []

    def compare(self) -> None:
        """Every method in every way, in turn; a table of medians."""
        models = self._models(self._shape, "models")
        arms = ["bare", "ours"] if self._options.no_mergekit else ["bare", "ours", "mergekit"]
        heads = ["ours s", "CPU s", "anon MB", "mapped MB"]
        heads += ["mergekit s", "CPU s", "anon MB", "x mergekit"] if "mergekit" in arms else []
        shown = table("method", *heads, "bare s", "x bare")
        for method in self._options.methods:
            case = self._case(method, models)
            self._moved[method] = {"reads": case.reads, "writes": case.writes}
            found: dict[str, list[Measured]] = {arm: [] for arm in arms}
            for n in range(self._options.rounds):
                for arm in arms:
                    m = self._run(case.commands[arm])
                    found[arm].append(m)
                    self._note(self._shape, method, arm, n, m)
                    say(f"{method} {n + 1}/{self._options.rounds}  {arm} {m.wall:.2f} s", style="dim")
            shown.add_row(*_row(method, found))
        rounds = self._options.rounds
        medians = "one round" if rounds == 1 else f"medians of {rounds} rounds"
        self._show(
            shown,
            f"{medians} of whole processes in turn; files in the page cache, hashes of the inputs known",
            "x mergekit: mergekit's seconds by ours; x bare: ours by those of bare reading and writing",
        )

    def deep(self) -> None:
        """Peak memory of ours at two depths: it should not grow."""
        rows: dict[str, list[str]] = {m: [m] for m in self._options.methods}
        heads = []
        for folder, times in (("models", 1), ("models-deep", 2)):
            shape = replace(self._shape, layers=times * self._shape.layers)
            models = self._models(shape, folder)
            heads += [f"{shape.layers} layers: anon MB", "mapped MB"]
            for method, row in rows.items():
                case = self._case(method, models)
                m = self._run(case.commands["ours"])
                self._note(shape, method, "ours", 0, m)
                say(f"{method}, {shape.layers} layers: {_mb(m.anonymous)} MB", style="dim")
                row += [_mb(m.anonymous), _mb(m.mapped)]
        shown = table("method", *heads)
        for row in rows.values():
            shown.add_row(*row)
        self._show(shown, "peaks of one run each; hashes of the inputs known")

    def _models(self, shape: Shape, name: str) -> list[Path]:
        """Base and experts. Models of another shape are removed first, their note before all: what is
        half removed or half made must not be taken for whole."""
        folder = self._folder / name
        note = folder / "shape.json"
        if note.exists() and json.loads(note.read_text(encoding="utf-8")) != asdict(shape):
            note.unlink()
            shutil.rmtree(folder)
        if not note.exists():
            say(f"making {shape.experts + 1} models of {shape.parameters() / 1e6:.0f}M parameters")
        return make(shape, folder)

    def _case(self, method: str, models: list[Path]) -> Case:
        """The commands, after the run of ours that is not measured."""
        ours = self._ours(method, models)
        self._clean()
        measure(ours, self._environment)
        run = self._out / "ours"
        recipe = self._recipes / f"{method}.yaml"
        shutil.copyfile(run / "recipe.yaml", recipe)
        plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
        read = _weight_files(yaml.safe_load(recipe.read_text(encoding="utf-8")), plan)
        # Not checked, the model keeps the name of an unfinished one: wherever it lies.
        writes = sum(f.stat().st_size for f in run.rglob("*.safetensors"))
        self._clean()
        bare = [sys.executable, "-S", "-c", FLOOR, str(self._out / "bytes"), str(writes), *map(str, read)]
        commands = {"bare": bare, "ours": ours, "mergekit": self._mergekit(recipe)}
        return Case(commands, sum(f.stat().st_size for f in read), writes)

    def _ours(self, method: str, models: list[Path]) -> list[str]:
        """mergelab, preflight and merge."""
        base, *experts = models
        # The first expert takes the place of the set's only one; the others are new ones.
        chosen = dict(zip(["math", *(f"e{i}" for i in range(1, len(experts)))], experts, strict=True))
        names = list(chosen)[: _experts(method)[1]]
        takes = registry.get(method).used
        return [
            sys.executable, "-m", "mergelab", f"model.base.path={_quoted(base)}", "experts=single_math",
            *(f"experts.{n}.path={_quoted(chosen[n])}" for n in names),
            *(f"experts.{n}.{k}={v}" for k, v in PER_EXPERT.items() if k in takes for n in names),
            f"method={method}", *SETTINGS.get(method, []), f"hardware={self._options.hardware}", "eval=none",
            "job.steps=[preflight,merge]", f"hydra.run.dir={_quoted(self._out / 'ours')}",
            *self._options.set,
        ]  # fmt: skip

    def _mergekit(self, recipe: Path) -> list[str]:
        """mergekit-yaml, of the very recipe of ours."""
        program = Path(sys.executable).with_name("mergekit-yaml")
        start = [str(program)] if program.exists() else [sys.executable, "-m", "mergekit.scripts.run_yaml"]
        cuda = [] if self._options.hardware == "cpu" else ["--cuda"]
        return [*start, str(recipe), str(self._out / "theirs"), "--random-seed", "0", "--quiet", *cuda]

    def _run(self, command: list[str]) -> Measured:
        try:
            return measure(command, self._environment)
        finally:
            self._clean()

    def _clean(self) -> None:
        """An empty folder for what a process writes."""
        shutil.rmtree(self._out, ignore_errors=True)
        self._out.mkdir()

    def _note(self, shape: Shape, method: str, arm: str, number: int, m: Measured) -> None:
        """Keep a measurement; written at once, so that a later failure does not lose it."""
        single = {"method": method, "layers": shape.layers, "arm": arm, "round": number, **asdict(m)}
        self._singles.append(single)
        if self._options.json:
            content = {
                "shape": asdict(self._shape),
                "hardware": self._options.hardware,
                "device": _device(self._options.hardware),
                "versions": _versions(),
                "set": self._options.set,
                "bytes": self._moved,
                "runs": self._singles,
            }
            self._options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def _show(self, shown: Table, *notes: str) -> None:
        """The table, and what it is a table of."""
        s, o = self._shape, self._options
        width = 4 if s.dtype == "float32" else 2
        told = [
            f"Qwen2 of {s.parameters() / 1e6:.0f}M parameters, {s.dtype}: hidden {s.hidden}, "
            f"{s.layers} layers, intermediate {s.intermediate}, heads {s.heads}/{s.kv_heads}, "
            f"vocabulary {s.vocab}{', tied' if s.tied else ''}",
            f"base and {s.experts} experts of {format_size(s.parameters() * width)}",
            "; ".join([_device(o.hardware), ", ".join(f"{k} {v}" for k, v in _versions().items()), *o.set]),
            *notes,
        ]
        if self._moved:
            reads, writes = ([m[k] for m in self._moved.values()] for k in ("reads", "writes"))
            told[1] += f"; a merge reads {_span(reads)} and writes {_span(writes)}"
        terminal = console(132)
        terminal.print(shown)
        terminal.print("\n".join(told), markup=False)


def _weight_files(recipe: dict[str, Any], plan: dict[str, Any]) -> list[Path]:
    """Those of the models that the recipe names; a base that is only composed is not read."""
    named = {m["model"] for m in recipe["models"]} | {recipe.get("base_model")}
    out = []
    for folder in (Path(m["folder"]) for m in plan["models"] if m["reference"] in named):
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        out += sorted({folder / name for name in index["weight_map"].values()})
    return out


def _quoted(path: Path) -> str:
    """A path as Hydra reads it literally, spaces and commas too."""
    return "'" + str(path).replace("'", "\\'") + "'"


def _row(method: str, found: dict[str, list[Measured]]) -> list[str]:
    def median(arm: str, field: str) -> float:
        return float(statistics.median(getattr(m, field) for m in found[arm]))

    ours, bare = median("ours", "wall"), median("bare", "wall")
    row = [method, f"{ours:.2f}", f"{median('ours', 'cpu'):.2f}"]
    row += [_mb(median("ours", "anonymous")), _mb(median("ours", "mapped"))]
    if "mergekit" in found:
        theirs = median("mergekit", "wall")
        row += [f"{theirs:.2f}", f"{median('mergekit', 'cpu'):.2f}", _mb(median("mergekit", "anonymous"))]
        row.append(f"{theirs / ours:.1f}")
    return [*row, f"{bare:.2f}", f"{ours / bare:.1f}"]


def _mb(size: float) -> str:
    """Zero is what could not be seen."""
    return f"{size / 1e6:.0f}" if size else "-"


def _span(sizes: list[int]) -> str:
    low, high = format_size(min(sizes)), format_size(max(sizes))
    return low if low == high else f"{low} to {high}"


@cache
def _device(hardware: str) -> str:
    """Processors, and the GPU where one takes part: asked of a process of its own, so that this one
    holds nothing on it."""
    cores = f"{available_processors()} cores"
    if hardware == "cpu":
        return cores
    ask = "import torch; print(torch.cuda.device_count(), torch.cuda.get_device_name())"
    count, name = subprocess.check_output([sys.executable, "-c", ask], text=True).strip().split(" ", 1)
    return f"{cores}, {count if hardware == 'gpus' else 1} x {name}"


def _versions() -> dict[str, str]:
    return {p: version(p) for p in ("mergelab", "mergekit", "torch")}


if __name__ == "__main__":
    main()
