"""int8 on a CPU: linear layers keep eight bits of each weight, and compute in float32.

Only weights are rounded, each row to 255 steps with a step size of its own. torch's dynamic quantisation
rounds the inputs as well, with one step size for the whole batch. On normally distributed inputs its error
is five times as large. With one input 40 times as large as the others, as large language models have them, it
is a hundred times as large, and an answer depends on which prompts share its batch. Import this module late.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

STEPS = 127
"""The largest magnitude of a weight in steps."""


class Int8Linear(nn.Module):
    """A linear layer whose weights have eight bits: y = (x q^T) s + b, with w = s q of each row.

    q (outputs, inputs) is int8, s (outputs) and the arithmetic are float32; y has the dtype of x.
    It has no `weight`, so that code which accesses one fails instead of multiplying by steps.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        weight = layer.weight.detach()
        # The smallest normal number stands in for the step of a row of zeros.
        step = weight.abs().amax(1).float().div_(STEPS).clamp_(min=torch.finfo(torch.float32).tiny)
        rounded = (weight / step[:, None]).round_().to(torch.int8)
        # A parameter, so that the model has as many of them as before.
        self.steps = nn.Parameter(rounded, requires_grad=False)
        self.step = nn.Parameter(step, requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        y = nn.functional.linear(x.float(), self.steps.float()) * self.step
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def quantize(model: Any) -> None:
    """Replace a model's linear layers by int8 ones, one after another.

    Not replaced, as in bitsandbytes: the head, which may be tied to the embedding; norms; the packed experts
    of a mixture, which are one tensor and not layers; and the factors of a LoRA.
    """
    head = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and layer is not head and ".lora_" not in name:
            model.set_submodule(name, Int8Linear(layer))
