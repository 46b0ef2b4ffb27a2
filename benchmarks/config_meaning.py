"""Is every setting that changes what a model computes told? All causal models of transformers, key by key.

    python -m benchmarks.config_meaning [FAMILY ...]

A small model of each family; then one setting after the other of its config.json is changed. Where the same
weights still fit and the logits change, the comparison has to name a difference; where they stay, an error is
a false alarm. Prints a row for each that is not as it should be, and the sums. The whole takes some minutes.
"""

from __future__ import annotations

import copy
import itertools
import json
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from mergelab.models import compatibility
from mergelab.models.checkpoint import ModelMetadata

SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
"""By general names: a family's own words are found by its attribute map."""

SMALLER: dict[str, Any] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    "top_k_experts": 2,
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    "expert_ffn_hidden_size": 24,
    **dict.fromkeys(("ffn_dim", "n_inner", "ffn_hidden_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "linear_num_key_heads", "index_n_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "global_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "v_head_dim", "state_size", "mamba_d_state", "index_topk"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "attention_chunk_size"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "time_step_rank", "mamba_n_heads"), 4),
    "rotary_dim": 4,
    "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "mamba_d_head": 16, "word_embed_proj_dim": 32,
    "sliding_window": 6, "num_global_key_value_heads": 2, "vocab_size_per_layer_input": 96,
}  # fmt: skip
"""Other settings that are lowered where a family has them."""

SCALED: dict[str, dict[str, Any]] = {
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "dynamic": {"factor": 4.0},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}  # fmt: skip
VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    *(("llama", t, {"rope_parameters": {"rope_type": t, "rope_theta": 1e4, **r}}) for t, r in SCALED.items()),
    ("llama", "dynamic and short", {"max_position_embeddings": 16, "rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0,
    }}),
    ("phi3", "longrope", {"original_max_position_embeddings": 16, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.5] * 4,
    }}),
    ("qwen2", "sliding", {
        "use_sliding_window": True, "max_window_layers": 2,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    }),
    ("mistral", "full", {"sliding_window": None}),
]  # fmt: skip
"""Families once more, with other settings: (family, what, settings)."""

FAMILIES: dict[str, dict[str, Any]] = {
    **{f: {"head_dim": 4} for f in ("axk1", "deepseek_v3", "longcat_flash", "youtu")},
    **{f: {"head_dim": None} for f in ("falcon", "gemma4_text", "gemma4_unified_text")},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 6},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "zaya": {"num_experts_per_tok": 1},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlnet": {"max_position_embeddings": None},
    "xmod": {"default_language": "en_XX"},
    "prophetnet": {"num_hidden_layers": None, "num_decoder_layers": 2, "num_encoder_layers": 2},
    "zamba2": {"layer_types": None, "layers_block_type": ["mamba", "hybrid"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    **{f: {"head_dim": 4, "num_key_value_heads": 4} for f in ("axk2", "deepseek_v32", "glm_moe_dsa")},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "laurel_rank": 8,
    },
}  # fmt: skip
"""What a family needs to be built so small; None leaves a setting at its default."""

STRINGS = (
    "gelu", "relu", "silu", "gelu_pytorch_tanh", "sigmoid", "softmax", "full_attention", "sliding_attention",
)  # fmt: skip
TOKENS = 24
MOVED = 1e-5


@dataclass
class Sums:
    families: int = 0
    unbuilt: list[str] = field(default_factory=list)
    settings: int = 0
    changed: int = 0
    told: int = 0
    silent: list[str] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)


def main() -> None:
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_num_threads(1)
    chosen = sys.argv[1:] or list(NAMES)
    sums, began = Sums(), time.monotonic()
    variants: list[tuple[str, str, dict[str, Any]]] = [(f, "", {}) for f in chosen]
    variants += [v for v in VARIANTS if v[0] in chosen]
    for family, what, settings in variants:
        look(family, what, settings, sums)
    print(f"not built: {'; '.join(sums.unbuilt)}")
    print(
        f"{sums.families} families, {sums.settings} settings changed, logits changed by {sums.changed}, "
        f"of which {sums.told} told and {len(sums.silent)} silent; false alarms {len(sums.alarms)} of "
        f"{sums.settings - sums.changed}; {time.monotonic() - began:.0f} s"
    )


def look(family: str, what: str, settings: dict[str, Any], sums: Sums) -> None:
    """Every setting of one family."""
    label = f"{family} {what}".strip()
    try:
        model = build(small(family, settings))
        base = json.loads(model.config.to_json_string(use_diff=False))
        weights = model.state_dict()
        logits = computed(base, weights)
        if logits is None:
            raise ValueError("no finite logits")
    except Exception as e:
        sums.unbuilt.append(f"{label} ({type(e).__name__}: {str(e).splitlines()[0][:60] if str(e) else ''})")
        return
    sums.families += 1
    for path, tries in itertools.groupby(changes(base), key=lambda c: c[0]):
        look_at(base, weights, logits, f"{label}: {'.'.join(map(str, path))}", list(tries), sums)
    print(f"{label}: done, {sums.settings} settings so far", flush=True)


def look_at(base: dict[str, Any], weights: Any, logits: Any, name: str, tries: list[Any], sums: Sums) -> None:
    """One setting: other values for it, until the logits have changed twice."""
    silent, moved, alarm, fitted = "", 0, "", False
    for path, value, changed in tries:
        other = put(base, path, changed)
        got = outputs(other, weights)
        if got is None:
            continue  # other shapes, or nothing that runs
        fitted = True
        found = told(base, other)
        text = f"{name} {value!r} -> {changed!r}"[:150]
        if (by := difference(logits, got)) > MOVED:
            moved += 1
            silent = silent if found else f"{text}, logits by {by:.2g}"
        elif found:
            alarm = f"{text} {sorted(found)}"
        if moved == 2:
            break
    sums.settings += fitted
    sums.changed += moved > 0
    sums.told += moved > 0 and not silent
    if silent:
        sums.silent.append(silent)
        print(f"SILENT {silent}", flush=True)
    elif alarm and not moved:
        sums.alarms.append(alarm)
        print(f"alarm  {alarm}", flush=True)


def small(family: str, settings: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    default = AutoConfig.for_model(family)
    try:
        text = default.get_text_config()
    except ValueError:  # several
        text = default.decoder
    own = text.attribute_map
    lowered = {own.get(k, k): v for k, v in SMALL.items() if own.get(k, k) in vars(text)}
    lowered |= {k: v for k, v in SMALLER.items() if own.get(k, k) in vars(text)}
    if "layer_types" in vars(text):
        types = list(dict.fromkeys(text.layer_types or []))
        if types:
            lowered["layer_types"] = [types[i % len(types)] for i in range(4)]
    lowered |= FAMILIES.get(family, {}) | settings
    lowered = {k: v for k, v in lowered.items() if v is not None or k in settings}
    if text is default:
        return AutoConfig.for_model(family, **lowered)
    key = next(k for k, v in vars(default).items() if v is text)
    return AutoConfig.for_model(family, **{key: {**text.to_dict(), **lowered}})


def build(config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters())
    if count > 5_000_000:
        raise ValueError(f"{count:,} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def outputs(config: dict[str, Any], weights: dict[str, Any]) -> Any:
    """The logits of the weights under a config.json; None where they do not fit or nothing comes out."""
    try:
        return computed(config, weights)
    except Exception:
        return None


def computed(config: dict[str, Any], weights: dict[str, Any]) -> Any:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

    ids = torch.randint(3, 90, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with redirect_stderr(StringIO()):
        plain = PreTrainedConfig._decode_special_floats(copy.deepcopy(config))
        read = CONFIG_MAPPING[config["model_type"]].from_dict(plain)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(read, dtype=torch.float32).eval()
        shapes = {n: t.shape for n, t in model.state_dict().items()}
        if shapes != {n: t.shape for n, t in weights.items()}:
            return None
        buffers = {n for n, _ in model.named_buffers()}
        model.load_state_dict({n: t for n, t in weights.items() if n not in buffers}, strict=False)
        with torch.no_grad():
            found = model(input_ids=ids, use_cache=False).logits
    return found if torch.isfinite(found).all() else None


def difference(a: Any, b: Any) -> float:
    return float((a - b).abs().max()) if a.shape == b.shape else float("inf")


def told(base: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """The codes of the errors that name a difference."""
    before, after = (
        ModelMetadata(
            Path("x"), {"architectures": ["A"], **{k: v for k, v in c.items() if k != "architectures"}}
        )
        for c in (base, other)
    )
    found = compatibility.compare(before, after, "experts.a", possessive="the base's", fitted=False)
    return {f.code for f in found if f.severity == "error"}


def changes(config: dict[str, Any], at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    """Paths with their values and another value for each."""
    skip = {
        "transformers_version",
        "model_type",
        "architectures",
        "id2label",
        "label2id",
        "dtype",
        "num_hidden_layers",
    }
    for key, value in config.items():
        if key in skip or (key == "output_attentions"):
            continue
        if isinstance(value, dict):
            yield from changes(value, (*at, key))
            continue
        for other in others(key, value):
            yield (*at, key), value, other


def others(key: str, value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [v for v in (value + 1, value * 2, value // 2, value - 1) if v != value and v >= 0]
    if isinstance(value, float):
        return [value * 2 if value else 0.5, 1.0 if value != 1.0 else 0.5]
    if isinstance(value, str):
        return [s for s in STRINGS if s != value]
    if value is None:
        return [3, 0.5, True, "gelu"]
    if isinstance(value, list) and value:
        first = [
            [o, *value[1:]]
            for o in itertools.islice(others(key, value[0]), 8)
            if not isinstance(value[0], (list, dict))
        ]
        flipped = [value[::-1]] if value[::-1] != value else []
        return flipped + first
    return []


def put(config: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    out = copy.deepcopy(config)
    inner = out
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return out


if __name__ == "__main__":
    main()
