"""Whether a model made of another one's layers computes what these compute, for all decoders of transformers.

    nice python -m benchmarks.layer_settings [MODEL_TYPE ...]

For each model type a tiny random model is built, and layers of it are taken off, stacked, exchanged and
repeated. config.json is rewritten as a merge does it, and the weights are carried over by name. The reference
is the model itself, whose modules are put into the new order; it never sees the rewritten config. `equal`
means equal logits, `refused` that the rewriting says that a setting cannot follow; anything else is `WRONG`.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import ModuleList
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS

from mergelab.core.run_dir import read_json, write_json
from mergelab.models import moved_layers

DEPTH = 6
ORDERS = {
    "first off": [1, 2, 3, 4, 5],
    "last off": [0, 1, 2, 3, 4],
    "stacked": [0, 1, 2, 3, 1, 2, 3, 4, 5],
    "exchanged": [0, 1, 3, 2, 4, 5],
    "repeated": [0, 1, 2, 2, 3, 4, 5],
}
SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": DEPTH,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "moe_intermediate_size": 24, "num_experts": 4,
    "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "shared_expert_intermediate_size": 16, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8, "sliding_window": 8, "window_size": 8, "attention_chunk_size": 8,
    "n_embd": 32, "n_layer": DEPTH, "n_head": 4, "n_positions": 128, "num_layers": DEPTH,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8,
    "mamba_n_groups": 1, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1,
    "d_model": 32, "ffn_dim": 48, "decoder_layers": DEPTH, "encoder_layers": DEPTH,
    "decoder_attention_heads": 4, "n_layers": DEPTH, "n_heads": 4, "index_n_heads": 4, "index_head_dim": 8,
    "index_topk": 8, "n_shared_experts": 1, "num_shared_experts": 1,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    **{
        k: {"head_dim": 4, "num_key_value_heads": 4}
        for k in ("axk1", "axk2", "deepseek_v3", "deepseek_v32", "longcat_flash", "youtu", "glm_moe_dsa")
    },
    "codegen": {"rotary_dim": 4}, "gptj": {"rotary_dim": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "rwkv": {"rescale_every": 0}, "xlm": {"n_layers": DEPTH},
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 96},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3, "num_dense_layers": 2},
    "gemma4_text": {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8}, "zaya": {"num_experts_per_tok": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 3, "n_mamba_heads": 8},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 3, "n_mamba_heads": 2},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 3},
    "qwen2_moe": {"mlp_only_layers": [1], "decoder_sparse_step": 2},
    "qwen3_moe": {"mlp_only_layers": [4], "decoder_sparse_step": 1},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1, 0, 1]}, "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "nemotron_h": {
        "layer_types": ["linear_attention", "moe", "full_attention", "mlp", "moe", "linear_attention"]
    },
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_layer_interval": 2},
    "llama4_text": {"interleave_moe_layer_step": 2, "no_rope_layer_interval": 4, "intermediate_size_mlp": 48},
    "jamba": {
        "attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_dt_rank": 4,
    },
    "bamba": {"attn_layer_indices": [1, 4]}, "glm4_moe": {"first_k_dense_replace": 2},
}  # fmt: skip
"""What a model type needs to be small, or to have layers that differ."""


def small(kind: str, more: dict[str, Any]) -> Any:
    """A small config of a model type."""
    default = transformers.CONFIG_MAPPING[kind]()
    if default.get_text_config(decoder=True) is not default:
        raise ValueError("it is one part of several")
    have, alias = default.to_dict(), default.attribute_map
    values = {k: v for k, v in SMALL.items() if k in have or k in alias}
    values = {k: v for k, v in values.items() if not (k in alias and alias[k] in values)}
    config = transformers.AutoConfig.for_model(kind, **values | MORE.get(kind, {}) | more)
    config.is_decoder = True
    return config


def donor(config: Any) -> Any:
    """A random model whose layers all differ."""
    kind = transformers.AutoModelForCausalLM
    with torch.device("meta"), no_init_weights():
        if sum(p.numel() for p in kind.from_config(copy.deepcopy(config)).parameters()) > 2e7:
            raise ValueError("it is large")
    torch.manual_seed(0)
    model = kind.from_config(copy.deepcopy(config)).eval()
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=noise) * 0.1)
        for name, b in model.named_buffers():
            if "e_score" in name:
                b.add_(torch.randn(b.shape, generator=noise) * 0.1)
    return model


def stacks(model: Any, depth: int) -> Iterator[tuple[str, ModuleList]]:
    """The lists of modules with one for each layer."""
    for name, module in model.named_modules():
        if isinstance(module, ModuleList) and len(module) == depth and ".experts" not in name:
            yield name, module


def reordered(model: Any, order: list[int]) -> Any:
    """A model whose own modules, and lists in its config, are put into another order."""
    depth = DEPTH
    model = copy.deepcopy(model)
    for name, stack in list(stacks(model, depth)):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, ModuleList([copy.deepcopy(stack[i]) for i in order]))
    for module in model.modules():
        for key, value in list(vars(module).items()):
            if key == "n_layers":
                module.n_layers = len(order)
            elif isinstance(value, list) and len(value) == depth and not key.startswith("_"):
                setattr(module, key, [value[i] for i in order])
    config, kind = model.config, type(model.config)
    computed = {}
    for key in (k for k in dir(kind) if isinstance(getattr(kind, k), property)):
        try:
            value = getattr(config, key)
        except Exception:  # a property may refuse for reasons of its own
            continue
        if isinstance(value, list) and len(value) == depth:
            computed[key] = [value[i] for i in order]
    own = {k: v for k, v in vars(config).items() if isinstance(v, list) and len(v) == depth}
    kept = {k: property(lambda self, v=v: v, lambda self, new: None) for k, v in computed.items()}
    config.__class__ = type(kind.__name__, (kind,), kept)
    for key, value in own.items():
        vars(config)[key] = [value[i] for i in order]
    name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    vars(config)[name if name in vars(config) else "num_layers"] = len(order)
    return model


def carried(model: Any, config: Any, order: list[int]) -> Any:
    """A model of a config with the weights of another one's layers."""
    result = transformers.AutoModelForCausalLM.from_config(config).eval()
    names = [name for name, _ in stacks(model, DEPTH)]
    own = model.state_dict()
    state = {}
    for key in result.state_dict():
        stack = next((n for n in names if key.startswith(f"{n}.")), None)
        if stack:
            layer, _, rest = key.removeprefix(f"{stack}.").partition(".")
            state[key] = own[f"{stack}.{order[int(layer)]}.{rest}"]
        else:
            state[key] = own[key]
    result.load_state_dict(state)
    return result


def logits(model: Any) -> torch.Tensor:
    """Of a text that is longer than the windows."""
    ids = torch.randint(3, 90, (1, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def outcome(model: Any, order: list[int], folder: Path) -> str:
    """`equal`, or what is wrong."""
    asked = moved_layers.moved(folder, [[(folder, i)] for i in order])
    if asked["problems"]:
        return "refused: " + "; ".join(p["message"].replace(str(folder), "it") for p in asked["problems"])
    try:
        content = read_json(folder / "config.json") | asked["changes"]
        (folder / "result").mkdir(exist_ok=True)
        write_json(folder / "result" / "config.json", content)
        result = carried(model, transformers.AutoConfig.from_pretrained(folder / "result"), order)
        got = logits(result)
    except Exception as e:  # what a user would see as a model that does not load
        return f"WRONG: {type(e).__name__}: {str(e)[:300]}".replace("\n", " ")
    try:
        want = logits(reordered(model, order))
    except Exception as e:
        return f"no reference: {type(e).__name__}: {str(e)[:200]}".replace("\n", " ")
    if not want.isfinite().all():
        return "no reference: not finite"
    worst = float((got - want).abs().max())
    return (
        "equal" if worst < 1e-5 else f"WRONG: logits differ by {worst:.2g} of {float(want.abs().max()):.2g}"
    )


def main(kinds: list[str]) -> None:
    """Print a table."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    count: Counter[str] = Counter()
    for kind in kinds or DECODERS:
        try:
            config = small(kind, {})
            model = donor(config)
            logits(model)
        except Exception as e:  # many need more than sizes
            print(f"{kind:22} not built: {type(e).__name__}: {str(e)[:120]}".replace("\n", " "), flush=True)
            count["not built"] += 1
            continue
        with tempfile.TemporaryDirectory() as d:
            folder = Path(d)
            model.config.save_pretrained(folder)
            write_json(folder / "config.json", read_json(folder / "config.json"))
            for name, order in ORDERS.items():
                try:
                    said = outcome(model, order, folder)
                except Exception as e:
                    said = f"WRONG: {type(e).__name__}: {str(e)[:300]}".replace("\n", " ")
                    if len(kinds) == 1:
                        raise
                count[said.partition(":")[0]] += 1
                print(f"{kind:22} {name:10} {said}", flush=True)
    print(dict(count))


if __name__ == "__main__":
    main(sys.argv[1:])
