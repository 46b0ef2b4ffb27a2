"""Training the tiny family, and scoring it without generating."""

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
"""The label of a token that is not judged: a prompt's, or padding."""

Batch = tuple[Tensor, Tensor]
"""Token ids and labels, both (examples, tokens), int64, padded on the right."""

Scores = dict[str, float]
"""A skill's name to the share of its questions that are answered exactly right."""


def train_family(
    folder: Path, seed: int, curriculum: Curriculum, on_step: Callable[[str], None]
) -> dict[str, Scores]:
    """Train the base and its experts, and save each into `folder/role`.

    `on_step` is called with the role after every optimisation step. Returns the validation scores
    of every model. On one machine the same arguments write the same bytes; the state of torch
    (random numbers, threads) is left as it was.
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
    """A Qwen2 of the curriculum's architecture in float32, with torch's current random numbers."""
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
    """Prompts with their answers as one batch, whose labels are the answers and their end marks."""
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
    """Train `model` in place: AdamW on batches drawn at random, the loss on answers only."""
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
    """The share of examples all of whose answer tokens, end mark included, are predicted.

    Each token is predicted from the right tokens before it. Where all are predicted, greedy
    generation would have given the same, so this is its exact match at the price of one pass.
    """
    logits, targets, judged = _predict(model, examples)
    right = torch.ones_like(judged)
    right[judged] = logits.argmax(-1) == targets
    return right.all(dim=1).float().mean().item()


def _predict(model: PreTrainedModel, examples: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (n, vocabulary) and targets (n) of the n judged tokens, and where they are.

    The mask of the judged tokens is (examples, tokens - 1): of each token but the first, as it is
    the target of the one before. Logits are computed nowhere else, to save time.
    """
    ids, labels = examples
    targets = labels[:, 1:]
    judged = targets != IGNORED
    hidden = model.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    return model.get_output_embeddings()(hidden[judged]), targets[judged], judged


def _pool(stage: Stage, seed: int) -> list[tuple[str, str]]:
    """The (prompt, answer) pairs that a stage is trained on."""
    pairs = []
    for skill, n in stage.examples.items():
        erring = random.Random(f"mistakes/{stage.role}/{skill}/{seed}")
        for question in draw(skill, "train", n, seed):
            errs = erring.random() < stage.mistakes
            pairs.append((question.prompt, question.mistake if errs else question.answer))
    return pairs


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a checkpoint that transformers loads, without a progress bar for half a megabyte."""
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
    """Seeded, on the CPU, in one thread (sums depend on how many share them); then as before."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
