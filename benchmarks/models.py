"""Random models of a real shape, for benchmarks: a base and experts near it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from mergelab.models import architecture

SHARD = 500_000_000
"""Bytes of a weight file."""


@dataclass(frozen=True)
class Shape:
    """A Qwen2; by default one of about 0.4 billion parameters."""

    hidden: int = 896
    layers: int = 24
    intermediate: int = 4864
    heads: int = 14
    kv_heads: int = 2
    vocab: int = 32000
    tied: bool = False
    dtype: str = "bfloat16"
    experts: int = 3

    def config(self) -> dict[str, object]:
        """config.json"""
        return {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": self.hidden,
            "num_hidden_layers": self.layers, "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab, "tie_word_embeddings": self.tied, "torch_dtype": self.dtype,
            "max_position_embeddings": 4096, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
        }  # fmt: skip

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        shapes = architecture.shapes(self.config())
        assert shapes is not None, "Qwen2 is known"
        return shapes

    def parameters(self) -> int:
        """Number of entries."""
        return sum(int(np.prod(s)) for s in self.tensors().values())


def make(shape: Shape, root: Path) -> list[Path]:
    """The base and the experts, as folders below `root`; what is there of this shape is used again."""
    made = root / "shape.json"
    folders = [root / name for name in ("base", *(f"expert{i}" for i in range(shape.experts)))]
    if made.exists() and json.loads(made.read_text(encoding="utf-8")) == asdict(shape):
        return folders
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True, exist_ok=True)
        _write_weights(shape, number, folder)
        (folder / "config.json").write_text(json.dumps(shape.config()), encoding="utf-8")
        _write_tokenizer(shape, folder)
    made.write_text(json.dumps(asdict(shape)), encoding="utf-8")
    return folders


def _tensors(shape: Shape, number: int) -> Iterator[tuple[str, Tensor]]:
    """Model 0 is the base; the others differ from it by small normal noise."""
    dtype = getattr(torch, shape.dtype)
    for n, (name, size) in enumerate(shape.tensors().items()):
        base = torch.from_numpy(np.random.default_rng([n, 0]).standard_normal(size, np.float32))
        base = base * 0.02 if len(size) > 1 else 1 + 0.1 * base
        base = base.to(dtype)
        if number:
            noise = torch.from_numpy(np.random.default_rng([n, number]).standard_normal(size, np.float32))
            base = (base.float() + 5e-4 * noise).to(dtype)
        yield name, base


def _write_weights(shape: Shape, number: int, folder: Path) -> None:
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}

    def flush() -> None:
        shards.append(list(held))
        save_file(held, folder / f"model-{len(shards):05d}.safetensors", metadata={"format": "pt"})
        held.clear()

    for name, tensor in _tensors(shape, number):
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > SHARD:
            flush()
        held[name] = tensor
    flush()
    files = {n: f"model-{i:05d}.safetensors" for i, names in enumerate(shards, start=1) for n in names}
    index = json.dumps({"metadata": {}, "weight_map": files})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def _write_tokenizer(shape: Shape, folder: Path) -> None:
    """A word for each id, so that the models are whole."""
    vocab = {f"w{i}": i for i in range(shape.vocab)}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}
    content = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0", "eos_token": "w1"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
