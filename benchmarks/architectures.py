"""Which architectures merge, and with which numbers: all causal models of transformers that build small.

    python -m benchmarks.architectures [FAMILY ...] [--markdown FILE]

Of each family a base and two fine-tunes are written as transformers saves them, which is the layout of the
hub: as the family's defaults have it, with tied or untied embeddings where the defaults have the other, and
with the optional biases and norms switched. They are merged by `linear`, `dare_ties` (density 1, so that
nothing is drawn) and `passthrough`; what was written is loaded by transformers and every tensor is compared
with the same arithmetic in plain torch. Prints a row for each, and what is refused with its reason.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from benchmarks.config_meaning import build, small
from benchmarks.printing import console, say, table
from mergelab.core.model_class import model_class
from mergelab.core.run_dir import read_json

NOISE = 0.02
"""Standard deviation of what a fine-tune adds to each weight of the base."""
CLOSE = 1e-5
SWITCHES = ("bias", "norm")
"""Parts of the names of booleans that switch optional tensors on and off."""
WEIGHTS = (0.75, 0.5)

States = list[dict[str, Any]]


@dataclass
class Row:
    """What one variant of a family came to, by method."""

    family: str
    variant: str
    kind: str = ""
    engine: str = ""
    came: dict[str, str] = field(default_factory=dict)
    reason: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()

    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_num_threads(1)
    rows, unbuilt = [], {}
    for family in options.families or sorted(NAMES):
        try:
            configs = list(variants(family))
        except Exception as e:
            unbuilt[family] = f"{type(e).__name__}: {str(e).splitlines()[0][:80] if str(e) else ''}"
            say(f"{family}: not built, {unbuilt[family]}")
            continue
        for name, config in configs:
            with tempfile.TemporaryDirectory() as work:
                row = tried(family, name, config, Path(work))
            rows.append(row)
            say(f"{family} {name}: {row.kind} {row.engine} {row.came} {row.reason}")
    show(rows, unbuilt)
    if options.markdown:
        options.markdown.write_text(markdown(rows, unbuilt), encoding="utf-8")
    sys.exit(any("WRONG" in c for r in rows for c in r.came.values()))


def variants(family: str) -> Iterator[tuple[str, Any]]:
    """A small config with the family's defaults, and others with optional tensors switched."""
    plain = small(family, {})
    build(plain)
    yield "", plain
    text = plain.get_text_config()
    switched = {"other ties": {"tie_word_embeddings": not getattr(text, "tie_word_embeddings", False)}}
    flags = {k: not v for k, v in vars(text).items() if isinstance(v, bool) and any(s in k for s in SWITCHES)}
    if flags:
        switched["other biases and norms"] = flags
    for name, settings in switched.items():
        try:
            config = small(family, settings)
            build(config)
        except Exception:  # not every combination exists
            continue
        yield name, config


def tried(family: str, variant: str, config: Any, work: Path) -> Row:
    """Write three models of a config, merge them by each method, and compare."""
    import mergelab
    from mergelab import InputError, StepError

    row = Row(family, variant)
    folders = [work / n for n in ("base", "one", "other")]
    try:
        with redirect_stderr(StringIO()):
            row.kind = written(config, folders)
        states = [loaded(f) for f in folders]
    except Exception as e:
        row.reason = f"transformers cannot save and load it: {type(e).__name__}: {str(e)[:80]}"
        return row
    for method, expected in METHODS.items():
        out = work / method
        try:
            with redirect_stderr(StringIO()):
                place = work / f"run-{method}"
                mergelab.merge(recipe(method, folders), out, folder=place, console=False)
            row.engine = str(read_json(place / "plan.json")["engine"]["name"])
            row.came[method] = compared(loaded(out), expected(states))
        except InputError as e:
            row.came[method], row.reason = "refused", told(e, work)
        except StepError as e:
            row.came[method], row.reason = "failed", told(e, work)
        shutil.rmtree(out, ignore_errors=True)
    return row


def told(e: Exception, work: Path) -> str:
    """The start of a message, without the folder that is gone by then."""
    return " ".join(str(e).replace(f"{work}/", "").split())[:200]


def written(config: Any, folders: list[Path]) -> str:
    """Save a base and its fine-tunes; the class's name."""
    import torch

    model = build(config)
    model.save_pretrained(folders[0])
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    for seed, folder in enumerate(folders[1:]):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(start[n] + torch.randn(p.shape, generator=generator) * NOISE)
        model.save_pretrained(folder)
    return type(model).__name__


def loaded(folder: Path) -> dict[str, Any]:
    """The weights as transformers loads them, whatever the file's layout."""
    import torch
    from transformers import AutoConfig

    with redirect_stderr(StringIO()):
        kind = model_class(AutoConfig.from_pretrained(folder))
        model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(f"missing {info['missing_keys']}, unexpected {info['unexpected_keys']}")
    return {n: t.detach() for n, t in model.state_dict().items() if t.is_floating_point()}


def recipe(method: str, folders: list[Path]) -> dict[str, Any]:
    base, one, other = map(str, folders)
    if method == "passthrough":
        return {"merge_method": method, "models": [{"model": one}], "dtype": "float32"}
    models = [
        {"model": m, "parameters": {"weight": w, **({"density": 1.0} if method == "dare_ties" else {})}}
        for m, w in zip((one, other), WEIGHTS, strict=True)
    ]
    made: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "float32"}
    return made | ({"base_model": base, "parameters": {"normalize": False}} if method == "dare_ties" else {})


def mean(states: States) -> dict[str, Any]:
    a, b = WEIGHTS
    return {n: (a * states[1][n] + b * states[2][n]) / (a + b) for n in states[0]}


def elected(states: States) -> dict[str, Any]:
    """TIES' sign election over weighted task vectors (Yadav et al. 2023, arXiv:2306.01708).

    NaN where the sum is so small that rounding decides its sign.
    """
    out = {}
    for n, base in states[0].items():
        deltas = [w * (s[n] - base) for w, s in zip(WEIGHTS, states[1:], strict=True)]
        total = sum(deltas)
        made = base + sum(d * (d.sign() == total.sign()) for d in deltas)
        out[n] = made.masked_fill(total.abs() < CLOSE * 0.1, float("nan"))
    return out


METHODS: Mapping[str, Callable[[States], dict[str, Any]]] = {
    "linear": mean, "dare_ties": elected, "passthrough": lambda states: states[1],
}  # fmt: skip


def compared(got: dict[str, Any], wanted: dict[str, Any]) -> str:
    if got.keys() != wanted.keys():
        return f"WRONG: {sorted(got.keys() ^ wanted.keys())[:2]}"
    off = {n: float((t - wanted[n]).abs().nan_to_num(0.0).max()) for n, t in got.items() if t.numel()}
    worst = max(off, key=off.__getitem__)
    return "equal" if off[worst] <= CLOSE else f"WRONG: {worst} by {off[worst]:.2g}"


def cells(row: Row) -> list[str]:
    return [f"{row.family} {row.variant}".strip(), row.kind, *(row.came.get(m, "-") for m in METHODS)]


def show(rows: list[Row], unbuilt: Mapping[str, str]) -> None:
    made = table("family", "class", *METHODS)
    for row in rows:
        made.add_row(*cells(row))
    console(140).print(made)
    for row in rows:
        if row.reason:
            say(f"{row.family} {row.variant}: {row.reason}")
    sums = Counter(c.partition(":")[0] for r in rows for c in r.came.values())
    families = len({r.family for r in rows})
    say(f"{families} families, {len(rows)} variants: {dict(sums)}; not built {len(unbuilt)}")


def markdown(rows: list[Row], unbuilt: Mapping[str, str]) -> str:
    """The table of the documentation: a line for each family, with what is not equal in a variant."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(row.family, []).append(row)
    heads = ["model type", "class", "variants", *METHODS]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    notes = []
    for family, own in families.items():
        cell = [
            " / ".join(dict.fromkeys(r.came.get(m, "not saved").partition(":")[0] for r in own))
            for m in METHODS
        ]
        lines.append(f"| {family} | {own[0].kind} | {len(own)} | {' | '.join(cell)} |")
        notes += [f"- {family}{', ' + r.variant if r.variant else ''}: {r.reason}" for r in own if r.reason]
    built = f"Not built so small: {', '.join(sorted(unbuilt)) or 'none'}."
    return "\n".join([*lines, "", *notes, "", built, ""])


if __name__ == "__main__":
    main()
