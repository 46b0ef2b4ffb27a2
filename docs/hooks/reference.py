"""The generated parts of the reference pages: pure functions from the source tree to Markdown.

They read the code by `ast`, `conf/` as YAML, and the schema itself, which needs omegaconf alone, so the site
can be built without torch. `docs/hooks/site.py` puts them where a page says `<!-- generated: NAME -->`.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

GROUPS = ("model", "experts", "hardware", "eval", "search", "tracking", "preset")
"""The groups that share one page. Methods and jobs have their own."""


@dataclass(frozen=True)
class Option:
    """One file of a group."""

    name: str
    title: str
    """The first line of its header."""
    header: str
    """The other lines of its header."""
    values: str
    """The YAML below the header, as it stands in the file."""


def option(file: Path) -> Option:
    """Read an option's file: the comment at its top is its documentation."""
    lines = file.read_text(encoding="utf-8").splitlines()
    lines = [x for x in lines if not x.startswith("# @package")]
    end = next((i for i, x in enumerate(lines) if not x.startswith("#")), len(lines))
    comment = [x.removeprefix("#").removeprefix(" ") for x in lines[:end]]
    title, *rest = comment or [""]
    return Option(file.stem, title, "\n".join(rest).strip("\n"), "\n".join(lines[end:]).strip("\n"))


def options(group: str, root: Path = ROOT) -> list[Option]:
    """The options of a group in the order of their names."""
    return [option(file) for file in sorted((root / "conf" / group).glob("[!_]*.yaml"))]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(x.replace("|", "\\|").replace("\n", " ") for x in row) + " |" for row in lines
    )


def _fence(text: str, language: str = "text") -> str:
    return f"```{language}\n{text}\n```"


def _section(o: Option, level: str = "##") -> str:
    parts = [f"{level} {o.name}", o.title, _fence(o.header) if o.header else "", _fence(o.values, "yaml")]
    return "\n\n".join(x for x in parts if x)


def methods(root: Path = ROOT) -> str:
    """Every method: a table, then its formula, reference and defaults."""
    found = options("method", root)
    table = _table(["method", "what it does"], [[f"[`{o.name}`](#{o.name})", o.title] for o in found])
    return "\n\n".join([table, *map(_section, found)])


def groups(root: Path = ROOT) -> str:
    """The options of the other groups, with the values of each."""
    parts = []
    for group in GROUPS:
        found = options(group, root)
        rows = [[f"`{group}={o.name}`", o.title] for o in found]
        shown = "\n\n".join(_fence(f"# conf/{group}/{o.name}.yaml\n{o.values}", "yaml") for o in found)
        values = f'??? note "The files"\n\n{_indented(shown)}'
        parts += [f"## {group}", _table(["option", "what it is"], rows), values]
    return "\n\n".join(parts)


def _indented(text: str) -> str:
    return "\n".join(f"    {x}" if x else "" for x in text.splitlines())


def jobs(root: Path = ROOT) -> str:
    """Every job with its steps, and the section of its settings."""
    settings = {c.name: c for c in classes()}
    parts = []
    rows = []
    for o in options("job", root):
        listed = ", ".join(f"`{x}`" for x in yaml.safe_load(o.values).get("steps") or ()) or "none"
        rows.append([f"[`job={o.name}`](#job{o.name})", o.title, listed])
        parts.append(
            f"## job={o.name}\n\n{o.title}\n\n{o.header}\n\nSteps: {listed}.".replace("\n\n\n\n", "\n\n")
        )
        if (section := settings.get(o.name.capitalize())) is not None:
            parts.append(_fields(section, o.name))
    table = _table(["job", "what it does", "steps"], rows)
    return "\n\n".join([table, *parts, "## Steps", STEPS_TEXT, steps(root)])


STEPS_TEXT = """\
A step declares in its own file what has to be known of it. [Add a job](../howto/add-a-job.md) shows how to
write one. *Reads* is the section of the settings that it looks at. Setting another section is an error."""

TRAITS = {
    "read_only": "only reads",
    "examines": "examines the models of all runs before the first one starts",
    "merges": "writes the model",
    "measures": "measures models",
    "loads_models": "loads models",
    "on_login_node": "runs where the command is given",
    "online": "talks to the hub",
}
"""What a step says of itself, in words."""


def steps(root: Path = ROOT) -> str:
    """Every step: what it does, what has to come before it, which settings it reads."""
    rows = []
    for file in sorted((root / "mergelab" / "steps").glob("[!_]*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        told = (ast.get_docstring(tree) or "").partition("\n\n")[0].partition(": ")[2].replace("\n", " ")
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "Step":
                given = {k.arg: ast.unparse(k.value).strip("'") for k in call.keywords}
                traits = [text for name, text in TRAITS.items() if given.get(name) == "True"]
                before, section = (f"`{given[k]}`" if k in given else "" for k in ("needs", "settings"))
                does = told[:1].upper() + told[1:]
                rows.append([f"`{ast.literal_eval(call.args[0])}`", does, before, section, "; ".join(traits)])
    return _table(["step", "what it does", "after", "reads", "besides"], rows)


# ---------------------------------------------------------------- configuration


@dataclass(frozen=True)
class Field:
    """One key of a configuration class."""

    name: str
    type: str
    default: str
    values: str
    doc: str


@dataclass(frozen=True)
class Section:
    """One configuration class."""

    name: str
    doc: str
    fields: tuple[Field, ...]


def classes() -> list[Section]:
    """The dataclasses of the configuration, each field with the docstring below it."""
    from mergelab import schema  # needs omegaconf alone
    from mergelab.schema.reference import entries

    out = []
    for name in ("Run", *(n for n in schema.__all__ if n not in ("Run", "Composition"))):
        kind = getattr(schema, name)
        if is_dataclass(kind):
            found = [_field(e, get_type_hints(kind)[e.key]) for e in entries(kind) if "." not in e.key]
            out.append(Section(name, inspect.getdoc(kind) or "", tuple(found)))
    return out


def _field(entry: Any, hint: Any) -> Field:
    without = [f"It has no effect {condition}." for condition in entry.no_effect]
    required = not entry.default and not entry.is_section
    return Field(
        name=entry.key,
        type=getattr(hint, "__name__", "") if isinstance(hint, type) else str(hint),
        default="required" if required else entry.default,
        values=entry.values,
        doc=" ".join([*([entry.meaning] if entry.meaning else []), *without]),
    )


TYPES = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false", "Any": "see below"}


def _type(text: str) -> str:
    text = re.sub(r"\b(?:typing|mergelab\.schema\.\w+)\.", "", text)
    text = re.sub(r"^Optional\[(.*)\]$", r"\1", text)
    if found := re.fullmatch(r"(?:List|list)\[(.*)\]", text):
        return f"list of {_type(found[1])}"
    if found := re.fullmatch(r"(?:Dict|dict)\[str, (.*)\]", text):
        return "mapping" if found[1] == "Any" else f"mapping to {_type(found[1])}"
    return {"Any": "number, list or mapping"}.get(text, TYPES.get(text, f"[{text}](#{text.lower()})"))


def _fields(section: Section, key: str) -> str:
    rows = [
        [
            f"`{key}.{f.name}`" if key else f"`{f.name}`",
            _type(f.type),
            f"`{f.default}`" if f.default else "",
            f.values,
            f.doc,
        ]
        for f in section.fields
    ]
    return _table(["key", "type", "default", "values", "meaning"], rows)


def config(root: Path = ROOT) -> str:
    """Every key of a run: type, default, meaning."""
    found = {c.name: c for c in classes()}
    run = found["Run"]
    key_of = {re.sub(r".*\b(\w+)\]*$", r"\1", f.type): f.name for f in run.fields if f.default == ""}
    key_of |= {
        "Expert": "experts.ROLE",
        "Checkpoint": "",
        "Skill": "model.skills.NAME",
        "Slurm": "hardware.slurm",
        "SchedulerChoice": "hardware.scheduler",
    }
    key_of |= {"Fidelity": "search.fidelity"}
    parts = ["## Run", run.doc, _fields(run, "")]
    for name, section in found.items():
        if name == "Run" or not section.fields:
            continue
        parts += [f"## {name}", section.doc, _fields(section, key_of.get(name, ""))]
    return "\n\n".join(parts)


# ---------------------------------------------------------------- findings and the Python API


def finding_codes(root: Path = ROOT) -> dict[str, tuple[str, str]]:
    """Code -> (cause, remedy), from the one table in the code."""
    tree = ast.parse((root / "mergelab/core/finding_codes.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "CODES":
            assert isinstance(node.value, ast.Dict)
            return {
                ast.literal_eval(k): tuple(map(ast.literal_eval, v.args))
                for k, v in zip(node.value.keys, node.value.values, strict=True)
                if k is not None
            }
    raise LookupError("mergelab/core/finding_codes.py has no CODES")


def may_pass(root: Path = ROOT) -> set[str]:
    """The codes that `allow=[code]` lets pass."""
    tree = ast.parse((root / "mergelab/core/findings.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MAY_PASS":
            return set(ast.literal_eval(node.value))
    raise LookupError("mergelab/core/findings.py has no MAY_PASS")


def findings(root: Path = ROOT) -> str:
    """Every code with its cause and remedy."""
    allowed = may_pass(root)
    rows = [[f"`{code}`", cause, remedy, f"`allow=[{code}]`" if code in allowed else ""]
            for code, (cause, remedy) in sorted(finding_codes(root).items())]  # fmt: skip
    return _table(["code", "cause", "remedy", "may pass"], rows)


def python(root: Path = ROOT) -> str:
    """The functions of `import mergelab`, with signatures and docstrings."""
    parts = []
    for node in _functions(root):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        signature = _wrapped(f"mergelab.{node.name}({ast.unparse(node.args)}){returns}")
        doc = _docstring(ast.get_docstring(node) or "")
        parts.append(f"## {node.name}\n\n{_fence(signature, 'python')}\n\n{doc}")
    return "\n\n".join(parts)


def _functions(root: Path) -> list[ast.FunctionDef]:
    """The public functions of `mergelab.api`, those that it re-exports from mergelab's modules included."""
    found: dict[str, ast.FunctionDef] = {}
    body = ast.parse((root / "mergelab/api.py").read_text(encoding="utf-8")).body
    for node in body:
        if (
            isinstance(node, ast.ImportFrom)
            and (file := root / f"{(node.module or '').replace('.', '/')}.py").exists()
        ):
            names = {alias.name for alias in node.names}
            more = ast.parse(file.read_text(encoding="utf-8")).body
            found |= {x.name: x for x in more if isinstance(x, ast.FunctionDef) and x.name in names}
    found |= {x.name: x for x in body if isinstance(x, ast.FunctionDef)}
    public = next(ast.literal_eval(x.value) for x in body
                  if isinstance(x, ast.Assign) and ast.unparse(x.targets[0]) == "__all__")  # fmt: skip
    return [found[name] for name in public]


def _wrapped(signature: str) -> str:
    if len(signature) <= 90:
        return signature
    depth, out, start = 0, [], signature.index("(") + 1
    out.append(signature[:start])
    current = ""
    for i, c in enumerate(signature[start:], start):
        depth += c in "([{"
        depth -= c in ")]}"
        if depth < 0:
            out += [f"    {current.strip()},", signature[i:]]
            break
        if c == "," and depth == 0:
            out.append(f"    {current.strip()},")
            current = ""
        else:
            current += c
    return "\n".join(out)


def _docstring(text: str) -> str:
    """A Google-style docstring as Markdown: its sections become lists."""
    out: list[str] = []
    inside = False
    for line in text.splitlines():
        if found := re.fullmatch(r"(Args|Returns|Raises|Yields):", line):
            out += ["", f"**{found[1]}**", ""]
            inside = True
        elif inside and (found := re.match(r"    (\S[^:]*): (.*)", line)):
            out.append(f"- `{found[1]}`: {found[2]}")
        elif inside and line.startswith("    "):
            out.append(f"{'' if out[-1] == '' else '    '}{line.strip()}")
        else:
            inside = inside and not line
            out.append(line)
    return "\n".join(out)


PARTS: dict[str, Callable[[], str]] = {
    "config": config,
    "methods": methods,
    "groups": groups,
    "jobs": jobs,
    "findings": findings,
    "python": python,
}


def filled(markdown: str) -> str:
    """A page with each `<!-- generated: NAME -->` in it replaced.

    Raises:
        KeyError: for a name that there is no generator for.
    """
    return re.sub(r"<!-- generated: (\w+) -->", lambda found: PARTS[found[1]](), markdown)


def included(markdown: str, root: Path = ROOT) -> str:
    """A page with each `<!-- include: FILE -->` replaced by that file of the repository, its links to pages
    in docs/ made relative to docs/."""
    return re.sub(
        r"<!-- include: (\S+) -->",
        lambda found: (root / found[1]).read_text(encoding="utf-8").replace("](docs/", "]("),
        markdown,
    )
