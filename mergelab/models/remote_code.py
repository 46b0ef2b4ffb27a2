"""Python code that comes with a model: which files it has, and whether they may run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mergelab.core.findings import Finding, error, first_few, note
from mergelab.core.run_dir import read_memo

GENERATE = "custom_generate/generate.py"
"""What transformers runs instead of its own `generate` if it runs a model's code at all."""

OF = " of "
"""Separates a file from the repository that it is in."""


def code(folder: Path) -> list[str]:
    """The Python files that transformers has to run to load a model or its tokenizer.

    They are found by the names in the configuration and by their relative imports. No code is run.

    Returns:
        Paths relative to the folder, or `FILE of OWNER/NAME` for a file in another repository of the hub.
        Empty if transformers has code of its own for the model.
    """
    named = [*_of_model(folder), *of_tokenizer(folder)]
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
    """What config.json names, unless transformers knows the model type: it then ignores these entries."""
    config = read_memo(folder / "config.json")
    entries = config.get("auto_map")
    if not isinstance(entries, dict):
        return
    from transformers import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        yield from _files(list(entries.values()))


def of_tokenizer(folder: Path) -> list[str]:
    """What tokenizer_config.json names, unless transformers has a tokenizer of that class."""
    config = read_memo(folder / "tokenizer_config.json")
    entries = config.get("auto_map")
    if isinstance(entries, dict):
        entries = entries.get("AutoTokenizer")
    if not entries:
        return []
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    kind = str(config.get("tokenizer_class") or "")
    known = (tokenizer_class_from_name(n) for n in (kind, kind.removesuffix("Fast"), f"{kind}Fast") if n)
    return [] if any(known) else list(_files(entries))


def _files(references: Any) -> Iterator[str]:
    """The files of `module.Class`, of `owner/name--module.Class`, or of a list of these and null."""
    for reference in references if isinstance(references, list) else [references]:
        if isinstance(reference, list):
            yield from _files(reference)
        elif isinstance(reference, str):
            repository, _, own = reference.rpartition("--")
            file = f"{own.partition('.')[0]}.py"
            yield f"{file}{OF}{repository}" if repository else file


def _imported(folder: Path, name: str) -> Iterator[str]:
    """What a file imports from its own folder, directly and indirectly, including files that are missing."""
    from transformers.dynamic_module_utils import get_relative_imports

    pending, seen = [name], {name}
    while pending:
        file = folder / pending.pop()
        for module in get_relative_imports(file) if file.is_file() else []:
            found = f"{module}.py"
            if found not in seen:
                seen.add(found)
                pending.append(found)
                yield found


def refusal(folder: Path, files: list[str]) -> str:
    """The message for a model that is not loaded because of its code."""
    return (
        f"{folder} is loaded by Python code that comes with it ({first_few(files)}), and such code can do "
        "everything that you can do"
    )


def check(folder: Path, key: str, *, allowed: bool, commit: str | None = None) -> Iterator[Finding]:
    """Check that the code of a model may run and that its files exist.

    Args:
        folder: The model.
        key: The key that names the model.
        allowed: The value of `model.trust_remote_code`.
        commit: The hub's commit, if the folder is a snapshot of one.
    """
    files = code(folder)
    if not files:
        return
    if not allowed:
        pin = f", and pin what you have read: {key}.revision={commit}" if commit else ""
        remedy = f"Read it. If you trust it, set model.trust_remote_code=true{pin}"
        yield error("remote-code", key, refusal(folder, files), remedy)
        return
    if abroad := [f for f in files if OF in f]:
        message = f"its code is in another repository ({first_few(abroad)}), whose revision cannot be pinned"
        remedy = (
            f"Copy these files into {folder}, and remove the repository's name and `--` from `auto_map` "
            "in its JSON files."
        )
        yield error("remote-code", key, message, remedy)
    elif gone := [f for f in files if not (folder / f).is_file()]:
        message = f"{folder} lacks {first_few(gone)}, although its configuration names them as its code"
        yield error("missing-file", key, message, "Copy or fetch it again.")
    else:
        yield note("remote-code", key, f"runs Python code that comes with it: {first_few(files)}")


def check_needed(folders: Iterable[Path]) -> Iterator[Finding]:
    """Check that at least one of the models has code that `model.trust_remote_code` allows to run."""
    if not any(code(folder) for folder in folders):
        message = "it has no effect because transformers has code of its own for all of these models"
        yield error("no-effect", "model.trust_remote_code", message, "Leave it out.")
