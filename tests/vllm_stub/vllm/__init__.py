"""As much of vLLM as lm_eval's adapter calls, answered by transformers on the CPU, greedily.

It stands for the GPU: what is asked of it is recorded, and as in the real one a second engine finds no
memory while there is a first.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

made: list[dict[str, Any]] = []
"""With what each engine was made."""
events: list[str] = []
"""`made`, `shutdown` and `cleanup`, in order."""


class TokensPrompt(dict):
    """A prompt as ids."""


class SamplingParams(SimpleNamespace):
    """How to answer."""

    prompt_logprobs = None
    stop: tuple[str, ...] = ()
    max_tokens = 16


class _Core:
    alive = 0

    def shutdown(self) -> None:
        _Core.alive -= 1
        events.append("shutdown")


class LLM:
    """An engine."""

    def __init__(self, model: str, **options: Any):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        made.append({"model": model, **options})
        if _Core.alive:
            raise RuntimeError("Free memory on device is less than desired: out of memory")
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=options["dtype"]).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        context = options["max_model_len"] or self._model.config.max_position_embeddings
        if context > self._model.config.max_position_embeddings:
            raise ValueError(f"User-specified max_model_len ({context}) is greater than the model's")
        config = SimpleNamespace(max_model_len=context)
        self.llm_engine = SimpleNamespace(model_config=config, engine_core=_Core())
        _Core.alive += 1
        events.append("made")

    def generate(
        self, prompts: list[TokensPrompt], sampling_params: list[SamplingParams], **_: Any
    ) -> list[Any]:
        """An answer to each prompt."""
        ids = [p["prompt_token_ids"] for p in prompts]
        return [self._answer(i, p) for i, p in zip(ids, sampling_params, strict=True)]

    def _answer(self, ids: list[int], p: SamplingParams) -> Any:
        import torch

        with torch.inference_mode():
            if p.prompt_logprobs is not None:
                told = torch.log_softmax(self._model(torch.tensor([ids])).logits[0].float(), -1)
                best = told.argmax(-1).tolist()
                pairs = zip(ids[1:], best, told, strict=False)
                shown = [None, *({t: float(row[t]), b: float(row[b])} for t, b, row in pairs)]
                return SimpleNamespace(prompt_logprobs=shown)
            said: list[int] = []
            text = ""
            while len(said) < p.max_tokens and not any(s in text for s in p.stop):
                said.append(int(self._model(torch.tensor([ids + said])).logits[0, -1].argmax()))
                text = self._tokenizer.decode(said, skip_special_tokens=p.skip_special_tokens)
        return SimpleNamespace(outputs=[SimpleNamespace(text=text)])
