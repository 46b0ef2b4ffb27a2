"""Models with an adapter put on, as folders that mergekit reads in place of `base+adapter`.

mergekit puts adapters on by itself, but late: it cannot infer an architecture from a model with an adapter,
it adds what an adapter does to a tied head to the embedding as well, and it rounds the sum to the base's
dtype before it merges. So this is done first, module by module. A folder made here holds only the tensors
that change; its index names the base's own files for all others.

Where an adapter changes a head and not the embedding that it shares its weight with, or the other way
round, the two part. Every other model of the merge then gets its embedding as a head of its own.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergelab.core.run_dir import read_json, write_json
from mergelab.merging.put_adapter_on import AdaptedModel, untied
from mergelab.models.json_files import write_as_read
from mergelab.recipes import recipe as recipes

INDEX = "model.safetensors.index.json"
WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx)(\.index\.json)?|config\.json")
"""The files that a folder made here does not take over."""

Progress = Callable[[str, int, int], None]
"""(what, done, total)"""


@dataclass(frozen=True)
class Prepared:
    """A recipe of plain folders."""

    recipe: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    """What has to change in the output's config.json, by key."""


@contextlib.contextmanager
def plain(
    recipe: Mapping[str, Any],
    folder: Path,
    *,
    shard: int,
    trust_remote_code: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Iterator[Prepared]:
    """Put the adapters of a recipe on.

    Args:
        recipe: mergekit's YAML as a dict. Every model is a local folder, maybe with `+ADAPTER`.
        folder: Where the changed models go.
        shard: The most bytes of a file.
        trust_remote_code: Whether code that comes with the models may run.
        progress: Called with the number of models.

    Yields:
        The recipe with a folder in place of each model that was changed.

    Raises:
        StepError: An adapter cannot be put on.
    """
    names = recipes.models(recipe)
    if not any("+" in name for name in names):
        yield Prepared(dict(recipe))
        return
    with _without_signs(folder) as place:
        # A recipe that names no dtype writes each tensor in the dtype that is read.
        wide = bool(recipe.get("dtype") or recipe.get("out_dtype"))
        swap: dict[str, str] = {}
        heads: dict[str, str] = {}
        for i, name in enumerate(names):
            progress("put adapters on", i, len(names))
            base, plus, adapter = name.partition("+")
            if plus:
                swap[name] = str(place / str(i))
                heads |= put_on(
                    Path(base), Path(adapter), place / str(i),
                    wide=wide, shard=shard, trust_remote_code=trust_remote_code,
                )  # fmt: skip
        config = {}
        if heads:
            before = read_json(Path(names[0].partition("+")[0]) / "config.json")
            config = {k: v for k, v in untied(before).items() if before.get(k) != v}
            for i, name in enumerate(names):
                lent = place / f"{i}-untied"
                if lend_heads(Path(swap.get(name, name)), lent, heads, shard=shard):
                    swap[name] = str(lent)
        yield Prepared(recipes.renamed(recipe, swap), config)


@contextlib.contextmanager
def _without_signs(folder: Path) -> Iterator[Path]:
    """The folder by a path without the signs that mergekit reads as adapter and revision."""
    folder.mkdir(parents=True, exist_ok=True)
    if not re.search(r"[+@]", str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        link = Path(temporary) / "adapters"
        link.symlink_to(folder.resolve(), target_is_directory=True)
        yield link


def put_on(
    base: Path, adapter: Path, out: Path, *, wide: bool, shard: int, trust_remote_code: bool = False
) -> dict[str, str]:
    """Write a model with an adapter put on.

    Args:
        base: The folder of the model.
        adapter: The folder of the adapter.
        out: The folder to make.
        wide: Whether tensors that change stay in float32, in which they are computed.
        shard: The most bytes of a file.
        trust_remote_code: Whether code that comes with the model may run.

    Returns:
        The embedding by each head that no longer shares its weight, as files name them. Empty where the two
        are one as before, or never were.

    Raises:
        StepError: peft cannot put it on, or the result cannot be written as one model.
    """
    there, writer = _index(base), _Writer(out, shard)
    model = AdaptedModel(base, adapter, trust_remote_code=trust_remote_code)
    names = model.names()
    if names is not None and names <= there.keys():
        for name, tensor in model.changed(wide=wide):
            writer.add(name, tensor)
        copies = model.copies()
        writer.flush()
        writer.index = {n: f for n, f in there.items() if n not in copies} | writer.index
    else:  # the names in the files do not say which tensors of the model they become
        for name, tensor in model.everything(wide=wide):
            writer.add(name, tensor)
    config = read_json(base / "config.json")
    writer.close(base, untied(config) if model.heads else config)
    return model.heads


def lend_heads(model: Path, out: Path, heads: Mapping[str, str], *, shard: int) -> bool:
    """Write a model with copies of its embedding for the heads that it lacks.

    Args:
        model: The folder of the model.
        out: The folder to make.
        heads: The embedding by head, as files name them.
        shard: The most bytes of a file.

    Returns:
        Whether it lacked one; else nothing is written.
    """
    from mergekit.io import LazyTensorLoader

    there = _index(model)
    lacking = {h: e for h, e in heads.items() if h not in there and e in there}
    if not lacking:
        return False
    writer, loader = _Writer(out, shard), LazyTensorLoader.from_disk(str(model))
    for head, embedding in lacking.items():
        writer.add(head, loader.get_tensor(embedding))
    writer.flush()
    writer.index = there | writer.index
    writer.close(model, untied(read_json(model / "config.json")))
    return True


def _index(folder: Path) -> dict[str, str]:
    """The file of each tensor of a model."""
    from mergekit.io import ShardedTensorIndex

    found = ShardedTensorIndex.from_disk(str(folder)).tensor_paths
    return {name: str(folder.resolve() / file) for name, file in found.items()}


class _Writer:
    """Writes tensors into shards, and then an index, which may name files elsewhere."""

    def __init__(self, out: Path, shard: int) -> None:
        out.mkdir(parents=True)
        self.out, self.shard = out, shard
        self.index: dict[str, str] = {}
        """The file of each tensor."""
        self._waiting: dict[str, Any] = {}
        self._files = 0

    def add(self, name: str, tensor: Any) -> None:
        """Write a tensor, maybe with the next ones."""
        size = sum(t.nbytes for t in self._waiting.values())
        if self._waiting and size + tensor.nbytes > self.shard:
            self.flush()
        self._waiting[name] = tensor.contiguous()

    def flush(self) -> None:
        """Write the tensors that wait."""
        if not self._waiting:
            return
        from safetensors.torch import save_file

        file = self.out / f"adapted-{self._files:05}.safetensors"
        self._files += 1
        save_file(self._waiting, file, metadata={"format": "pt"})
        self.index |= dict.fromkeys(self._waiting, file.name)
        self._waiting = {}

    def close(self, model: Path, config: Mapping[str, Any]) -> None:
        """Write what is left, the index and config.json, and links to the model's other files."""
        self.flush()
        write_json(self.out / INDEX, {"metadata": {}, "weight_map": self.index})
        write_as_read(self.out / "config.json", config)
        for file in model.resolve().iterdir():
            if not WEIGHTS.fullmatch(file.name):
                (self.out / file.name).symlink_to(file)
