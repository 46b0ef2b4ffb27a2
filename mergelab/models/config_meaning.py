"""What a config.json means: what transformers makes of it, in one form for all families and versions.

The same model can be described in other words: transformers 4 wrote `rope_theta` where 5 writes
`rope_parameters`, defaults are left out, and GPT-2 says `n_head` for heads. transformers' own class of
configuration knows all of that, so it is asked, and only what the model's code reads is kept.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mergelab.core.errors import summary
from mergelab.core.library_output import silence_libraries
from mergelab.core.remembered import remembered

HARMLESS = re.compile(
    r"""_.*                                              # of transformers' own
    | architectures | auto_map | name_or_path | transformers(_js)?_version | model_name | tokenizer_class
    | unsloth_.*
    | (torch_)?dtype | torchscript | use_bfloat16 | quantization(_config)? | pretraining_tp
    | use_cache | cache_implementation | gradient_checkpointing | (use_)?return_dict
    | output_(hidden_states|attentions|router_logits|scores|past)
    | (attn|experts)_implementation | chunk_size_feed_forward | mamba_chunk_size
    | num_logits_to_keep | num_nextn_predict_layers
    | .*(dropout|drop_rate|drop_path|pdrop|layerdrop|initializer|init_std).*     # in training alone
    | .*((aux|z|router|balance)_loss|loss_(coef|weight)).*
    | id2label | label2id | num_labels | problem_type | finetuning_task | task_specific_params
    | vocab_size | (bos|eos|sep|cls|unk|decoder_start|forced_[be]os)_token_id
    """,
    re.VERBOSE,
)
"""Keys without effect on what a model computes, or which are compared elsewhere: vocabularies, labels."""

COMMON = ("llama", "qwen2", "qwen3")
LEFT_OUT = {"attention_bias": False, "mlp_bias": False, "use_mrope": False, "rope_scaling": None}
"""Defaults of the common families that some versions write and others do not."""
SCALED_BY_LENGTH = ("dynamic", "longrope", "su")
"""Types of ropes to which it matters how long texts may be."""
COUNTS_FROM_PADDING = re.compile(r"\+ (self\.)?padding_idx")
"""In the code of families whose positions depend on the id of the padding token."""
ALWAYS = ("model_type", "tie_word_embeddings", "per_layer_config")
"""Keys that transformers itself reads for every model."""
SHARED = (
    "cache_utils", "masking_utils", "modeling_attn_mask_utils", "modeling_layers", "modeling_rope_utils",
)  # fmt: skip
"""transformers' modules that read the config for the models' code."""
ROPE_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "partial_rotary_factor": 1}
SYNONYMS = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}
"""Names of activations under which transformers has the same function."""
_ACCESS = re.compile(r"""\.(\w+)|["'](\w+)["']""")
_DEFAULT = re.compile(r"""getattr\([\w.]*config, ["'](\w+)["'], (True|False|None|-?\d[\d.e-]*)\)""")


@dataclass(frozen=True)
class Meaning:
    """The settings of a model that have an effect."""

    values: dict[str, Any]
    """By path, such as `vision_config.hidden_act`, in the family's own words. Null values are left out."""
    names: dict[str, str]
    """The general name of a setting, by path, where it differs: `num_attention_heads` for `n_head`."""
    text: dict[str, Any]
    """The settings of the language model by their general names."""
    refused: str = ""
    """Why transformers cannot read it."""

    def name(self, path: str) -> str:
        """The general name of the setting at a path."""
        return "rope_parameters" if "rope_parameters" in path else self.names.get(path, path.split(".")[-1])

    @property
    def rope(self) -> dict[str, Any]:
        """The rotary embedding of the language model."""
        rope = self.text.get("rope_parameters")
        return dict(rope) if isinstance(rope, Mapping) else {}


def of(config: Mapping[str, Any]) -> Meaning:
    """The meaning of a config.json. Asks transformers once; its answer is kept in the cache folder."""

    def answer() -> dict[str, Any]:
        return _asked(config)

    return Meaning(**remembered("config", plain(config), answer))


def same(a: Any, b: Any) -> bool:
    """Whether two values of a setting mean the same."""
    a, b = (SYNONYMS.get(v, v) if isinstance(v, str) else v for v in (a, b))
    return bool(a == b)


def stated(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says itself about what has an effect, by path.

    For the most common families without what is said by one version and left out by another, so that their
    fine-tunes are compared without transformers, whose import takes seconds.
    """
    rotary = any("rope" in key or "rotary" in key for key in config)
    said = dict(_flat(plain(config), _dull(config, padding=not rotary)))
    if said.get("model_type") not in COMMON:
        return said
    empty = [k for k, default in LEFT_OUT.items() if said.get(k, default) == default]
    if said["model_type"] != "llama" and not said.get("use_sliding_window"):
        empty += ["use_sliding_window", "sliding_window", "max_window_layers"]
    if set(said.get("layer_types") or ()) == {"full_attention"}:
        empty.append("layer_types")
    if said["model_type"] != "qwen3" and said.get("head_dim") == _implied(said, {}).get("head_dim"):
        empty.append("head_dim")
    if said.get("rope_parameters.rope_type", "default") == "default" and "rope_parameters.rope_theta" in said:
        said["rope_theta"] = said.pop("rope_parameters.rope_theta")
        empty.append("rope_parameters.rope_type")
    return {k: v for k, v in said.items() if k not in empty}


def plain(value: Any) -> Any:
    """A value as JSON has it. What JSON does not know becomes text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in (sorted(value, key=str) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _dull(config: Any, *, padding: bool) -> set[str]:
    """Keys whose effect depends on others, and which have none here."""
    scaled = set() if _scaled(config) else {"max_position_embeddings"}
    return scaled if padding else {*scaled, "pad_token_id"}


def _flat(value: Mapping[str, Any], dull: Iterable[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if HARMLESS.fullmatch(key) or key in dull:
            continue
        if isinstance(inner, Mapping) and inner:
            yield from _flat(inner, dull, f"{prefix}{key}.")
        else:
            yield prefix + key, inner


def _scaled(value: Any) -> bool:
    """Whether there is a rope in it, however deep, that depends on the greatest length."""
    if not isinstance(value, Mapping):
        return False
    kinds = {str(value.get("rope_type")), str(value.get("type"))}
    if "yarn" in kinds and value.get("factor") is None:
        return True
    return not kinds.isdisjoint(SCALED_BY_LENGTH) or any(_scaled(v) for v in value.values())


def _asked(config: Mapping[str, Any]) -> dict[str, Any]:
    """`of`, by transformers."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:  # a family of the user's own, or one that came later: as it stands
        said = {path: v for path, v in stated(config).items() if v is not None}
        nested = config.get("text_config")
        text = {**config, **nested} if isinstance(nested, dict) else config
        return {"values": said, "names": {}, "text": plain(text)}
    with silence_libraries():
        try:
            read = PreTrainedConfig._decode_special_floats(copy.deepcopy({**config}))
            made = CONFIG_MAPPING[kind].from_dict(read)
        except Exception as e:  # whatever its validation raises is what there is to say of the file
            return {
                "values": {},
                "names": {},
                "text": {},
                "refused": f"transformers cannot read it: {summary(e)}",
            }
        values: dict[str, Any] = {}
        names: dict[str, str] = {}
        parts = list(_parts(made))
        codes = [_code(inspect.getfile(type(part))) for _, part in parts]
        read = {a or b for code in codes for a, b in _ACCESS.findall(code)}
        for (prefix, part), code in zip(parts, codes, strict=True):
            found, general = _settings(part, code, read)
            values |= {prefix + path: v for path, v in found.items()}
            names |= {prefix + path: name for path, name in general.items()}
        try:
            language = made.get_text_config()
        except ValueError:  # it has several, as speech models do
            language = made
        return {
            "values": values,
            "names": names,
            "text": _general(language if _is_config(language) else made),
        }


def _parts(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A configuration and those inside it, each with the prefix of its paths."""
    yield prefix, config
    for key, value in vars(config).items():
        if _is_config(value):
            yield from _parts(value, f"{prefix}{key}.")


def _is_config(value: Any) -> bool:
    return hasattr(value, "attribute_map") and hasattr(value, "to_dict")


def _settings(config: Any, code: str, read: set[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings of one configuration that its model reads, by path, and their general names.

    Args:
        config: the configuration.
        code: that of its family; empty where there is none beside the configuration.
        read: the names that this code and that of the other parts ask for.
    """
    from transformers import PreTrainedConfig

    values = {k: plain(v) for k, v in vars(config).items() if not _is_config(v)}
    values |= {k: plain(v) for k, v in _computed(config, PreTrainedConfig).items() if k not in values}
    values["model_type"] = config.model_type
    if getattr(config, "is_heterogeneous", False):
        values["per_layer_config"] = plain(config.to_dict()["per_layer_config"])
    if isinstance(ropes := values.get("rope_parameters"), dict):
        values["rope_parameters"] = _rope(ropes)
        said = {*ropes}.union(*(r for r in ropes.values() if isinstance(r, dict)))
        for key in (*(said & {"rope_theta", "partial_rotary_factor"}), "original_max_position_embeddings"):
            values.pop(key, None)  # an older word beside it, which the model's ropes do not read
    values = {**{k: _literal(v) for k, v in _DEFAULT.findall(code)}, **values}
    values |= {k: v for k, v in _implied(values, config.attribute_map).items() if values.get(k) is None}
    if set(values.get("layer_types") or ()) == {"full_attention"}:
        values.pop("sliding_window", None)
    general = {own: name for name, own in config.attribute_map.items()}
    dull = _dull(values, padding=COUNTS_FROM_PADDING.search(code) is not None)
    dull |= {own for name, own in config.attribute_map.items() if name in dull or HARMLESS.fullmatch(name)}
    matters = {
        k: v
        for k, v in values.items()
        if v is not None and (not code or k in ALWAYS or k in read or general.get(k) in read)
    }
    flat = {path: v for path, v in _flat(matters, dull) if v is not None}
    return flat, {path: general[path] for path in flat if path in general}


def _computed(config: Any, until: type) -> dict[str, Any]:
    """The properties that a family's class computes from its settings."""
    out = {}
    for cls in type(config).__mro__:
        if cls is until:
            break
        for key, attribute in vars(cls).items():
            if isinstance(attribute, property) and key not in out:
                try:
                    out[key] = getattr(config, key)
                except Exception:  # what this model cannot compute, it does not use
                    continue
    return {k: v for k, v in out.items() if isinstance(v, (bool, int, float, str, list, tuple, dict))}


def _implied(values: Mapping[str, Any], own: Mapping[str, str]) -> dict[str, Any]:
    """What follows from other settings where it is not said. `own`: the family's words for general names."""
    heads, hidden = (values.get(own.get(k, k)) for k in ("num_attention_heads", "hidden_size"))
    if not (isinstance(heads, int) and heads > 0):
        return {}
    head = {"head_dim": hidden // heads} if isinstance(hidden, int) else {}
    return {"num_key_value_heads": heads, **head}


def _rope(ropes: Mapping[str, Any]) -> dict[str, Any]:
    """Rope parameters, or those of each type of layers, without what is not said and what is the default."""
    out = {k: _rope(v) if isinstance(v, Mapping) else v for k, v in ropes.items() if v is not None}
    if "rope_type" in out:
        out.pop("type", None)
    if out.get("rope_type") == "default":
        out.pop("original_max_position_embeddings", None)
    return {k: v for k, v in out.items() if k not in ROPE_DEFAULTS or v != ROPE_DEFAULTS[k]}


@cache
def _code(configuration: str) -> str:
    """The modelling code beside a module of configurations, with what it builds on."""
    import transformers

    root = Path(transformers.__file__).parent
    own = sorted(Path(configuration).parent.glob("modeling_*.py"))
    if not own:
        return ""
    text = "\n".join(f.read_text(encoding="utf-8") for f in own)
    others = {*re.findall(r"from \.\.(\w+)\.modeling_\w+ import", text)} - {"auto"}
    files = [f for name in sorted(others) for f in sorted((root / "models" / name).glob("modeling_*.py"))]
    files += [f for name in SHARED if (f := root / f"{name}.py").exists()]
    return "\n".join([text, *(f.read_text(encoding="utf-8") for f in files)])


def _literal(text: str) -> Any:
    return {"True": True, "False": False, "None": None}[text] if text[0].isalpha() else float(text)


def _general(config: Any) -> dict[str, Any]:
    """The settings of one configuration by their general names, for a table."""
    own = {k: plain(v) for k, v in config.to_dict().items() if v is not None}
    own |= {name: own[word] for name, word in config.attribute_map.items() if word in own}
    if isinstance(ropes := own.get("rope_parameters"), dict):
        own["rope_parameters"] = _rope(ropes)
    return {**_implied(own, {}), **own}
