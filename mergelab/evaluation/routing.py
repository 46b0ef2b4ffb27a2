"""Which experts of a mixture the tokens of each task are routed to."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergelab.core.errors import StepError, summary
from mergelab.evaluation.isolation import seeded, threads
from mergelab.schema import Hardware

MODEL_TYPES = ("mixtral", "qwen2_moe", "qwen3_moe")
"""Mixtures whose routers take the top k of a softmax over all experts: all that merging can make."""

MOST_PROMPTS = 64
"""Prompts of each task that are routed: a few hundred tokens at least."""

NEGLIGIBLE = 0.02
"""Information below this share of its maximum counts as none."""

_SHUFFLES = 100

Array = NDArray[np.float64]


def experts_in(config: Mapping[str, Any]) -> int:
    """How many experts a layer has, by a model's config.json; 0 where it is not a mixture."""
    return int(config.get("num_local_experts") or config.get("num_experts") or 0)


@dataclass(frozen=True)
class Routing:
    """Where the tokens of some prompts were routed."""

    experts: list[str]
    tasks: list[str]
    layers: list[int]
    """The layers that have experts, from 0."""
    per_token: int
    """How many experts a token is routed to in each layer."""
    task: NDArray[np.int64]
    """(prompts) The number of each prompt's task."""
    tokens: Array
    """(prompts) The number of its tokens."""
    chosen: Array
    """(prompts, layers, experts) How many of them were routed to the expert."""
    weight: Array
    """(prompts, layers, experts) The sum of their routing weights."""

    @property
    def shares(self) -> Array:
        """(tasks, layers, experts) The share of a task's routed tokens that each expert gets; sums to 1."""
        return _by_task(self.chosen / self.per_token, self.tokens, self.task, len(self.tasks))

    @property
    def weights(self) -> Array:
        """(tasks, layers, experts) The mean routing weight of each expert over a task's tokens, 0 where it
        was not chosen; sums to 1 where the model normalises the weights of the chosen experts."""
        return _by_task(self.weight, self.tokens, self.task, len(self.tasks))

    @property
    def dense(self) -> bool:
        """Whether every token goes to every expert, so that only their weights can differ."""
        return self.per_token == len(self.experts)

    @property
    def usage(self) -> Array:
        """(tasks, layers, experts) The shares, or the weights where all shares are equal."""
        return self.weights if self.dense else self.shares

    @property
    def highest(self) -> float:
        """The largest value that one expert can have in `usage`."""
        return 1.0 if self.dense else 1 / self.per_token

    def shuffled(self) -> float:
        """The 95 % quantile of the information, in bits, when prompts are assigned to tasks at random.

        Whole prompts are permuted because the tokens of one prompt are not independent.
        """
        counts = self.weight if self.dense else self.chosen / self.per_token
        rng, n = np.random.default_rng(0), len(self.tasks)
        permuted = (rng.permutation(self.task) for _ in range(_SHUFFLES))
        return float(np.quantile([information(_by_task(counts, self.tokens, t, n)) for t in permuted], 0.95))

    def summary(self) -> dict[str, Any]:
        """The means over the layers, and the information on the tasks: `routing` of result.json."""
        shares, weights, usage = self.shares.mean(1), self.weights.mean(1), self.usage.mean(1)
        most = math.log2(min(len(self.tasks), len(self.experts) * self.highest))
        bits, noise = information(self.usage), self.shuffled()
        own = [[i for i, e in enumerate(self.experts) if _stem(e) == _stem(t)] for t in self.tasks]
        owned = [(usage[t, o].sum(), len(o) / len(self.experts)) for t, o in enumerate(own) if o]
        return {
            "experts": self.experts,
            "per_token": self.per_token,
            "layers": len(self.layers),
            "tasks": {
                name: {
                    "prompts": int((self.task == t).sum()),
                    "tokens": int(self.tokens[self.task == t].sum()),
                    "own": [self.experts[i] for i in own[t]],
                    "shares": dict(zip(self.experts, shares[t].tolist(), strict=True)),
                    "weights": dict(zip(self.experts, weights[t].tolist(), strict=True)),
                }
                for t, name in enumerate(self.tasks)
            },
            "information": {
                "bits": bits,
                "at_most": most,
                "shuffled": noise,
                "nothing": len(self.tasks) > 1 and bool(bits <= max(noise, NEGLIGIBLE * most)),
            },
            "own": {
                "share": float(np.mean([share for share, _ in owned])),
                "even": float(np.mean([even for _, even in owned])),
            }
            if owned
            else None,
        }


def _stem(name: str) -> str:
    """`math` for `math 2`, which is another expert of the same model."""
    return re.sub(r" \d+$", "", name)


def information(shares: Array) -> float:
    """How much the chosen expert reveals about the task, in bits, averaged over the layers.

    The mutual information of task and expert where all tasks are equally frequent,
    H(mean over tasks of p(expert | task)) - mean over tasks of H(p(expert | task)). Where a token is routed
    to k of E experts it is at most log2 of min(tasks, E/k) because no expert gets more than 1/k.

    Args:
        shares: (tasks, layers, experts), for each task and layer in any unit.
    """
    p = shares / shares.sum(-1, keepdims=True)
    return max(0.0, float((_entropy(p.mean(0)) - _entropy(p).mean(0)).mean()))


def _entropy(p: Array) -> Array:
    return np.asarray(-(p * np.log2(np.where(p > 0, p, 1.0))).sum(-1))


def _by_task(counts: Array, tokens: Array, task: NDArray[np.int64], n: int) -> Array:
    """(tasks, layers, experts) Means over the tokens of each task, from (prompts, layers, experts) sums."""
    member = np.eye(n)[task].T
    return np.asarray(np.tensordot(member, counts, 1) / (member @ tokens)[:, None, None])


def follow(
    model: Any,
    tokenizer: Any,
    prompts: Mapping[str, Sequence[str]],
    experts: Sequence[str],
    *,
    hardware: Hardware,
    batch_size: int,
    max_length: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Routing:
    """Send prompts through a mixture, and count what its routers choose for every token.

    A router computes p = softmax(logits) over all experts, in float32. The token is routed to the k experts
    with the largest p. Their outputs are summed with the weights p, divided by their sum where the model does
    so (Mixtral always, Qwen by `norm_topk_prob`). Shared experts, which get every token, are not counted.

    Args:
        model: of one of MODEL_TYPES.
        prompts: by task; one longer than the context (`max_length`, else the model's) is cut at its start.
        experts: the experts' names, in their order in the model.
    Raises:
        StepError: where the model cannot be run, such as for lack of memory, or a task's prompts are empty.
    """
    import torch

    limit = max_length or getattr(model.config, "max_position_embeddings", None) or 2048
    encoded = [
        (number, torch.tensor(ids[-limit:]))
        for number, texts in enumerate(prompts.values())
        for text in texts
        if (ids := _encode(tokenizer, text))
    ]
    if missing := [t for n, t in enumerate(prompts) if n not in {number for number, _ in encoded}]:
        raise StepError(f"the prompts of {', '.join(missing)} have no tokens, so there is nothing to route")
    # Batches of similar lengths, the longest first, so that too little memory shows at once.
    encoded.sort(key=lambda e: -len(e[1]))
    layers = _sparse_layers(model.config)
    shape = (len(encoded), len(layers), len(experts))
    chosen, weight = np.zeros(shape), np.zeros(shape)
    with torch.inference_mode(), seeded(0, threads(model, hardware)):
        for start in range(0, len(encoded), batch_size):
            batch = [ids for _, ids in encoded[start : start + batch_size]]
            for layer, (counts, sums) in enumerate(_batch(model, batch, len(layers))):
                chosen[start : start + len(batch), layer] = counts
                weight[start : start + len(batch), layer] = sums
            if progress is not None:
                progress("routing", start + len(batch), len(encoded))
    return Routing(
        list(experts),
        list(prompts),
        layers,
        int(model.config.num_experts_per_tok),
        np.array([number for number, _ in encoded]),
        np.array([float(len(ids)) for _, ids in encoded]),
        chosen,
        weight,
    )


def _encode(tokenizer: Any, text: str) -> list[int]:
    """As in lm_eval: a text that starts with the BOS token, as after a chat template, gets no second one."""
    has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    return list(tokenizer(text, add_special_tokens=not has_bos)["input_ids"])


def _sparse_layers(config: Any) -> list[int]:
    """The layers that have experts; Qwen's models may have dense layers, too."""
    dense, step = getattr(config, "mlp_only_layers", None) or (), getattr(config, "decoder_sparse_step", 1)
    return [i for i in range(config.num_hidden_layers) if i not in dense and (i + 1) % step == 0]


def _batch(model: Any, batch: Sequence[Any], layers: int) -> Iterator[tuple[Any, Any]]:
    """For each layer two arrays (prompts, experts): the number of tokens routed there, and their weights.

    Prompts are padded on the right, where no token of a causal model attends to. Only the inner model runs
    because the outer one would compute logits over the vocabulary.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence(list(batch), batch_first=True).to(model.device)
    real = pad_sequence([torch.ones_like(b) for b in batch], batch_first=True).to(model.device)
    try:
        found = model.base_model(
            input_ids=ids, attention_mask=real, use_cache=False, output_router_logits=True
        ).router_logits
    except RuntimeError as e:
        memory = "out of memory" in str(e).lower()
        remedy = "; lower eval.batch_size or set eval.max_length" if memory else ""
        raise StepError(f"the mixture could not be run: {summary(e)}{remedy}") from e
    if len(found) != layers:
        raise StepError(f"{len(found)} layers of the model have a router, but its config.json says {layers}")
    for logits in found:
        p = logits.float().softmax(-1)
        weights, indices = p.topk(model.config.num_experts_per_tok)
        if getattr(model.config, "norm_topk_prob", True):
            weights = weights / weights.sum(-1, keepdim=True)
        both = [torch.zeros_like(p).scatter(1, indices, v) for v in (torch.ones_like(weights), weights)]
        counts, sums = [(v.view(*real.shape, -1) * real[..., None]).sum(1).cpu().double() for v in both]
        yield counts.numpy(), sums.numpy()
