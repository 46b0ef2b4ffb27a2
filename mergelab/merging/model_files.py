"""The files beside the weights: config.json, generation_config.json, and whatever else the model consists of.

They are copied from the config source unchanged, except for what the merge changed. transformers would
rewrite config.json in the format of the installed version, in which older software does not find
rope_theta. mergekit copies files by a list of names, and drops generation_config.json when it builds a
tokenizer.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergelab.core.model_folder import CONFIGS, TEMPLATES, companions_of
from mergelab.core.run_dir import read_json, write_text
from mergelab.models import checkpoint, quantization, remote_code, tokenizers
from mergelab.models.json_files import write_as_read

IDS = ("_token_id", "_token_index")
"""How the keys of token ids end."""

TEXT = "text_config"
"""The key of the language model's part, whose ids are of the same tokenizer."""

TEMPLATE_KEYS = (
    "tokenizer_config.json",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
)
"""Files that may have a chat template as a value: where older software, and processors, look."""


def write_config(
    config_source: Path, out: Path, changes: Mapping[str, Any], ids: Mapping[int, int | None]
) -> None:
    """Copy the config source's config.json with the changes that the merge made.

    The dtype becomes that of the weights in `out`. If the model is loaded by code of its own, that code
    is copied, too.

    Args:
        config_source: The folder of the model whose config is used.
        out: The folder of the merged weights.
        changes: New values by key, such as `text_config.num_hidden_layers` for a nested one.
        ids: Tokens whose id changed, see `special_ids`.
    """
    shutil.copyfile(config_source / "config.json", out / "config.json")
    dtype = checkpoint.weights(out).dtype
    config = quantization.without(read_json(config_source / "config.json"))
    config |= translated(config, ids)
    for key, value in changes.items():
        *path, last = key.split(".")
        part = config
        for name in path:
            part = part.setdefault(name, {})
        part[last] = value
    if dtype:
        parts = [config, *(v for v in config.values() if isinstance(v, dict))]
        named = [(part, key) for part in parts for key in ("dtype", "torch_dtype") if key in part]
        for part, key in named or [(config, "torch_dtype")]:
            part[key] = dtype
    config.pop("_name_or_path", None)
    write_as_read(out / "config.json", config)
    _copy_code(config_source, out)


def _copy_code(config_source: Path, out: Path) -> None:
    """Copy the Python files that are needed to load the model. They are not run."""
    for name in remote_code.code(config_source):
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(config_source / name, out / name)


def copy_companions(config_source: Path, out: Path, template: str | None, *, built: bool = False) -> None:
    """Copy the files that belong to the config source besides its weights and its code.

    Args:
        config_source: The folder of the model whose config is used.
        out: The folder of the merged model.
        template: A chat template to set instead of its own; None keeps its own.
        built: Whether the merge builds a tokenizer, which writes its own files and must not find others.
    """
    for name in companions_of(config_source):
        replaced = template is not None and name.startswith(TEMPLATES)
        if replaced or (built and tokenizers.FILES.fullmatch(name)):
            continue
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(config_source / name, out / name)
    if template is None:
        return
    if not built:
        write_text(out / "chat_template.jinja", template)
    for name in TEMPLATE_KEYS:
        content = read_json(out / name) if (out / name).exists() else {}
        if "chat_template" in content:
            write_as_read(out / name, content | {"chat_template": template})


def copy_generation_config(config_source: Path, out: Path, ids: Mapping[int, int | None]) -> None:
    """Copy the config source's generation_config.json with translated token ids."""
    path = config_source / "generation_config.json"
    if not path.exists():
        return
    changed = translated(read_json(path), ids)
    if changed:
        write_as_read(out / path.name, read_json(path) | changed)
    else:
        shutil.copyfile(path, out / path.name)


def translated(config: Mapping[str, Any], ids: Mapping[int, int | None]) -> dict[str, Any]:
    """The keys such as eos_token_id whose value changes, with their new values.

    Args:
        config: A config.json or generation_config.json.
        ids: The new id by old id, or None for a removed token. Other ids stay. Removed tokens are left
            out of lists.
    """
    out: dict[str, Any] = {}
    for key, value in config.items():
        if key == TEXT and isinstance(value, Mapping):
            new: Any = {**value, **translated(value, ids)}
        elif not key.endswith(IDS) or value is None:
            continue
        elif isinstance(value, list):
            new = [n for n in (ids.get(i, i) for i in value) if n is not None] or None
        else:
            new = ids.get(value, value)
        if new != value:
            out[key] = new
    return out


def _ids(config: Mapping[str, Any]) -> set[int]:
    """The ids of tokens in a config.json or generation_config.json."""
    found: set[int] = set()
    for key, value in config.items():
        if key == TEXT and isinstance(value, Mapping):
            found |= _ids(value)
        elif key.endswith(IDS):
            found |= {i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)}
    return found


def special_ids(config_source: Path, built: Any, *, trust_remote_code: bool = False) -> dict[int, int | None]:
    """The ids of the config source's special tokens in a newly built tokenizer.

    A merge onto another model's tokenizer changes them, and a model with the wrong end-of-text id never
    stops generating.

    Returns:
        The new id, or None for a removed token, by old id; only where they differ.
    """
    from transformers import AutoTokenizer

    files = [config_source / n for n in CONFIGS]
    used = {i for f in files if f.exists() for i in _ids(read_json(f))}
    old = AutoTokenizer.from_pretrained(config_source, trust_remote_code=trust_remote_code)
    vocab = built.get_vocab()
    named = {i: old.convert_ids_to_tokens(i) for i in used if 0 <= i < len(old)}
    return {i: vocab.get(token) for i, token in named.items() if vocab.get(token) != i}
