"""Reading a mergekit YAML file: its keys, their types, what fits together, and what has no effect. Pure.

mergekit ignores what it does not know. Here that is said: as an error where a key looks like a misspelling
of one that would have an effect, else as a warning. What is read is the same merge in one form: models as
text, settings as mergekit writes them, nothing that has no effect.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mergelab.core.dtypes import MERGEABLE, plain_name
from mergelab.core.errors import InputError, closest, none_of
from mergelab.core.findings import Finding, error, warning
from mergelab.recipes import references
from mergelab.recipes.recipe import REST, setting
from mergelab.recipes.recipe_groups import KeyOf

TOP = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "modules",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
)
MODEL = ("model", "parameters")
SLICE = ("sources", "base_model", "parameters")
SOURCE = ("model", "layer_range", "parameters")
MODULE = ("slices", "models", "parameters")
TOKENIZER = ("source", "tokens", "pad_to_multiple_of")
TOKEN = ("source", "force")
TOKEN_SOURCE = ("kind", "model", "token", "token_id")
CONDITION = ("filter", "value")

Path = tuple[Any, ...]


def file_place(file: str) -> KeyOf:
    """Keys as they stand in a user's YAML: `my.yaml: models[0].parameters.t`."""

    def place(path: Path) -> str:
        text = ""
        for p in path:
            text += f"[{p}]" if isinstance(p, int) else f".{p}" if text else str(p)
        return f"{file}: {text}" if text else file

    return place


def read(
    content: Any, place: KeyOf, held: Iterable[str] = ()
) -> tuple[dict[str, Any], dict[str, str], list[Finding]]:
    """The recipe of a file, the architectures that models are said to have, and what is wrong.

    Args:
        content: What YAML makes of the file.
        place: From a path into the file to the key that the user knows.
        held: Keys of the top whose values are used elsewhere by an alias.
    """
    reader = Reader(place, frozenset(held))
    if not isinstance(content, dict):
        reader.wrong((), "it is not a mapping, so it is not a mergekit configuration")
        return {}, {}, reader.findings
    return reader.recipe(content), reader.architectures, reader.findings


@dataclass
class Reader:
    """What reading a file has found so far."""

    place: KeyOf
    held: frozenset[str] = frozenset()
    reads: str = "mergekit"
    """The program whose file it is."""
    findings: list[Finding] = field(default_factory=list)
    architectures: dict[str, str] = field(default_factory=dict)
    """By model, what `override_architecture` says."""
    models: dict[str, None] = field(default_factory=dict)

    def wrong(self, path: Path, message: str, code: str = "structure") -> None:
        """Note an error."""
        self.findings.append(error(code, self.place(path), message))

    def idle(self, path: Path, message: str, remedy: str = "") -> None:
        """Note that something has no effect."""
        self.findings.append(warning("no-effect", self.place(path), f"no effect: {message}", remedy))

    def known(self, node: Mapping[str, Any], names: Iterable[str], path: Path) -> dict[str, Any]:
        """What of a mapping is known; the rest is noted."""
        known = tuple(names)
        for k in node:
            if k not in known:
                self._stray(str(k), known, (*path, k))
        return {k: v for k, v in node.items() if k in known}

    def _stray(self, key: str, known: tuple[str, ...], path: Path) -> None:
        near = None if len(path) == 1 and key in self.held else closest(key, known)
        if near is None:
            held = len(path) == 1 and key in self.held
            why = "it only holds an anchor, which is used" if held else f"{self.reads} does not know this key"
            self.idle(path, why)
            return
        message = f"{self.reads} does not know this key. Did you mean '{near}'?"
        remedy = f"Known here: {', '.join(known)}. With allow=[unknown-key] it is ignored."
        self.findings.append(error("unknown-key", self.place(path), message, remedy))

    def model(self, value: Any, path: Path) -> str | None:
        """A reference to a model as text."""
        reference = references.read(value)
        if reference is None:
            self.wrong(path, f"{value!r} does not name a model; give {references.FORM}")
            return None
        if isinstance(value, dict):
            self.known(value, references.PARTS, path)
            for part in ("model", "lora"):
                if isinstance(value.get(part), dict):
                    self.known(value[part], references.PATH, (*path, part))
        if reference.architecture:
            self.architectures[reference.text] = reference.architecture
        self.models[reference.text] = None
        return reference.text

    def recipe(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The whole file."""
        if "experts" in content and not any(content.get(k) for k in ("models", "slices", "modules")):
            message = "it lists experts, so it is a mixture of experts, not a merge"
            self.findings.append(error("structure", self.place(()), message, "Set method=mergekit_moe."))
            return {}
        out = {k: v for k, v in self.known(content, TOP, ()).items() if v is not None}
        if not isinstance(out.get("merge_method"), str):
            self.wrong(("merge_method",), "it has to name a merge method")
        for k in ("chat_template", "dtype", "out_dtype"):
            if not isinstance(out.get(k), str | None):
                self.wrong((k,), f"{out[k]!r} is not text")
        for k in ("dtype", "out_dtype"):
            name = plain_name(str(out.get(k) or MERGEABLE[0]))
            if name not in MERGEABLE and isinstance(out.get(k), str | None):
                self.wrong((k,), none_of(name, MERGEABLE), "dtype")
        self._one_form(out, ("models", "slices", "modules"), ())
        if out.get("base_model") is not None:
            out["base_model"] = self.model(out["base_model"], ("base_model",))
        self._forms(out, ())
        if "modules" in out:
            out["modules"] = self._modules(out["modules"])
        self._tokenizer(out)
        return {k: v for k, v in out.items() if v not in (None, [], {}) or k == "tokenizer"}

    def _one_form(self, node: Mapping[str, Any], forms: tuple[str, ...], path: Path) -> None:
        there = [k for k in forms if node.get(k)]
        if len(there) != 1:
            has = " and ".join(there) if there else "none of them"
            self.wrong(path, f"it needs one of {', '.join(forms)}; it has {has}")

    def _forms(self, node: dict[str, Any], path: Path) -> None:
        """Models, slices and parameters of the file or of a module, in place."""
        for k, item in (("models", self._model), ("slices", self._slice)):
            if node.get(k) is None:
                continue
            if not isinstance(node[k], list):
                self.wrong((*path, k), f"it has to be a list of {k}")
                node[k] = []
            read = [item(v, (*path, k, i)) for i, v in enumerate(node[k])]
            node[k] = [v for v in read if v is not None]
        if isinstance(node.get("slices"), list):
            self._empty_slices(node["slices"], (*path, "slices"))
        node["parameters"] = self._parameters(node, path)

    def _modules(self, modules: Any) -> dict[str, Any]:
        if not isinstance(modules, dict):
            self.wrong(("modules",), "it has to map names to modules")
            return {}
        out: dict[str, Any] = {}
        for name, m in modules.items():
            path = ("modules", name)
            if not isinstance(m, dict):
                self.wrong(path, "it has to be a mapping")
                continue
            own = self.known(m, MODULE, path)
            self._one_form(own, ("models", "slices"), path)
            self._forms(own, path)
            out[name] = {k: v for k, v in own.items() if v}
        return out

    def _model(self, item: Any, path: Path) -> dict[str, Any] | None:
        if not isinstance(item, dict) or "model" not in item:
            self.wrong(path, "it has to be a mapping with `model: PATH`")
            return None
        own = self.known(item, MODEL, path)
        model, parameters = self.model(own["model"], (*path, "model")), self._parameters(own, path)
        return {"model": model} | ({"parameters": parameters} if parameters else {})

    def _slice(self, item: Any, path: Path) -> dict[str, Any] | None:
        if not isinstance(item, dict) or not isinstance(item.get("sources"), list) or not item["sources"]:
            self.wrong(path, "it has to be a mapping with a list of `sources`")
            return None
        own = self.known(item, SLICE, path)
        read = [self._source(s, (*path, "sources", j)) for j, s in enumerate(own["sources"])]
        own["sources"] = [s for s in read if s is not None]
        if own.get("base_model") is not None:
            own["base_model"] = self.model(own["base_model"], (*path, "base_model"))
        own["parameters"] = self._parameters(own, path)
        lengths = {s["layer_range"][1] - s["layer_range"][0] for s in own["sources"]}
        if len(lengths) > 1:
            message = f"its sources have {sorted(lengths)} layers; they must be equal"
            self.wrong(path, message, "layer-range")
        return {k: v for k, v in own.items() if v}

    def _source(self, source: Any, path: Path) -> dict[str, Any] | None:
        if not isinstance(source, dict) or "model" not in source:
            self.wrong(path, "it has to be a mapping with `model` and `layer_range`")
            return None
        own = self.known(source, SOURCE, path)
        model, parameters = self.model(own["model"], (*path, "model")), self._parameters(own, path)
        given, at = own.get("layer_range"), (*path, "layer_range")
        layers = [whole(x) for x in given] if isinstance(given, list) else []
        if len(layers) != 2 or None in layers:
            self.wrong(at, f"{given!r} is not [first, end]", "layer-range")
            return None
        start, end = (x or 0 for x in layers)
        if not 0 <= start <= end:
            message = f"{given} holds no layers; the end must not be below the start, which is at least 0"
            self.wrong(at, message, "layer-range")
            return None
        out = {"model": model, "layer_range": [start, end]}
        return out | ({"parameters": parameters} if parameters else {})

    def _empty_slices(self, slices: list[dict[str, Any]], path: Path) -> None:
        """A slice without layers still gives what lies before the first layer or behind the last one."""
        empty = [not any(len(range(*s["layer_range"])) for s in item.get("sources", ())) for item in slices]
        if not all(item.get("sources") for item in slices):  # what is wrong there has been said
            return
        if empty and all(empty):
            self.wrong(path, "no slice has layers", "layer-range")
            return
        for i in range(1, len(slices) - 1):
            if empty[i]:
                self.idle((*path, i), "it has no layers, and is neither the first slice nor the last")

    def _parameters(self, node: Mapping[str, Any], path: Path) -> dict[str, Any]:
        at, given = (*path, "parameters"), node.get("parameters")
        if not isinstance(given, dict | None):
            self.wrong(at, "it has to map parameters to settings")
            return {}
        out: dict[str, Any] = {}
        for name, value in (given or {}).items():
            if value == []:
                self.idle((*at, name), f"{self.reads} takes an empty list for no setting")
                continue
            try:
                out[str(name)] = setting(self._conditions(value, (*at, name)), "", numbers=False)
            except InputError as e:
                inside, _, message = str(e).partition(": ")
                self.findings.append(error("setting", self.place((*at, name)) + inside, message))
        return out

    def _conditions(self, value: Any, path: Path) -> Any:
        """A setting without what mergekit ignores in it."""
        if isinstance(value, dict) and "value" in value:
            return self.known(value, CONDITION, path)
        if not isinstance(value, list):
            return value
        out: list[Any] = []
        for i, item in enumerate(value):
            if isinstance(item, dict) and "value" in item:
                item = self.known(item, CONDITION, (*path, i))
                if item.get("filter") in (None, REST) and i < len(value) - 1:
                    self.idle((*path, i + 1), "the one before applies to every tensor")
                    return [*out, item]
            out.append(item)
        return out

    def _tokenizer(self, out: dict[str, Any]) -> None:
        """What says that a tokenizer is to be built, in place."""
        tokenizer, source = out.get("tokenizer"), out.get("tokenizer_source")
        if not isinstance(tokenizer, dict | None):
            self.wrong(("tokenizer",), "it has to be a mapping with `source`")
            del out["tokenizer"]
            return
        if tokenizer is not None and source is not None:
            self.wrong(("tokenizer",), "it stands beside tokenizer_source; keep one")
        if source is not None:
            out["tokenizer_source"] = self._token_model(source, ("tokenizer_source",), ("union", "base"))
        if tokenizer is None:
            return
        own = self.known(tokenizer, TOKENIZER, ("tokenizer",))
        own["source"] = self._token_model(
            own.get("source", "union"), ("tokenizer", "source"), ("union", "base")
        )
        tokens, multiple = own.get("tokens"), own.get("pad_to_multiple_of")
        if multiple is not None and not (whole(multiple) or 0) > 0:
            self.wrong(("tokenizer", "pad_to_multiple_of"), f"{multiple!r} is not a whole number above 0")
        if not isinstance(tokens, dict | None):
            self.wrong(("tokenizer", "tokens"), "it has to map tokens to their sources")
            tokens = {}
        if tokens:
            own["tokens"] = {t: self._token(s, ("tokenizer", "tokens", t)) for t, s in tokens.items()}
        out["tokenizer"] = {k: v for k, v in own.items() if v}

    def _token(self, spec: Any, path: Path) -> Any:
        if not isinstance(spec, dict):
            self.wrong(path, f"{spec!r} is not a mapping with `source`")
            return spec
        own, at = self.known(spec, TOKEN, path), (*path, "source")
        source = own.get("source")
        if isinstance(source, dict) and "kind" in source:
            source = self.known(source, TOKEN_SOURCE, at)
            if source["kind"] == "model_token":
                source["model"] = self._token_model(source.get("model"), (*at, "model"), ())
            elif source["kind"] != "zero":
                self.wrong((*at, "kind"), none_of(source["kind"], ("model_token", "zero")))
            own["source"] = source
        elif source is not None:
            own["source"] = self._token_model(source, at, ())
        return own

    def _token_model(self, value: Any, path: Path, words: tuple[str, ...]) -> Any:
        """A model from which tokens come, or one of some words."""
        if value in words:
            return value
        reference = references.read(value)
        text = reference.text if reference else None
        if text not in self.models and (not words or reference is None or "/" not in reference.path):
            known = (*words, *self.models)
            shown = value if isinstance(value, str) else text
            self.wrong(path, f"'{shown}' is none of {', '.join(known)}")
        return text


def whole(value: Any) -> int | None:
    """A whole number however YAML reads it, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None
