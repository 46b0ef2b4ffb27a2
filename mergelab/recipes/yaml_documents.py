"""The text of a YAML file as mergekit reads it, with what the reading itself hides. Pure.

PyYAML takes the last of two equal keys without a word, and a key that only holds an anchor looks like any
other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

MERGE = "<<"
"""The key by which YAML merges another mapping into its own."""


@dataclass(frozen=True)
class Document:
    """One document of a file."""

    content: Any
    held: frozenset[str] = frozenset()
    """Keys of the top whose value is used again elsewhere by an alias."""
    twice: tuple[tuple[Any, ...], ...] = ()
    """Paths of keys that a mapping has twice; the last one counts."""


def parse(text: str) -> list[Document]:
    """The documents of a file; an empty one counts as one without content.

    Raises:
        yaml.YAMLError: It is not YAML.
    """
    text = text.removeprefix("\ufeff")
    contents = list(yaml.safe_load_all(text)) or [None]
    nodes: list[Any] = list(yaml.compose_all(text, Loader=yaml.SafeLoader)) or [None]
    return [
        Document(content, frozenset(_held(node)), tuple(_twice(node, (), set())))
        for content, node in zip(contents, nodes, strict=True)
        if content is not None or len(contents) == 1
    ]


def _children(node: Any) -> list[Any]:
    if isinstance(node, yaml.MappingNode):
        return [v for _, v in node.value]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _held(root: Any) -> Iterator[str]:
    """An alias is the very node that it names, so that node has more than one parent."""
    parents: Counter[int] = Counter()
    seen: set[int] = set()

    def count(node: Any) -> None:
        if id(node) in seen:
            return
        seen.add(id(node))
        for child in _children(node):
            parents[id(child)] += 1
            count(child)

    def shared(node: Any, within: frozenset[int]) -> bool:
        if id(node) in within:
            return False
        return parents[id(node)] > 1 or any(shared(c, within | {id(node)}) for c in _children(node))

    count(root)
    if isinstance(root, yaml.MappingNode):
        for key, value in root.value:
            if shared(value, frozenset()):
                yield str(key.value)


def _twice(node: Any, path: tuple[Any, ...], within: set[int]) -> Iterator[tuple[Any, ...]]:
    if id(node) in within:
        return
    within.add(id(node))
    if isinstance(node, yaml.MappingNode):
        names = [str(k.value) for k, _ in node.value]
        yield from ((*path, n) for n, times in Counter(names).items() if times > 1 and n != MERGE)
        for key, value in node.value:
            yield from _twice(value, (*path, str(key.value)), within)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield from _twice(value, (*path, i), within)
