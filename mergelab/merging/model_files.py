"""The files beside the weights: config.json, the tokenizer, its chat template, generation_config.json.

They are copied from the config source unchanged, except for what the merge changed. transformers would
rewrite config.json in the format of the installed version, in which older software does not find
rope_theta. mergekit drops generation_config.json when it builds a tokenizer.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergelab.core.run_dir import read_json, write_json, write_text
from mergelab.models import checkpoint, remote_code

MORE_TEMPLATES = "additional_chat_templates"
"""The folder in which transformers keeps all chat templates except the default one."""


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
    dtype = checkpoint.read(out, str(out)).dtype
    config = read_json(config_source / "config.json")
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
    write_json(out / "config.json", config)
    _copy_code(config_source, out)


def _copy_code(config_source: Path, out: Path) -> None:
    """Copy the Python files that are needed to load the model. They are not run."""
    for name in remote_code.code(config_source):
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(config_source / name, out / name)


def copy_tokenizer(config_source: Path, out: Path, template: str | None) -> None:
    """Copy the config source's tokenizer files, with another chat template if one is given."""
    for name in checkpoint.TOKENIZER_FILES:
        if (config_source / name).exists():
            shutil.copyfile(config_source / name, out / name)
    if template is None:
        if (config_source / MORE_TEMPLATES).is_dir():
            shutil.copytree(
                config_source / MORE_TEMPLATES,
                out / MORE_TEMPLATES,
                copy_function=shutil.copyfile,
                dirs_exist_ok=True,
            )
        return
    write_text(out / "chat_template.jinja", template)
    for name in ("tokenizer_config.json", "chat_template.json"):  # where older software looks
        content = read_json(out / name) if (out / name).exists() else {}
        if "chat_template" in content:
            write_json(out / name, content | {"chat_template": template})


def copy_generation_config(config_source: Path, out: Path, ids: Mapping[int, int | None]) -> None:
    """Copy the config source's generation_config.json with translated token ids."""
    path = config_source / "generation_config.json"
    if not path.exists():
        return
    changed = translated(read_json(path), ids)
    if changed:
        write_json(out / path.name, read_json(path) | changed)
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
        if not key.endswith("_token_id") or value is None:
            continue
        if isinstance(value, list):
            new: Any = [n for n in (ids.get(i, i) for i in value) if n is not None] or None
        else:
            new = ids.get(value, value)
        if new != value:
            out[key] = new
    return out


def special_ids(config_source: Path, built: Any, *, trust_remote_code: bool = False) -> dict[int, int | None]:
    """The ids of the config source's special tokens in a newly built tokenizer.

    A merge onto another model's tokenizer changes them, and a model with the wrong end-of-text id never
    stops generating.

    Returns:
        The new id, or None for a removed token, by old id; only where they differ.
    """
    from transformers import AutoTokenizer

    files = [config_source / n for n in ("config.json", "generation_config.json")]
    used: set[int] = set()
    for config in (read_json(f) for f in files if f.exists()):
        for key, value in config.items():
            if key.endswith("_token_id") and value is not None:
                used |= set(value) if isinstance(value, list) else {value}
    old = AutoTokenizer.from_pretrained(config_source, trust_remote_code=trust_remote_code)
    vocab = built.get_vocab()
    named = {i: old.convert_ids_to_tokens(i) for i in used if i < len(old)}
    return {i: vocab.get(token) for i, token in named.items() if vocab.get(token) != i}
