"""Our engine beside `mergekit-yaml` and beside a bare copy of the bytes: `python -m benchmarks.merge`.

Whole processes, run in turn: start, imports, configuration and preflight are in the numbers. Both
merge by the same recipe (arithmetic in float32, written in the models' dtype). The floor is a
process that reads every input weight and writes as many bytes as come out, with plain system calls.

A first run of ours, not measured, brings the inputs into the page cache and makes mergelab remember
their hashes, which it computes once for every file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.models import Shape, make
from benchmarks.processes import Measured, measure
from mergelab.main import CONF
from mergelab.preflight import methods

DEFAULT = ["linear", "slerp", "task_arithmetic", "dare_ties", "ties", "della", "sce", "breadcrumbs"]
ALL = sorted(p.stem for p in (CONF / "method").glob("*.yaml") if p.stem not in ("mergekit", "moe"))

EXPERTS = {"slerp": 2, "nuslerp": 2, "nearswap": 2, "arcee_fusion": 2, "passthrough": 1}
"""How many a method takes; all that there are for any other."""

SETTINGS = {
    "della": ["method.parameters.epsilon=0.1"], "della_linear": ["method.parameters.epsilon=0.1"],
    "sce": ["method.parameters.select_topk=0.5"], "slerp": ["method.parameters.t=0.4"],
    "nearswap": ["method.parameters.t=0.001"],
}  # fmt: skip
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

say = Console(stderr=True, highlight=False).print


def main() -> None:
    """Parse, measure, print."""
    options = _options()
    shape = Shape(**{f.name: getattr(options, f.name) for f in fields(Shape)})
    names = ALL if options.methods == "all" else options.methods.split(",")
    if unknown := set(names) - set(ALL):
        options.error(f"no such method: {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    with tempfile.TemporaryDirectory() as temporary:
        root = options.folder or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        if options.deep:
            _deep(shape, names, root, options)
        else:
            _compare(shape, names, root, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.merge",
        description=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shape = Shape()
    for name in ("hidden", "layers", "intermediate", "heads", "kv_heads", "vocab", "experts"):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=getattr(shape, name), help="default %(default)s")
    parser.add_argument("--tied", action="store_true", help="one tensor for embedding and head")
    parser.add_argument("--dtype", default=shape.dtype, choices=["bfloat16", "float16", "float32"])
    parser.add_argument(
        "--methods", default=",".join(DEFAULT), help="with commas, or all; default %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--folder", type=Path, help="keep the models here, and use them again")
    parser.add_argument("--hardware", default="cpu", help="the hardware group; with gpu, mergekit --cuda")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="more overrides of ours"
    )
    parser.add_argument("--no-mergekit", action="store_true", help="leave mergekit out")
    parser.add_argument("--deep", action="store_true", help="memory only: this depth, and twice as deep")
    parser.add_argument("--json", type=Path, help="write every single measurement here")
    options = parser.parse_args()
    options.error = parser.error
    return options


class Case:
    """One method on one family of models, in a folder that holds what the runs leave."""

    def __init__(self, method: str, models: list[Path], root: Path, options: argparse.Namespace):
        self.method, self.out = method, root / "out"
        self.environment = {"MERGELAB_HOME": str(root / "home"), "HF_HUB_OFFLINE": "1"}
        base, *experts = models
        experts = experts[: EXPERTS.get(method, len(experts))]
        # The first expert keeps the place of the set's only role; the others are new ones.
        chosen = ["experts=single_math", f"experts.math.path={experts[0]}"]
        chosen += [f"experts.e{i}.path={e}" for i, e in enumerate(experts[1:])]
        names = ["math", *(f"e{i}" for i in range(len(experts) - 1))]
        takes = methods.takes(methods.declarations()[method])
        chosen += [f"experts.{n}.{k}={v}" for k, v in PER_EXPERT.items() if k in takes for n in names]
        self._ours = [
            sys.executable, "-m", "mergelab", f"model.base.path={base}", *chosen, f"method={method}",
            *SETTINGS.get(method, []), f"hardware={options.hardware}", "eval=none",
            "job.steps=[preflight,merge]", f"hydra.run.dir={self.out / 'ours'}", *options.set,
        ]  # fmt: skip
        self._cuda = ["--cuda"] if options.hardware.startswith("gpu") else []
        self._recipe = root / "recipe.yaml"

    def prepare(self) -> None:
        """The run that is not measured: it leaves the recipe, and says how much is read and written."""
        self._clean()
        measure(self._ours, self.environment)
        shutil.copyfile(self.out / "ours" / "recipe.yaml", self._recipe)
        plan = json.loads((self.out / "ours" / "plan.json").read_text(encoding="utf-8"))
        used = [
            m["folder"] for m in plan["models"] if m["folder"] in self._recipe.read_text(encoding="utf-8")
        ]
        self.files = [str(f) for folder in used for f in sorted(Path(folder).glob("*.safetensors"))]
        self.read, self.write = plan["estimate"]["read"], plan["estimate"]["write"]

    def ours(self) -> Measured:
        """mergelab, preflight and merge."""
        self._clean()
        return measure(self._ours, self.environment)

    def mergekit(self) -> Measured:
        """mergekit-yaml, of the same recipe."""
        self._clean()
        program = Path(sys.executable).with_name("mergekit-yaml")
        start = [str(program)] if program.exists() else [sys.executable, "-m", "mergekit.scripts.run_yaml"]
        arguments = [str(self._recipe), str(self.out / "theirs"), "--random-seed", "0", "--quiet"]
        return measure([*start, *arguments, *self._cuda], self.environment)

    def floor(self) -> Measured:
        """Bare reading and writing."""
        self._clean()
        self.out.mkdir()
        command = [sys.executable, "-S", "-c", FLOOR, str(self.out / "bytes"), str(self.write), *self.files]
        return measure(command)

    def _clean(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.rmtree(Path(self.environment["MERGELAB_HOME"]) / "merges", ignore_errors=True)


def _compare(shape: Shape, names: list[str], root: Path, options: argparse.Namespace) -> None:
    say(f"making {shape.experts + 1} models of {shape.parameters() / 1e6:.0f}M parameters")
    models = make(shape, root / "models")
    singles: list[dict[str, object]] = []
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    heads = ["method", "ours s", "CPU s", "anon MB", "mapped MB"]
    heads += [] if options.no_mergekit else ["mergekit s", "CPU s", "anon MB", "times as fast"]
    for i, head in enumerate([*heads, "bare s", "x bare"]):
        table.add_column(head, justify="right" if i else "left")
    for method in names:
        case = Case(method, models, root, options)
        case.prepare()
        arms: dict[str, Callable[[], Measured]] = {"bare": case.floor, "ours": case.ours}
        if not options.no_mergekit:
            arms["mergekit"] = case.mergekit
        found: dict[str, list[Measured]] = {name: [] for name in arms}
        for n in range(options.rounds):
            for name, run in arms.items():
                m = run()
                found[name].append(m)
                singles.append({"method": method, "arm": name, "round": n, **asdict(m)})
                say(f"{method} {n + 1}/{options.rounds}  {name} {m.wall:.2f} s", style="dim")
        table.add_row(*_row(method, found))
    case._clean()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 132)
    console.print(table)
    console.print(_caption(shape, options))
    if options.json:
        options.json.write_text(
            json.dumps({"shape": asdict(shape), "runs": singles}, indent=1), encoding="utf-8"
        )


def _row(method: str, found: dict[str, list[Measured]]) -> list[str]:
    def median(arm: str, field: str) -> float:
        return float(statistics.median(getattr(m, field) for m in found[arm]))

    row = [method]
    for arm in ("ours", "mergekit"):
        if arm not in found:
            continue
        row += [f"{median(arm, 'wall'):.2f}", f"{median(arm, 'cpu'):.2f}"]
        row.append(f"{median(arm, 'anonymous') / 1e6:.0f}")
        if arm == "ours":
            row.append(f"{median(arm, 'mapped') / 1e6:.0f}")
        else:
            row.append(f"{median(arm, 'wall') / median('ours', 'wall'):.1f}")
    bare = median("bare", "wall")
    return [*row, f"{bare:.2f}", f"{median('ours', 'wall') / bare:.1f}"]


def _deep(shape: Shape, names: list[str], root: Path, options: argparse.Namespace) -> None:
    """Peak memory of ours at two depths: it should not grow."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("method")
    rows: dict[str, list[str]] = {m: [m] for m in names}
    for layers in (shape.layers, 2 * shape.layers):
        deeper = Shape(**{**asdict(shape), "layers": layers})
        table.add_column(f"{layers} layers: anon MB", justify="right")
        table.add_column("mapped MB", justify="right")
        models = make(deeper, root / f"models{layers}")
        for method in names:
            case = Case(method, models, root, options)
            case.prepare()
            m = case.ours()
            say(f"{method}, {layers} layers: {m.anonymous / 1e6:.0f} MB", style="dim")
            rows[method] += [f"{m.anonymous / 1e6:.0f}", f"{m.mapped / 1e6:.0f}"]
            case._clean()
    for row in rows.values():
        table.add_row(*row)
    console = Console(highlight=False)
    console.print(table)
    console.print(_caption(shape, options))


def _caption(shape: Shape, options: argparse.Namespace) -> str:
    import os

    import torch

    device = torch.cuda.get_device_name() if options.hardware.startswith("gpu") else f"{os.cpu_count()} cores"
    versions = ", ".join(f"{p} {version(p)}" for p in ("mergelab", "mergekit", "torch"))
    size = {"float32": 4}.get(shape.dtype, 2) * shape.parameters() / 1e9
    return (
        f"Qwen2 of {shape.parameters() / 1e6:.0f}M parameters ({shape.layers} layers), {shape.dtype}, "
        f"base and {shape.experts} experts of {size:.2f} GB each\n{device}; {versions}; "
        f"medians of {options.rounds} rounds, whole processes in turn,\n"
        "files in the page cache, hashes of the inputs known"
    )


if __name__ == "__main__":
    main()
