"""What can be known of a model folder without reading a weight.

config.json, the headers of the safetensors files (or what stands for them in pickled ones), the
tokenizer's files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mergelab.core.dtypes import BY_CODE, is_mergeable
from mergelab.core.findings import Finding, error, some, warning
from mergelab.models import pickles, tokenizers
from mergelab.models.json_files import load_json, reason
from mergelab.models.tokenizers import Tokenizer

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip

Reader = Callable[[Path, str, str], "tuple[dict[str, TensorInfo], list[Finding]]"]
"""Reads the headers of one file of weights; see `file_headers`."""

FETCH = "Fetch it again."
"""The remedy for a damaged file of which nobody knows where it came from."""


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


@dataclass(frozen=True)
class ModelMetadata:
    """A model folder, read without its weights."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    findings: tuple[Finding, ...] = ()

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is one, of whatever kind."""
        return self.tokenizer is not None

    @cached_property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of config.json, also where that is nested."""
        nested = self.config.get("text_config")
        return {**self.config, **nested} if isinstance(nested, dict) else self.config

    @cached_property
    def dtype(self) -> str | None:
        """The dtype that most of the elements have, in torch's words."""
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
        """Whether its weights are in Python's pickle format."""
        return any(t.file.endswith(".bin") for t in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(t.numel for t in self.tensors.values())


def read(folder: Path, place: str, fetch: str = FETCH, *, pickled: bool = False) -> ModelMetadata:
    """Read a model folder; what is wrong with it becomes findings, never an exception.

    Args:
        folder: a local folder.
        place: how findings call this model, such as `experts.math`.
        fetch: how to get sound files.
        pickled: whether pickled weights will do; else they are not even looked at.
    """
    path = folder / "config.json"
    if not path.exists():
        remedy = fetch if fetch != FETCH else "Name the folder that holds config.json and the weights."
        wrong = error("no-config", place, f"{folder} has no config.json, so it is no model folder", remedy)
        return ModelMetadata(folder, findings=(wrong,))
    config, findings = _config(path, place, fetch)
    tensors, more = _headers(folder, place, fetch, pickled)
    tokenizer, wrong_files = tokenizers.read(folder, place, fetch)
    return ModelMetadata(folder, config, tensors, tokenizer, (*findings, *more, *wrong_files))


def weights(folder: Path) -> ModelMetadata:
    """The config and the headers of a folder that `read` has found sound."""
    config, _ = _config(folder / "config.json", "", FETCH)
    tensors, _ = _headers(folder, "", FETCH, False)
    return ModelMetadata(folder, config, tensors)


def _config(path: Path, place: str, fetch: str) -> tuple[dict[str, Any], list[Finding]]:
    config, findings = load_json(path, place, fetch)
    if findings:
        return {}, findings
    names = config.get("architectures") if isinstance(config, dict) else None
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        return {}, [
            error(
                "corrupt",
                place,
                f"{path} does not name exactly one architecture in `architectures`, but {names!r}",
                fetch,
            )
        ]
    if "quantization_config" in config:
        findings.append(
            error(
                "quantized",
                place,
                f"{path} says that the weights are quantized; their numbers cannot be averaged",
                "Use the unquantized checkpoint.",
            )
        )
    return config, findings


def _headers(
    folder: Path, place: str, fetch: str, pickled: bool
) -> tuple[dict[str, TensorInfo], list[Finding]]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        tensors, findings = _indexed(index, place, fetch)
        if single.exists():
            findings.append(
                warning(
                    "stale-weights",
                    place,
                    f"{folder} has both an index of shards and a model.safetensors; the index is used",
                    "Remove what does not belong to this model.",
                )
            )
    elif single.exists():
        tensors, findings = file_headers(single, place, fetch)
    elif pickled and (folder / pickles.INDEX).exists():
        tensors, findings = _indexed(folder / pickles.INDEX, place, fetch, _pickled_headers)
    elif pickled and (folder / pickles.SINGLE).exists():
        tensors, findings = _pickled_headers(folder / pickles.SINGLE, place, fetch)
    else:
        return {}, [_no_weights(folder, place, fetch)]
    codes = {t.dtype for t in tensors.values()}
    odd = sorted(code for code in codes if not is_mergeable(code) and code not in ("I64", "BOOL"))
    if odd:
        findings.append(
            error(
                "dtype",
                place,
                f"{folder} holds tensors of dtype {', '.join(odd)}, which cannot be merged",
                "Use the unquantized checkpoint.",
            )
        )
    return tensors, findings


def _no_weights(folder: Path, place: str, fetch: str) -> Finding:
    if any(folder.glob("pytorch_model*.bin*")):
        return error(
            "pickled",
            place,
            f"{folder} holds only pickled weights (pytorch_model*.bin), which can run code",
            "Convert them: load with transformers and save_pretrained. Or pass allow=[pickled]: they are "
            "then read without running any, and refused where they hold anything but tensors.",
        )
    shards = len(list(folder.glob("*.safetensors")))
    there = f"; it has {shards} other safetensors files" if shards else ""
    return error(
        "no-weights", place, f"{folder} has no model.safetensors and no index of shards{there}", fetch
    )


def _indexed(
    index: Path, place: str, fetch: str, look: Reader | None = None
) -> tuple[dict[str, TensorInfo], list[Finding]]:
    """The tensors of the shards that an index names."""
    listed, findings = load_json(index, place, fetch)
    if findings:
        return {}, findings
    weight_map = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or {type(v) for v in weight_map.values()} != {str}:
        return {}, [error("corrupt", place, f"{index} has no weight_map from tensors to files", fetch)]
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        path = index.parent / shard
        found, wrong = (look or file_headers)(path, place, fetch)
        promised = {k for k, v in weight_map.items() if v == shard}
        missing = sorted(promised - set(found))
        if missing and not wrong:
            message = f"{path} lacks {some(missing)}, which the index places there"
            wrong = [error("missing-tensor", place, message, fetch)]
        findings += wrong
        tensors |= {k: v for k, v in found.items() if k in promised}
    return tensors, findings


def file_headers(path: Path, place: str, fetch: str) -> tuple[dict[str, TensorInfo], list[Finding]]:
    """The headers of one safetensors file, and what is wrong with it; arguments as for `read`."""
    if not path.exists():
        return {}, [error("missing-file", place, f"{path} is not there, but the index names it", fetch)]
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as f:
            slices = {n: f.get_slice(n) for n in f.keys()}  # noqa: SIM118 (it is no dict)
            return {
                n: TensorInfo(s.get_dtype(), tuple(s.get_shape()), str(path)) for n, s in slices.items()
            }, []
    except SafetensorError as e:
        size = path.stat().st_size
        message = f"{path} is damaged or was cut short ({e}); it has {size:,} bytes"
        return {}, [error("corrupt", place, message, fetch)]
    except OSError as e:
        return {}, [error("unreadable", place, f"cannot read {path}: {reason(e)}")]


def _pickled_headers(path: Path, place: str, fetch: str) -> tuple[dict[str, TensorInfo], list[Finding]]:
    """`file_headers` of a pickled file."""
    if not path.exists():
        return {}, [error("missing-file", place, f"{path} is not there, but the index names it", fetch)]
    try:
        return {n: TensorInfo(*about, str(path)) for n, about in pickles.tensors(path).items()}, []
    except pickles.PickleRefused as e:
        return {}, [error("unsafe", place, f"{path} is refused: {e}", "Use weights in safetensors.")]
    except OSError as e:
        return {}, [error("unreadable", place, f"cannot read {path}: {reason(e)}")]
