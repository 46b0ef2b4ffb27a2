"""Python code that comes with a model: which files, and whether they may run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mergelab.core.findings import Finding, error, note, some
from mergelab.core.run_dir import read_memo

GENERATE = "custom_generate/generate.py"
"""What transformers runs in the place of its own `generate`, where it runs code of a model at all."""

OF = " of "


def code(folder: Path) -> list[str]:
    """The Python files that transformers has to run to load a model or its tokenizer, relative to its folder;
    `FILE of OWNER/NAME` for one in another repository of the hub. Empty where its own code does.

    They are looked for by name, and by what they import from beside them. None of them is run.
    """
    named = [*_of_model(folder), *_of_tokenizer(folder)]
    if not named:
        return []
    found = dict.fromkeys(named)
    for name in named:
        if (folder / name).is_file():
            found |= dict.fromkeys(_imported(folder, name))
    if (folder / GENERATE).is_file():
        found[GENERATE] = None
    return list(found)


def _of_model(folder: Path) -> Iterator[str]:
    """What config.json names, unless transformers knows the type of model: then it does not look there."""
    config = read_memo(folder / "config.json")
    places = config.get("auto_map")
    if not isinstance(places, dict):
        return
    from transformers import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        yield from _files(list(places.values()))


def _of_tokenizer(folder: Path) -> Iterator[str]:
    """What tokenizer_config.json names, unless transformers has a tokenizer of that class."""
    config = read_memo(folder / "tokenizer_config.json")
    places = config.get("auto_map")
    if isinstance(places, dict):
        places = places.get("AutoTokenizer")
    if not places:
        return
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    kind = str(config.get("tokenizer_class") or "")
    if not any(tokenizer_class_from_name(n) for n in (kind, kind.removesuffix("Fast"), f"{kind}Fast") if n):
        yield from _files(places)


def _files(references: Any) -> Iterator[str]:
    """The files of `module.Class`, or `owner/name--module.Class`, or a list of these and null."""
    for reference in references if isinstance(references, list) else [references]:
        if isinstance(reference, list):
            yield from _files(reference)
        elif isinstance(reference, str):
            repository, _, own = reference.rpartition("--")
            file = f"{own.partition('.')[0]}.py"
            yield f"{file}{OF}{repository}" if repository else file


def _imported(folder: Path, name: str) -> Iterator[str]:
    """What a file imports from beside it, and what that imports. A missing one is named all the same."""
    from transformers.dynamic_module_utils import get_relative_imports

    todo, seen = [name], {name}
    while todo:
        file = folder / todo.pop()
        for module in get_relative_imports(file) if file.is_file() else []:
            found = f"{module}.py"
            if found not in seen:
                seen.add(found)
                todo.append(found)
                yield found


def refusal(folder: Path, files: list[str]) -> str:
    """Why a model is not loaded."""
    return (
        f"{folder} is loaded by Python code that comes with it ({some(files)}), and such code can do "
        "whatever you can do"
    )


def check(folder: Path, place: str, *, allowed: bool, commit: str | None = None) -> Iterator[Finding]:
    """Whether the code of a model may run, and is there.

    Args:
        place: the key that names the model.
        allowed: `model.trust_remote_code`.
        commit: of the hub, where the folder is a snapshot of one.
    """
    files = code(folder)
    if not files:
        return
    if not allowed:
        pin = f", and pin what you have read: {place}.revision={commit}" if commit else ""
        remedy = f"Read it. If you trust it, set model.trust_remote_code=true{pin}"
        yield error("remote-code", place, refusal(folder, files), remedy)
        return
    if abroad := [f for f in files if OF in f]:
        message = f"its code is in another repository ({some(abroad)}), of which no revision can be named"
        remedy = (
            f"Copy these files into {folder}, and take the repository's name and `--` out of `auto_map` "
            "in its JSON files."
        )
        yield error("remote-code", place, message, remedy)
    elif gone := [f for f in files if not (folder / f).is_file()]:
        message = f"{folder} lacks {some(gone)}, which its configuration names as its code"
        yield error("missing-file", place, message, "Copy or fetch it again.")
    else:
        yield note("remote-code", place, f"runs Python code that comes with it: {some(files)}")


def check_needed(folders: Iterable[Path]) -> Iterator[Finding]:
    """Whether any of the models that a run loads has code that could be allowed to run."""
    if not any(code(folder) for folder in folders):
        message = "it has no effect, for transformers has code of its own for all of these models"
        yield error("no-effect", "model.trust_remote_code", message, "Leave it out.")
