"""Which files of a model's folder, or of a repository on the hub, belong to the model: by their names.

A model is more than its weights and config.json: a tokenizer of any kind, processors, chat templates, the
pooling of an embedding model. Only a model's class knows which of these it reads. So the rule names what does
not belong: weights, what describes or trained them, and what runs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from mergelab.core.run_dir import read_json

CONFIGS = ("config.json", "generation_config.json")
"""Files that a merge changes and therefore writes by itself."""

TEMPLATES = "additional_chat_templates/"
"""The folder in which transformers keeps all chat templates except the default one."""

MODULES = "modules.json"
"""The list of sentence-transformers' modules, each of which has a folder."""

WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".hdf5", ".keras", ".msgpack", ".ot", ".gguf",
    ".ggml", ".onnx", ".onnx_data", ".ort", ".pb", ".tflite", ".npz", ".nemo", ".distcp", ".mlmodel", ".pte",
    ".engine", ".pdparams",
)  # fmt: skip
"""Suffixes of weights in any format."""

RUNS = (
    ".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".exe", ".sh", ".bash", ".bat", ".cmd", ".ps1", ".js",
    ".jar", ".whl", ".ipynb", ".pkl", ".pickle", ".joblib", ".dill",
)  # fmt: skip
"""Suffixes of what runs, or may run when it is read. The code that a model needs is copied because its
configuration names it, see `remote_code`."""

PAGES = (
    ".md", ".rst", ".html", ".htm", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".mp4", ".log",
)  # fmt: skip
"""Suffixes of what is for people."""

LICENCE = re.compile(r"(licen[cs]e|notice|copying|use_policy)\b.*", re.IGNORECASE)
"""Files for people that go along all the same."""

OTHERS = re.compile(
    r"readme.*|.*\.index\.json|consolidated.*|params\.json|adapter_config\.json|adapter_model\..*|"
    r"(optimizer|scheduler|scaler|rng_state|training_args|trainer_state|trainer_log|training_|events\.out\.).*|"
    r"(all|train|eval|test|predict)_results\.json|latest|args\.json|llamaboard_config\.yaml|axolotl.*\.ya?ml|"
    r"(quantize_config|quant_config|hf_quant_config|quantization_config)\.json|mergekit.*\.ya?ml|"
    r"desktop\.ini|thumbs\.db",
    re.IGNORECASE,
)
"""Names of what describes other weights, or how these came to be: indices, adapters, the state of a training,
the settings of a quantization, the recipe of an earlier merge."""

FOLDERS = re.compile(
    r"original|onnx|openvino|coreml|metal|mlx|gguf|tensorrt|checkpoint-\d+|global_step\d+|runs|logs|wandb|"
    r"tensorboard|__pycache__",
    re.IGNORECASE,
)
"""Folders of the same model in other formats, or of its training."""


def companions(names: Iterable[str], modules: Iterable[str] = ()) -> list[str]:
    """The files that belong to a model besides its weights, its code and what `CONFIGS` names.

    Args:
        names: Paths relative to the folder, with `/`.
        modules: The folders of further modules, whose weights belong to the model, too.
    """
    listed, further = sorted(names), tuple(f"{m.strip('/')}/" for m in modules if m.strip("/."))
    foreign = {
        str(p.parent)
        for p in map(PurePosixPath, listed)
        if _is_weights(p.name) and str(p.parent) != "." and not str(p).startswith(further)
    }

    def belongs(name: str) -> bool:
        path = PurePosixPath(name)
        if any(part.startswith(".") for part in path.parts) or name in CONFIGS:
            return False
        above = {str(p) for p in path.parents} - {"."}
        if any(FOLDERS.fullmatch(part) for part in path.parts[:-1]) or above & foreign:
            return False
        if name.startswith(further) and path.suffix.lower() == ".safetensors":
            return True
        suffix = path.suffix.lower()
        if _is_weights(path.name) or suffix in RUNS or OTHERS.fullmatch(path.name):
            return False
        return suffix not in PAGES or LICENCE.fullmatch(path.name) is not None

    return [name for name in listed if belongs(name)]


def _is_weights(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in WEIGHTS


def companions_of(folder: Path) -> list[str]:
    """`companions` of a folder on this machine."""
    try:
        listed = read_json(folder / MODULES)
    except (OSError, ValueError):  # there is none, or it names no folders
        listed = []
    return companions(_files(folder), modules(listed))


def modules(listed: Any) -> list[str]:
    """The folders that the content of a modules.json names."""
    entries = listed if isinstance(listed, list) else []
    return [e["path"] for e in entries if isinstance(e, Mapping) and isinstance(e.get("path"), str)]


def _files(folder: Path) -> Iterator[str]:
    """The files below a folder, except in hidden folders and those that never belong to a model."""
    for above, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not (f.startswith(".") or FOLDERS.fullmatch(f))]
        here = Path(above).relative_to(folder)
        yield from ((here / f).as_posix() for f in files if (folder / here / f).is_file())
