"""The files beside the weights: config.json, the tokenizer, its chat template, generation_config.json.

They stay the config_source's own, word for word, but for what the merge has changed. transformers would
rewrite config.json in the words of the version installed here, and older software then misses
rope_theta; mergekit drops generation_config.json when it builds a tokenizer.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergelab.core.run_dir import read_json, write_json, write_text
from mergelab.models import checkpoint, remote_code

MORE_TEMPLATES = "additional_chat_templates"
"""The folder in which transformers keeps all chat templates but the first."""


def write_config(
    config_source: Path, out: Path, changes: Mapping[str, Any], ids: Mapping[int, int | None]
) -> None:
    """The config_source's config.json in its own words, but for what the merge changed; the dtype becomes
    that of the weights in `out`. The code that it names, where the model is loaded by code of its own,
    is copied as well.

    Args:
        config_source: the folder of the model that lends it.
        out: the folder that gets it, and has the weights.
        changes: by key, `text_config.num_hidden_layers` for a nested one.
        ids: tokens that have moved, see `special_ids`.
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
    """The Python files without which nobody could load the result. They are not run."""
    for name in remote_code.code(config_source):
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(config_source / name, out / name)


def copy_tokenizer(config_source: Path, out: Path, template: str | None) -> None:
    """The config_source's tokenizer files as they are, with another chat template where one is given."""
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
    """The config_source's generation_config.json, its token ids translated."""
    path = config_source / "generation_config.json"
    if not path.exists():
        return
    changed = translated(read_json(path), ids)
    if changed:
        write_json(out / path.name, read_json(path) | changed)
    else:
        shutil.copyfile(path, out / path.name)


def translated(config: Mapping[str, Any], ids: Mapping[int, int | None]) -> dict[str, Any]:
    """The keys such as eos_token_id whose value changes, with the new value.

    Args:
        config: a config.json or generation_config.json.
        ids: from an old id to the new one, None for a token that is no more; ids that are not
            in it stay. A list loses the tokens that are no more.
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
    """Where the special tokens of the config_source's configuration are in a tokenizer built anew.

    A merge onto another model's tokenizer moves them, and a model that watches for the wrong
    end-of-text never stops. Empty where every one of them kept its id.
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
