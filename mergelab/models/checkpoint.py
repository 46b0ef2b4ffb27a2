"""The metadata of a model folder, read without its weights.

These are config.json, the headers of the safetensors files (or their equivalent in pickled ones) and
the tokenizer's files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mergelab.core.dtypes import BY_CODE, is_mergeable
from mergelab.core.findings import Finding, error, first_few
from mergelab.models import pickles, quantization, tokenizers, weight_files
from mergelab.models.json_files import is_pointer, load_json, pointer, reason
from mergelab.models.tokenizers import Tokenizer

Reader = Callable[[Path, str, str], "tuple[dict[str, TensorInfo], list[Finding]]"]
"""Reads the headers of one file of weights; see `file_headers`."""

OF_MERGES = ("dtype", "quantized", "stale-weights")
"""Codes of what keeps a model's weights from being averaged, and not the model from being loaded."""

FETCH = "Fetch it again."
"""The remedy for a damaged file of unknown origin."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its file's header describes it."""

    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * (BY_CODE[self.dtype].nbytes if self.dtype in BY_CODE else 1)


@dataclass(frozen=True, eq=False)
class ModelMetadata:
    """A model folder without its weights. Two are equal only if they are the same object, so that what
    follows from one can be kept for it."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    findings: tuple[Finding, ...] = ()

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder has a tokenizer that can be loaded."""
        return self.tokenizer is not None and not self.tokenizer.problem

    @property
    def no_tokenizer(self) -> str:
        """What to say where `has_tokenizer` is false."""
        if self.tokenizer is None:
            return f"{self.folder} has no tokenizer"
        return f"{self.folder} has a tokenizer that transformers cannot load ({self.tokenizer.problem})"

    @cached_property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of config.json, which is nested in some architectures."""
        nested = self.config.get("text_config")
        return {**self.config, **nested} if isinstance(nested, dict) else self.config

    @cached_property
    def dtype(self) -> str | None:
        """torch's name of the dtype that most elements have; None if that cannot be merged."""
        share: dict[str, int] = {}
        for t in self.tensors.values():
            share[t.dtype] = share.get(t.dtype, 0) + t.numel
        code = max(share, key=share.__getitem__, default="")
        return BY_CODE[code].name if is_mergeable(code) else None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def pickled(self) -> bool:
        """Whether the weights are in Python's pickle format."""
        return any(t.file.endswith(".bin") for t in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(t.numel for t in self.tensors.values())


def read(folder: Path, key: str, fetch: str = FETCH, *, pickled: bool = False) -> ModelMetadata:
    """Read a model folder. What is wrong with it becomes findings, never an exception.

    Args:
        folder: A local folder.
        key: The model's key in the configuration, for findings, such as `experts.math`.
        fetch: The remedy for damaged files.
        pickled: Whether pickled weights are accepted. Otherwise they are not opened.
    """
    path = folder / "config.json"
    if not path.exists():
        remedy = fetch if fetch != FETCH else "Name the folder that holds config.json and the weights."
        wrong = error("no-config", key, f"{folder} has no config.json, so it is not a model folder", remedy)
        return ModelMetadata(folder, findings=(wrong,))
    config, findings = _config(path, key, fetch)
    tensors, more = _headers(folder, key, fetch, pickled)
    codes = {n: t.dtype for n, t in tensors.items()}
    more += quantization.check(config, codes, key, path)
    if not findings and not any(f.severity == "error" for f in more):
        more += weight_files.check(folder, config, key)
    tokenizer, wrong_files = tokenizers.read(folder, key, fetch)
    return ModelMetadata(folder, config, tensors, tokenizer, (*findings, *more, *wrong_files))


def weights(folder: Path) -> ModelMetadata:
    """The config and the headers of a folder in which `read` has found no error."""
    config, _ = _config(folder / "config.json", "", FETCH)
    tensors, _ = _headers(folder, "", FETCH, False)
    return ModelMetadata(folder, config, tensors)


def _config(path: Path, key: str, fetch: str) -> tuple[dict[str, Any], list[Finding]]:
    config, findings = load_json(path, key, fetch)
    if findings:
        return {}, findings
    names = config.get("architectures") if isinstance(config, dict) else None
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        return {}, [
            error(
                "corrupt",
                key,
                f"{path} does not name exactly one architecture in `architectures`, but {names!r}",
                fetch,
            )
        ]
    return config, findings


def _headers(
    folder: Path, key: str, fetch: str, pickled: bool
) -> tuple[dict[str, TensorInfo], list[Finding]]:
    file = weight_files.merged(folder, pickled=pickled)
    if file is None:
        return {}, [_no_weights(folder, key, fetch)]
    look = _pickled_headers if file.name.startswith(pickles.SINGLE) else file_headers
    if file.suffix == ".json":
        return _indexed(file, key, fetch, look)
    return look(file, key, fetch)


def _no_weights(folder: Path, key: str, fetch: str) -> Finding:
    if any(folder.glob("pytorch_model*.bin*")):
        return error(
            "pickled",
            key,
            f"{folder} holds only pickled weights (pytorch_model*.bin), which can run code",
            "Convert them: load with transformers and save_pretrained. Or pass allow=[pickled]: they are "
            "then read without running any code, and refused if they hold anything but tensors.",
        )
    shards = len(list(folder.glob("*.safetensors")))
    others = f"; it has {shards} other safetensors files" if shards else ""
    return error(
        "no-weights", key, f"{folder} has no model.safetensors and no index of shards{others}", fetch
    )


def _indexed(index: Path, key: str, fetch: str, look: Reader) -> tuple[dict[str, TensorInfo], list[Finding]]:
    """The tensors of the shards that an index names."""
    listed, findings = load_json(index, key, fetch)
    if findings:
        return {}, findings
    weight_map = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or {type(v) for v in weight_map.values()} != {str}:
        return {}, [error("corrupt", key, f"{index} has no weight_map that maps tensors to files", fetch)]
    single = index.with_name(index.name.removesuffix(".index.json"))
    # `save_pretrained` of one file leaves an older index where it is.
    gone = f"Move {index.name} elsewhere if the weights of {single.name} are meant. If not: {fetch}"
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        path = index.parent / shard
        found, wrong = look(path, key, gone if single.exists() and not path.exists() else fetch)
        promised = {k for k, v in weight_map.items() if v == shard}
        missing = sorted(promised - set(found))
        if missing and not wrong:
            message = f"{path} lacks {first_few(missing)}, although the index says that it has them"
            wrong = [error("missing-tensor", key, message, fetch)]
        findings += wrong
        tensors |= {k: v for k, v in found.items() if k in promised}
    return tensors, findings


def file_headers(path: Path, key: str, fetch: str) -> tuple[dict[str, TensorInfo], list[Finding]]:
    """The headers of one safetensors file, and what is wrong with it. Arguments as for `read`."""
    if not path.exists():
        return {}, [error("missing-file", key, f"{path} does not exist, but the index names it", fetch)]
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as f:
            slices = {n: f.get_slice(n) for n in f.keys()}  # noqa: SIM118 (not a dict)
            return {
                n: TensorInfo(s.get_dtype(), tuple(s.get_shape()), str(path)) for n, s in slices.items()
            }, []
    except SafetensorError as e:
        if is_pointer(path):
            return {}, [pointer(path, key)]
        size = path.stat().st_size
        message = f"{path} is damaged or truncated ({e}); it has {size:,} bytes"
        return {}, [error("corrupt", key, message, fetch)]
    except OSError as e:
        return {}, [error("unreadable", key, f"cannot read {path}: {reason(e)}")]


def _pickled_headers(path: Path, key: str, fetch: str) -> tuple[dict[str, TensorInfo], list[Finding]]:
    """`file_headers` of a pickled file."""
    if not path.exists():
        return {}, [error("missing-file", key, f"{path} does not exist, but the index names it", fetch)]
    try:
        return {n: TensorInfo(*about, str(path)) for n, about in pickles.tensors(path).items()}, []
    except pickles.PickleRefused as e:
        if is_pointer(path):
            return {}, [pointer(path, key)]
        return {}, [error("unsafe", key, f"{path} is refused: {e}", "Use weights in safetensors.")]
    except OSError as e:
        return {}, [error("unreadable", key, f"cannot read {path}: {reason(e)}")]
