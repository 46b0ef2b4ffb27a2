"""Several merges in one YAML file, as mergekit-multi runs them: named documents that use each other. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergelab.core.findings import Finding, error
from mergelab.recipes import references

LAST = "final"
"""What the document without a name is called."""


def order(documents: Sequence[Any]) -> list[str] | None:
    """The names of the documents, each after those that it uses; None where there is no such order."""
    named = {str(d.get("name") or LAST): d for d in documents if isinstance(d, Mapping)}
    if len(named) < len(documents):
        return None
    uses = {name: {*_texts(d)} & (named.keys() - {name}) for name, d in named.items()}
    out: list[str] = []
    while len(out) < len(named):
        ready = [n for n in named if n not in out and uses[n] <= {*out}]
        if not ready:
            return None
        out.append(ready[0])
    return out


def _texts(node: Any) -> Iterator[str]:
    """Every text in a document, without revision and adapter."""
    if isinstance(node, str):
        yield references.parse(node).path
    elif isinstance(node, Mapping):
        for key, value in node.items():
            if key != "name":
                yield from _texts(value)
    elif isinstance(node, list):
        for value in node:
            yield from _texts(value)


def refusal(key: str, file: str, method: str, documents: Sequence[Any]) -> Finding:
    """That a file has several documents, and the commands that run them."""
    message = f"{file} has {len(documents)} documents, and a run does one merge"
    stages = order(documents)
    if stages is None:
        remedy = "Put each into a file of its own, and run them one by one."
        return error("documents", key, message, remedy)
    commands = [f"  python -m mergelab method={method} method.path={n}.yaml output={n}" for n in stages]
    remedy = (
        "Put each into a file of its own, and run them in this order, where a later one finds the folders "
        "of earlier ones by their names:\n" + "\n".join(commands)
    )
    return error("documents", key, message, remedy)
