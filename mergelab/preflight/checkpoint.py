"""What can be known of a model folder without reading a weight.

config.json, the headers of the safetensors files, the tokenizer's files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mergelab.preflight.findings import Finding, error, warning

BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "U16": 2,
    "U32": 4,
    "U64": 8,
    "BOOL": 1,
}
"""Bytes of one element, by safetensors' names of dtypes."""

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""safetensors' names of the dtypes that can be merged, as torch calls them."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class Header:
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
        return self.numel * BYTES.get(self.dtype, 1)


@dataclass(frozen=True)
class Tokenizer:
    """The part of a tokenizer that decides which id means what."""

    vocab: Mapping[str, int]
    digest: str
    """sha256 of the vocabulary, the merges and everything else that makes ids of text."""
    chat_template: str | None


@dataclass(frozen=True)
class Facts:
    """A model folder, read without its weights."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Header] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    has_tokenizer: bool = False
    findings: tuple[Finding, ...] = ()

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
        return DTYPES.get(max(share, key=share.__getitem__)) if share else None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(t.numel for t in self.tensors.values())


def read(folder: Path, place: str) -> Facts:
    """Read a model folder; what is wrong with it becomes findings, never an exception.

    Args:
        folder: a local folder.
        place: how findings call this model, such as `experts.math`.
    """
    config, findings = _config(folder, place)
    tensors, more = _headers(folder, place)
    findings += more
    tokenizer, has, more = _tokenizer(folder, place)
    return Facts(folder, config, tensors, tokenizer, has, tuple(findings + more))


def _json(path: Path, place: str) -> tuple[Any, list[Finding]]:
    try:
        return json.loads(path.read_text(encoding="utf-8")), []
    except (OSError, UnicodeDecodeError) as e:
        return None, [error("unreadable", place, f"cannot read {path}: {_reason(e)}")]
    except json.JSONDecodeError as e:
        return None, [
            error("corrupt", place, f"{path} is not JSON (line {e.lineno}: {e.msg})", "Fetch it again.")
        ]


def _reason(e: Exception) -> str:
    return e.strerror or str(e) if isinstance(e, OSError) else str(e)


def _config(folder: Path, place: str) -> tuple[dict[str, Any], list[Finding]]:
    path = folder / "config.json"
    if not path.exists():
        return {}, [error("no-config", place, f"{folder} has no config.json, so it is no model folder")]
    config, findings = _json(path, place)
    if findings:
        return {}, findings
    if not isinstance(config, dict) or len(config.get("architectures") or []) != 1:
        return {}, [
            error("corrupt", place, f"{path} does not name exactly one architecture in `architectures`")
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


def _headers(folder: Path, place: str) -> tuple[dict[str, Header], list[Finding]]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        listed, findings = _json(index, place)
        weight_map = listed.get("weight_map") if isinstance(listed, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            return {}, findings or [error("corrupt", place, f"{index} has no weight_map")]
    elif single.exists():
        weight_map, findings = None, []
    elif any(folder.glob("pytorch_model*.bin*")):
        return {}, [
            error(
                "pickled",
                place,
                f"{folder} holds only pickled weights (pytorch_model*.bin), which can run code",
                "Convert them: load with transformers and save_pretrained.",
            )
        ]
    else:
        return {}, [error("no-weights", place, f"{folder} has no model.safetensors and no index of shards")]

    tensors: dict[str, Header] = {}
    for shard in sorted(set(weight_map.values())) if weight_map else [single.name]:
        found, more = _shard(folder / str(shard), place)
        findings += more
        if weight_map:
            promised = {k for k, v in weight_map.items() if v == shard}
            if not more and (missing := sorted(promised - set(found))):
                findings.append(
                    error(
                        "missing-tensor",
                        place,
                        f"{folder / str(shard)} lacks {_some(missing)}, which the index places there",
                        "Fetch the checkpoint again.",
                    )
                )
            found = {k: v for k, v in found.items() if k in promised}
        tensors |= found
    if weight_map and single.exists():
        findings.append(
            warning(
                "stale-weights",
                place,
                f"{folder} has both an index of shards and a model.safetensors; the index is used",
                "Remove what does not belong to this model.",
            )
        )
    odd = sorted({t.dtype for t in tensors.values()} - set(DTYPES) - {"I64", "BOOL"})
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


def _shard(path: Path, place: str) -> tuple[dict[str, Header], list[Finding]]:
    if not path.exists():
        return {}, [
            error("missing-file", place, f"{path} is not there, but the index names it", "Fetch it again.")
        ]
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as f:
            names = list(f.keys())
            slices = {n: f.get_slice(n) for n in names}
            return {n: Header(s.get_dtype(), tuple(s.get_shape()), str(path)) for n, s in slices.items()}, []
    except SafetensorError as e:
        return {}, [
            error(
                "corrupt",
                place,
                f"{path} is damaged or was cut short ({e}); it has {path.stat().st_size:,} bytes",
                "Fetch it again.",
            )
        ]
    except OSError as e:
        return {}, [error("unreadable", place, f"cannot read {path}: {_reason(e)}")]


def _tokenizer(folder: Path, place: str) -> tuple[Tokenizer | None, bool, list[Finding]]:
    """The tokenizer, whether there is one at all, and what is wrong with it."""
    fast, slow = folder / "tokenizer.json", folder / "tokenizer.model"
    template, findings = _chat_template(folder, place)
    if fast.exists():
        content, more = _json(fast, place)
        findings += more
        if not isinstance(content, dict):
            return None, True, findings
        model = content.get("model") or {}
        raw = model.get("vocab") or {}
        vocab = dict(raw) if isinstance(raw, dict) else {t[0]: i for i, t in enumerate(raw)}
        vocab |= {t["content"]: t["id"] for t in content.get("added_tokens") or []}
        text = json.dumps(
            [
                sorted(vocab.items()),
                model.get("merges"),
                content.get("normalizer"),
                content.get("pre_tokenizer"),
            ],
            ensure_ascii=False,
        )
        return Tokenizer(vocab, hashlib.sha256(text.encode()).hexdigest(), template), True, findings
    if slow.exists():
        try:
            digest = hashlib.sha256(slow.read_bytes()).hexdigest()
        except OSError as e:
            return None, True, [*findings, error("unreadable", place, f"cannot read {slow}: {_reason(e)}")]
        return Tokenizer({}, digest, template), True, findings
    return None, (folder / "vocab.json").exists(), findings


def _chat_template(folder: Path, place: str) -> tuple[str | None, list[Finding]]:
    jinja, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if jinja.exists():
        try:
            return jinja.read_text(encoding="utf-8"), []
        except (OSError, UnicodeDecodeError) as e:
            return None, [error("unreadable", place, f"cannot read {jinja}: {_reason(e)}")]
    if not config.exists():
        return None, []
    content, findings = _json(config, place)
    template = content.get("chat_template") if isinstance(content, dict) else None
    return (template if isinstance(template, str) else None), findings


def _some(names: list[str], limit: int = 3) -> str:
    """`a, b, c and 9 more`."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
