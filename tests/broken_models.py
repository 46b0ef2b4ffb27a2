"""A base and two experts, sound at first, for a test to break."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


class Models:
    """Copies of three small models in `folder`: base, math and physics."""

    def __init__(self, folder: Path, sound: Path, make: Callable[..., Path]):
        self.folder = folder
        self.make = make
        shutil.copytree(sound, folder)

    def __getitem__(self, name: str) -> Path:
        return self.folder / name

    def arguments(self, *more: str, method: str = "ties") -> list[str]:
        """A merge of the two experts."""
        return [
            f"model.base.path={self['base']}", "experts=math_physics", f"experts.math.path={self['math']}",
            f"experts.physics.path={self['physics']}", f"method={method}", "eval=none", *more,
        ]  # fmt: skip

    def config(self, name: str, **changes: Any) -> None:
        """Change config.json; None takes a key out."""
        file = self[name] / "config.json"
        content = json.loads(file.read_text(encoding="utf-8")) | changes
        file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), encoding="utf-8")

    def text(self, name: str, file: str, content: str) -> None:
        """Write a file of a model."""
        (self[name] / file).write_text(content, encoding="utf-8")

    def remove(self, name: str, pattern: str) -> None:
        """Delete files of a model."""
        files = list(self[name].glob(pattern))
        assert files, pattern
        for file in files:
            file.unlink()

    def folder_instead(self, name: str, file: str) -> None:
        """Put a folder where a file was."""
        self.remove(name, file)
        (self[name] / file).mkdir()

    def again(self, name: str, architecture: str = "qwen2", **settings: Any) -> None:
        """Another model in the place of one."""
        shutil.rmtree(self[name])
        self.make(self[name], architecture, **settings)

    def tensors(self, name: str, change: Callable[[dict[str, Any]], object]) -> None:
        """Rewrite model.safetensors after `change` has been at its tensors."""
        from safetensors.torch import load_file, save_file

        file = self[name] / "model.safetensors"
        content = load_file(file)
        change(content)
        save_file(content, file, metadata={"format": "pt"})

    def add_tensor(self, name: str, tensor: str, like: str) -> None:
        """One more tensor, a copy of another."""
        self.tensors(name, lambda t: t.update({tensor: t[like].clone()}))

    def swap_two_ids(self, name: str) -> None:
        """A tokenizer of the same size, in which two tokens have changed places."""
        text = (self[name] / "tokenizer.json").read_text(encoding="utf-8")
        swapped = text.replace('"a":', '"§":').replace('"b":', '"a":').replace('"§":', '"b":')
        assert swapped != text
        self.text(name, "tokenizer.json", swapped)

    def shard(self, name: str) -> None:
        """Split model.safetensors in two, with an index."""
        from safetensors.torch import load_file, save_file

        file = self[name] / "model.safetensors"
        content = load_file(file)
        names = sorted(content)
        index = {}
        for i, part in enumerate((names[::2], names[1::2]), start=1):
            shard = f"model-0000{i}-of-00002.safetensors"
            save_file({n: content[n] for n in part}, self[name] / shard, metadata={"format": "pt"})
            index |= dict.fromkeys(part, shard)
        file.unlink()
        self.text(name, "model.safetensors.index.json", json.dumps({"weight_map": index}))

    def index(self, name: str, **changes: str) -> None:
        """Change where an index says that tensors are."""
        file = self[name] / "model.safetensors.index.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        content["weight_map"] |= changes
        file.write_text(json.dumps(content), encoding="utf-8")

    def recipe(self, changes: dict[str, Any] | None = None, *, without: str = "") -> list[str]:
        """A sound mergekit YAML but for the changes, and the arguments that run it."""
        content: dict[str, Any] = {
            "merge_method": "ties",
            "base_model": str(self["base"]),
            "models": [self.model(n, density=0.5) for n in ("math", "physics")],
            "dtype": "float32",
        }  # fmt: skip
        content |= changes or {}
        content.pop(without, None)
        return self.yaml(yaml.safe_dump(content))

    def model(self, name: str, **parameters: Any) -> dict[str, Any]:
        """A model's entry in a mergekit YAML."""
        return {"model": str(self[name]), "parameters": {"weight": 1.0, **parameters}}

    def slice(self, of_base: Any = (0, 3), of_math: Any = (0, 3), **more: Any) -> dict[str, Any]:
        """A slice of a mergekit YAML, with the layer ranges of the two models that meet in it."""
        ranges = {"base": list(of_base), "math": list(of_math)}
        return {"sources": [{"model": str(self[n]), "layer_range": r} for n, r in ranges.items()], **more}

    def slices(self, *ranges: tuple[Any, Any]) -> list[str]:
        """A mergekit YAML of slices, one a pair of layer ranges, and the arguments that run it."""
        parts = {"merge_method": "slerp", "slices": [self.slice(*pair) for pair in ranges]}
        return self.recipe({**parts, "parameters": {"t": 0.5}}, without="models")

    def yaml(self, text: str) -> list[str]:
        """A file for method=mergekit, and the arguments that run it."""
        file = self.folder / "my.yaml"
        file.write_text(text, encoding="utf-8")
        return ["method=mergekit", f"method.path={file}", "eval=none"]
