"""Training of the tiny family, and its evaluation without generation."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
)
from transformers.utils import logging as transformers_logging

from mergelab.zoo.curriculum import Curriculum, Stage
from mergelab.zoo.skills import SKILLS, draw
from mergelab.zoo.tokenizer import END_ID, PAD_ID, make_tokenizer

IGNORED = -100
"""The label of a token that is not scored: the prompt or padding."""

Batch = tuple[Tensor, Tensor]
"""Token ids and labels, both (examples, tokens), int64, padded on the right."""

Scores = dict[str, float]
"""The share of questions with an exactly correct answer, by skill."""


def train_family(
    folder: Path, seed: int, curriculum: Curriculum, on_step: Callable[[str], None]
) -> dict[str, Scores]:
    """Train the base and its experts, and save each to `folder/role`.

    On one machine the same arguments write the same bytes. The state of torch (random numbers, threads) is
    restored.

    Args:
        folder: The folder of the family.
        seed: The seed of all random numbers.
        curriculum: The constants of the training.
        on_step: Called with the role after every optimisation step.

    Returns:
        The validation scores of every model.
    """
    tokenizer = make_tokenizer(curriculum.positions)
    exams = {}
    for skill in SKILLS:
        questions = draw(skill, "validation", curriculum.validation_prompts)
        exams[skill] = encode(tokenizer, [(q.prompt, q.answer) for q in questions])
    scores: dict[str, Scores] = {}

    def teach(model: PreTrainedModel, stage: Stage) -> None:
        examples = encode(tokenizer, _pool(stage, seed))
        train(model, examples, stage, curriculum, seed, partial(on_step, stage.role))
        scores[stage.role] = {skill: accuracy(model, exam) for skill, exam in exams.items()}
        _save(model, tokenizer, folder / stage.role)

    with _reproducible(seed):
        model = new_model(curriculum, len(tokenizer))
        teach(model, curriculum.base)
        base = {name: value.clone() for name, value in model.state_dict().items()}
        for stage in curriculum.experts:
            model.load_state_dict(base)
            teach(model, stage)
    return scores


def new_model(curriculum: Curriculum, vocabulary: int) -> PreTrainedModel:
    """A Qwen2 of the curriculum's architecture in float32, initialised by torch's random state."""
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=curriculum.hidden_size,
        intermediate_size=curriculum.intermediate_size,
        num_hidden_layers=curriculum.layers,
        num_attention_heads=curriculum.heads,
        num_key_value_heads=curriculum.heads,
        max_position_embeddings=curriculum.positions,
        rope_parameters={"rope_type": "default", "rope_theta": curriculum.rope_theta},
        initializer_range=curriculum.initializer_range,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=END_ID, pad_token_id=PAD_ID, do_sample=False)
    return model


def encode(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> Batch:
    """Prompts and answers as one batch, whose labels are the answers and end tokens."""
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    answers = tokenizer([answer for _, answer in pairs])["input_ids"]
    texts = [[*p, *a, END_ID] for p, a in zip(prompts, answers, strict=True)]
    width = max(map(len, texts))
    ids = torch.tensor([text + [PAD_ID] * (width - len(text)) for text in texts])
    starts = torch.tensor([[len(prompt)] for prompt in prompts])
    ends = torch.tensor([[len(text)] for text in texts])
    position = torch.arange(width)
    return ids, torch.where((starts <= position) & (position < ends), ids, IGNORED)


def train(
    model: PreTrainedModel,
    examples: Batch,
    stage: Stage,
    curriculum: Curriculum,
    seed: int,
    on_step: Callable[[], None],
) -> None:
    """Train a model in place: AdamW, random batches, loss on the answers only."""
    ids, labels = examples
    drawing = torch.Generator().manual_seed(seed)
    parameters = [p for name, p in model.named_parameters() if stage.trained in name]
    optimizer = torch.optim.AdamW(
        parameters, betas=curriculum.betas, weight_decay=stage.weight_decay, fused=True
    )
    model.train()
    for step in range(stage.steps):
        warm = min(1.0, (step + 1) / stage.warmup)
        falling = max(stage.floor, 1 - step / stage.steps)
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * warm * falling
        chosen = torch.randint(len(ids), (curriculum.batch,), generator=drawing)
        logits, targets, _ = _predict(model, (ids[chosen], labels[chosen]))
        loss = cross_entropy(logits, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, curriculum.gradient_norm)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        on_step()
    model.eval()


@torch.no_grad()
def accuracy(model: PreTrainedModel, examples: Batch) -> float:
    """The share of examples whose answer tokens, including the end token, are all predicted.

    Each token is predicted from the correct tokens before it. If all are predicted, greedy generation
    gives the same result. So this is the exact match at the cost of one forward pass.
    """
    logits, targets, scored = _predict(model, examples)
    right = torch.ones_like(scored)
    right[scored] = logits.argmax(-1) == targets
    return right.all(dim=1).float().mean().item()


def _predict(model: PreTrainedModel, examples: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (n, vocabulary), targets (n) and mask of the n scored tokens.

    The mask has shape (examples, tokens - 1), because each token but the first is the target of the one
    before it. Logits are only computed where they are needed, to save time.
    """
    ids, labels = examples
    targets = labels[:, 1:]
    scored = targets != IGNORED
    hidden = model.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    return model.get_output_embeddings()(hidden[scored]), targets[scored], scored


def _pool(stage: Stage, seed: int) -> list[tuple[str, str]]:
    """The (prompt, answer) pairs that a stage is trained on."""
    pairs = []
    for skill, n in stage.examples.items():
        rng = random.Random(f"mistakes/{stage.role}/{skill}/{seed}")
        for question in draw(skill, "train", n, seed):
            mistaken = rng.random() < stage.mistakes
            pairs.append((question.prompt, question.mistake if mistaken else question.answer))
    return pairs


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a model and its tokenizer without transformers' progress bar."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Seed torch, on the CPU and in one thread (sums depend on the number of threads), and restore it."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
