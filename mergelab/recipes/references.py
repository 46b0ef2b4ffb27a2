"""How mergekit's YAML names a model: as text or as a mapping, with revisions and an adapter. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORM = "a path or hub id, `MODEL@REVISION+ADAPTER@REVISION`, or a mapping with `model`"
PARTS = ("model", "lora", "override_architecture")
PATH = ("path", "revision")


@dataclass(frozen=True)
class Reference:
    """A model, or a model with an adapter."""

    path: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    architecture: str | None = None
    """What `override_architecture` says that it is, whatever its config.json says."""

    @property
    def text(self) -> str:
        """As one line, as mergekit writes it."""
        main = f"{self.path}@{self.revision}" if self.revision else self.path
        extra = f"{self.adapter}@{self.adapter_revision}" if self.adapter_revision else self.adapter
        return f"{main}+{extra}" if extra else main

    @property
    def paths(self) -> str:
        """The same without revisions."""
        return f"{self.path}+{self.adapter}" if self.adapter else self.path


def parse(text: str) -> Reference:
    """Take `MODEL@REVISION+ADAPTER@REVISION` apart."""
    main, _, extra = text.partition("+")
    path, _, revision = main.partition("@")
    adapter, _, own = extra.partition("@")
    return Reference(path, revision or None, adapter or None, own or None)


def read(value: Any) -> Reference | None:
    """A reference in any form that mergekit takes; None for what is none."""
    if isinstance(value, str):
        main, plus, extra = value.partition("+")
        sound = main and bool(plus) == bool(extra) and "+" not in extra
        return parse(value) if sound and main.count("@") < 2 and extra.count("@") < 2 else None
    if not isinstance(value, Mapping) or not isinstance(value.get("override_architecture"), str | None):
        return None
    model, lora = _path(value.get("model")), _path(value.get("lora"))
    if model is None or (lora is None and value.get("lora") is not None):
        return None
    adapter, own = lora or (None, None)
    return Reference(*model, adapter, own, value.get("override_architecture"))


def _path(value: Any) -> tuple[str, str | None] | None:
    if isinstance(value, str) and value:
        path, _, revision = value.partition("@")
        return path, revision or None
    if isinstance(value, Mapping) and isinstance(value.get("path"), str) and value["path"]:
        given = value.get("revision")
        return (value["path"], given or None) if isinstance(given, str | None) else None
    return None
