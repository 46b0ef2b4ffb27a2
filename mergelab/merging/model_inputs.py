"""What a model is run on when it is tried out: a short text, or a few ids where it has no tokenizer."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from typing import Any

log = logging.getLogger(__name__)

SOME = 4
"""How many ids a model without a tokenizer is run on."""

SOUND = 16000
"""Samples of a sound: a second."""


def is_finite(tensor: Any) -> bool:
    """Whether all entries are finite. aminmax propagates NaN and is many times faster than isfinite."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return all(bool(t.isfinite()) for t in tensor.aminmax())


def tensors_in(output: Any) -> Iterator[Any]:
    """All tensors of what a model returned, but for its cache."""
    import torch

    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for name, value in output.items():
            if name != "past_key_values":
                yield from tensors_in(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from tensors_in(value)


def text_ids(tokenizer: Any, text: str, *, fixed: bool) -> list[int]:
    """The ids of a text.

    If the vocabulary cannot express it, the first few tokens of the vocabulary.

    Args:
        fixed: Whether it has to be this text.
    """
    ids = list(tokenizer(text).input_ids)
    special = set(tokenizer.all_special_ids)
    if not fixed and set(ids) <= special:
        return [i for i in range(len(tokenizer)) if i not in special][:SOME]
    return ids


def embedding_rows(model: Any) -> int | None:
    """How many ids a model knows, or None where it has no embedding of ids."""
    try:
        weight = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return None
    return int(weight.shape[0]) if weight.ndim == 2 else None


def some_ids(model: Any) -> list[int]:
    """A few ids that mean nothing special to the model."""
    special = set(_special(model.config.to_dict()))
    return [i for i in range(embedding_rows(model) or SOME) if i not in special][:SOME] or [0]


def _special(config: Mapping[str, Any]) -> Iterator[int]:
    """Ids that a config, or a part of it, names: the end of text, an image's place."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _special(value)
        elif str(key).endswith(("_token_id", "_token_index")):
            yield from (i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int))


def forward(model: Any, ids: list[int], device: str) -> Any:
    """What a class returns that does not continue text: for ids, or for noise where it takes images or sound.

    Raises:
        Exception: of whatever type, where the class takes none of it.
    """
    takes = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    texts = _of_text(model, ids, device, takes)
    noise = _noise(model, main, device)
    if main != "input_ids" or "pixel_values" not in takes:
        return model(**texts, **noise)
    try:
        return model(**texts)
    except Exception:  # CLIP compares texts with images, and takes neither alone
        if not (noise := _noise(model, "pixel_values", device)):
            raise
        log.info("not with text alone", exc_info=True)
    return model(**texts, **noise)


def _of_text(model: Any, ids: list[int], device: str, takes: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    out: dict[str, Any] = {}
    end = model.config.eos_token_id if getattr(model.config, "is_encoder_decoder", False) else None
    # BART looks for the end of a text, at the same place in what its encoder and its decoder read.
    own = torch.tensor([[*ids, end] if isinstance(end, int) and end not in ids else ids], device=device)
    if "input_ids" in takes:
        out["input_ids"] = own[None] if type(model).__name__.endswith("ForMultipleChoice") else own
        if "attention_mask" in takes:
            out["attention_mask"] = torch.ones_like(out["input_ids"])
    if "decoder_input_ids" in takes:
        out["decoder_input_ids"] = own
    return out


def _noise(model: Any, name: str, device: str) -> dict[str, Any]:
    """An image or a sound of the size that the config names; empty for text."""
    import torch

    config = model.config
    parts = [config, *(getattr(config, n, None) for n in ("vision_config", "encoder"))]
    if name == "pixel_values":
        size = next((s for p in parts if (s := getattr(p, "image_size", None))), 224)
        channels = next((c for p in parts if (c := getattr(p, "num_channels", None))), 3)
        shape = [channels, *(size if isinstance(size, (list, tuple)) else (size, size))]
    elif name == "input_features":
        shape = [config.num_mel_bins, 2 * config.max_source_positions]
    elif name == "input_values":
        shape = [SOUND]
    else:
        return {}
    dtype = getattr(model, "dtype", torch.float32)
    return {name: torch.rand(1, *shape, device=device).to(dtype)}
