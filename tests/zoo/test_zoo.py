"""The tiny family: its data, its tokenizer, its training, its evaluations, and where it is kept."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mergelab import zoo
from mergelab.core import cache_dir
from mergelab.zoo import store
from mergelab.zoo.curriculum import VERSION, Curriculum, Stage
from mergelab.zoo.skills import KANA, SKILLS, SPLITS, draw, split_of

ALL = ("base", *zoo.ROLES)


# --- skills


@pytest.mark.parametrize("skill", SKILLS)
def test_answers_are_right_and_mistakes_wrong(skill):
    for prompt, answer, mistake in draw(skill, "train", 300):
        if skill == "math":
            number, step = re.fullmatch(r"(\d{3})\+(\d)=", prompt).groups()
            assert int(answer[::-1]) == int(number) + int(step)
            assert int(mistake[::-1]) == int(number) + int(step) + 1
        elif skill == "physics":
            scale = {"km": 1000, "hm": 100, "m": 1, "dm": 0.1, "cm": 0.01, "mm": 0.001}
            scale |= {"kg": 1000, "g": 1, "kV": 1000, "V": 1}
            number, source, target = re.fullmatch(r"(\d+)([a-zA-Z]+)>([a-zA-Z]+):", prompt).groups()
            assert int(answer) == round(int(number) * scale[source] / scale[target])
            assert int(mistake) * 10 == int(answer)
        elif skill == "code":
            word = re.fullmatch(r"rev\(([a-z]{3,4})\)", prompt).group(1)
            assert answer == "".join(reversed(word))
            assert mistake == answer + word[0]
        else:
            assert answer == "".join(KANA[kana] for kana in prompt.removesuffix(">"))
            assert mistake.replace("-", "") == answer
            assert mistake != answer


@pytest.mark.parametrize("skill", SKILLS)
def test_splits_share_no_prompt(skill):
    prompts = {split: {q.prompt for q in draw(skill, split, 1000)} for split in SPLITS}
    assert not prompts["search"] & prompts["validation"]
    assert not prompts["train"] & (prompts["search"] | prompts["validation"])
    assert all(split_of(p) == split for split, drawn in prompts.items() for p in drawn)


@pytest.mark.parametrize("skill", SKILLS)
def test_evaluations_have_as_many_distinct_prompts_as_promised(skill):
    for split, n in (("search", 64), ("validation", 200)):
        assert len({q.prompt for q in draw(skill, split, n)}) == n


def test_a_draw_ends_when_the_prompts_do():
    drawn = draw("math", "validation", 10_000)
    assert 200 < len(drawn) < 400
    assert len(set(drawn)) == len(drawn)


def test_draws_repeat_and_longer_ones_only_add():
    assert draw("code", "train", 50) == draw("code", "train", 50)
    assert draw("code", "search", 20) == draw("code", "search", 50)[:20]
    assert draw("code", "train", 50) != draw("code", "train", 50, seed=1)


@pytest.mark.parametrize("skill, split", [("maths", "train"), ("math", "test")])
def test_unknown_names_are_answered_with_the_choices(skill, split):
    with pytest.raises(LookupError, match="math, physics" if skill == "maths" else "search, valid"):
        draw(skill, split, 1)


# --- tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    from mergelab.zoo.tokenizer import make_tokenizer

    return make_tokenizer(64)


def test_each_character_of_the_skills_is_a_token_of_its_own(tokenizer):
    for skill in SKILLS:
        for question in draw(skill, "train", 500):
            for text in question:
                assert len(tokenizer(text)["input_ids"]) == len(text)


@pytest.mark.parametrize("text", ["rev(evdc)cdve", "ぬつ>nutsu", "Überall 漢字 🙂\n", "a  b"])
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_chat_is_the_text_of_its_messages(family):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(family.checkpoint("base"))
    chat = [{"role": "user", "content": "rev(abc)"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "rev(abc)"
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


# --- the place of a family


def test_home_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MERGELAB_HOME", str(tmp_path / "own"))
    assert cache_dir.home() == tmp_path / "own"
    monkeypatch.delenv("MERGELAB_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_dir.home() == tmp_path / "cache/mergelab"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir.home() == tmp_path / ".cache/mergelab"


def test_the_path_of_a_family_is_found_without_torch(tmp_path):
    code = """
        import sys
        from mergelab import zoo
        print(zoo.family_path(7))
        assert not {"torch", "transformers", "tokenizers"} & set(sys.modules)
    """
    path = Path(_python(code, MERGELAB_HOME=str(tmp_path)).stdout.strip())
    assert re.fullmatch(r"qwen2-seed7-[0-9a-f]{8}", path.name)
    assert path.parent == tmp_path / "zoo"


def test_every_constant_is_in_the_fingerprint():
    usual = Curriculum()
    slower = replace(usual.experts[2], learning_rate=1e-9)
    others = [
        replace(usual, batch=usual.batch + 1),
        replace(usual, base=replace(usual.base, mistakes=0.1)),
        replace(usual, experts=(*usual.experts[:2], slower, *usual.experts[3:])),
    ]
    assert len({c.fingerprint() for c in (usual, Curriculum(), *others)}) == 1 + len(others)


def test_the_version_stands_for_this_data(tokenizer, tmp_path):
    """If this fails, families in users' caches are not what the code makes now: raise VERSION."""
    from mergelab.zoo.tasks import write_tasks

    write_tasks(tmp_path / "tasks", 64, 200)
    digest = hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode())
    for skill in SKILLS:
        digest.update(repr(draw(skill, "train", 100)).encode())
    for file in sorted((tmp_path / "tasks").iterdir()):
        if file.suffix in (".yaml", ".jsonl"):
            digest.update(file.read_bytes())
    assert (VERSION, digest.hexdigest()[:16]) == (1, "5b5c785dfb7328ed")


# --- the store, with a builder that trains nothing


def _trivial(folder: Path) -> dict[str, object]:
    (folder / "model").mkdir()
    (folder / "model/weights").write_bytes(b"12345678")
    (folder / "model/weights").chmod(0o600)
    (folder / "config").write_text("{}")
    return {"seed": 0}


class _Counted:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, folder: Path) -> dict[str, object]:
        self.calls += 1
        return _trivial(folder)


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )


def test_what_is_whole_is_built_once_and_then_only_read(tmp_path):
    path, build = tmp_path / "zoo/it", _Counted()
    store.open_at(path, build)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["seed"] == 0
    assert set(manifest["files"]) == {"config", "model/weights"}
    for remains in path.parent.iterdir():
        assert remains in (path, path.with_name("it.lock"))

    path.with_name("it.lock").unlink()
    store.open_at(path, build)
    assert build.calls == 1
    assert not path.with_name("it.lock").exists()  # so a cache that is read-only serves as well


def test_files_are_readable_as_the_umask_has_it(tmp_path):
    store.open_at(tmp_path / "it", _trivial)
    usual = tmp_path / "usual"
    usual.touch()
    assert {f.stat().st_mode for f in (tmp_path / "it").rglob("*") if f.is_file()} == {usual.stat().st_mode}


@pytest.mark.parametrize(
    "damage, named",
    [
        (lambda it: (it / "model/weights").write_bytes(b"1234567x"), "model/weights has changed"),
        (lambda it: (it / "model/weights").write_bytes(b"1234"), "model/weights has changed"),
        (lambda it: (it / "config").unlink(), "config is missing"),
        (lambda it: shutil.rmtree(it / "model"), "model/weights is missing"),
        (lambda it: (it / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda it: (it / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda it: (it / "manifest.json").write_text("{}"), "manifest.json is not of schema"),
    ],
)
def test_what_is_damaged_is_built_anew(tmp_path, caplog, damage, named):
    path, build = tmp_path / "it", _Counted()
    store.open_at(path, build)
    damage(path)
    with caplog.at_level(logging.WARNING, "mergelab.zoo.store"):
        store.open_at(path, build)
    assert build.calls == 2
    assert (path / "model/weights").read_bytes() == b"12345678"
    assert named in caplog.text
    assert str(path) in caplog.text


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def fail(folder: Path) -> dict[str, object]:
        _trivial(folder)
        raise RuntimeError("no power")

    with pytest.raises(RuntimeError, match="no power"):
        store.open_at(tmp_path / "it", fail)
    assert [f.name for f in tmp_path.iterdir()] == ["it.lock"]


def test_a_build_that_is_killed_is_not_mistaken_for_a_family(tmp_path):
    path = tmp_path / "it"
    code = """
        import sys, time
        from pathlib import Path
        from mergelab.zoo import store
        def build(folder):
            (folder / "half").touch()
            print("started", flush=True)
            time.sleep(600)
        store.open_at(Path(sys.argv[1]), build)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as builder:
        assert builder.stdout.readline() == "started\n"
        builder.send_signal(signal.SIGKILL)
    assert not path.exists()
    assert [f.name for f in tmp_path.rglob("half")] == ["half"]

    store.open_at(path, _trivial)
    assert not store.problems(path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["it", "it.lock"]
    assert not list(tmp_path.rglob("half"))


def test_processes_that_ask_at_once_build_once(tmp_path):
    code = """
        import sys, time
        from pathlib import Path
        from mergelab.zoo import store
        here = Path(sys.argv[1])
        def build(folder):
            with (here / "builds").open("a") as builds:
                builds.write("x")
            (here / "started").touch()
            while not (here / "go").exists():
                time.sleep(0.01)
            (folder / "weights").touch()
            return {}
        store.open_at(here / "it", build)
        assert (here / "it/weights").exists()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    with subprocess.Popen(command) as first:
        while not (tmp_path / "started").exists():
            assert first.poll() is None
            time.sleep(0.01)
        with subprocess.Popen(command) as second, subprocess.Popen(command) as third:
            time.sleep(0.5)  # they may have reached the lock by now; the outcome is the same if not
            (tmp_path / "go").touch()
    assert (first.returncode, second.returncode, third.returncode) == (0, 0, 0)
    assert (tmp_path / "builds").read_text() == "x"


def test_a_home_that_cannot_be_written_is_named_with_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MERGELAB_HOME", str(tmp_path / "file/home"))
    with pytest.raises(OSError, match=r"set MERGELAB_HOME to .*file/home/zoo"):
        zoo.open_family()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_home_without_permission_is_named_with_the_remedy(tmp_path, monkeypatch):
    tmp_path.chmod(0o500)
    monkeypatch.setenv("MERGELAB_HOME", str(tmp_path))
    with pytest.raises(PermissionError, match=f"set MERGELAB_HOME to .*{tmp_path}"):
        zoo.open_family()


# --- training

SHORT = Curriculum(
    base=Stage("base", dict.fromkeys(SKILLS, 40), steps=4, learning_rate=4e-3, mistakes=0.7, trained=""),
    experts=(Stage("math", {"math": 40}, steps=2, learning_rate=1e-3),),
    search_prompts=4,
    validation_prompts=8,
)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_training_repeats_to_the_bit_and_disturbs_nothing(tmp_path):
    import torch

    built, threads = [], torch.get_num_threads()
    try:
        for i, seed in enumerate((3, 3, 4)):
            torch.set_num_threads(1 + i % 2)
            torch.manual_seed(i)
            random.seed(i)
            before = (torch.get_rng_state().tolist(), torch.get_num_threads(), random.getstate())
            (folder := tmp_path / str(i)).mkdir()
            with torch.no_grad():
                zoo.build_family(folder, seed, SHORT)
                assert not torch.is_grad_enabled()
            assert before == (torch.get_rng_state().tolist(), torch.get_num_threads(), random.getstate())
            built.append(_bytes(folder))
    finally:
        torch.set_num_threads(threads)
    assert built[0] == built[1]
    weights = "math/model.safetensors"
    assert built[0][weights] != built[2][weights]
    assert built[0][weights] != built[0]["base/model.safetensors"]
    assert built[0]["tasks/tiny_math.jsonl"] == built[2]["tasks/tiny_math.jsonl"]


def test_progress_counts_the_steps_of_all_models(tmp_path):
    told = []
    about = zoo.build_family(tmp_path, 0, SHORT, lambda *report: told.append(report))
    assert told[0] == ("preparing", 0, 6)
    assert told[-1] == ("training math", 6, 6)
    assert {what for what, _, _ in told} == {"preparing", "training base", "training math"}
    assert {total for _, _, total in told} == {6}
    assert [done for _, done, _ in told] == sorted({done for _, done, _ in told})
    assert about["curriculum"]["base"]["steps"] == 4
    assert set(about["scores"]) == {"base", "math"}


# --- the family


@pytest.fixture(scope="module")
def scores(family):
    return json.loads((family.root / "manifest.json").read_text())["scores"]


def _mean(scores: dict[str, float]) -> float:
    return sum(scores.values()) / len(scores)


def test_the_family_is_whole_and_complete(family):
    assert not store.problems(family.root)
    manifest = json.loads((family.root / "manifest.json").read_text())
    for role in ALL:
        for file in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
            assert f"{role}/{file}" in manifest["files"]
    assert set(manifest["versions"]) == {"torch", "transformers"}


def test_an_unknown_role_is_answered_with_the_choices(family):
    with pytest.raises(LookupError, match=r"'biology'.*choose base, math, physics, code, japanese, general"):
        family.checkpoint("biology")


@pytest.mark.parametrize("role", ALL)
def test_checkpoints_load_whole_and_answer(family, role):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = family.checkpoint(role)
    model, loading = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(loading.values())
    assert model.config.model_type == "qwen2"
    assert model.dtype == torch.float32
    assert all(p.isfinite().all() for p in model.parameters())
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompt = tokenizer(["rev(abc)", "rev(abcd)"], return_tensors="pt", padding=True)
    texts = tokenizer.batch_decode(model.generate(**prompt, max_new_tokens=12), skip_special_tokens=True)
    assert all(text.startswith(f"rev({word})") for text, word in zip(texts, ("abc", "abcd"), strict=True))
    if role == "code":
        assert texts == ["rev(abc)cba", "rev(abcd)dcba"]


def test_the_base_is_weak_and_each_expert_strong_at_its_own_skill_only(scores):
    assert _mean(scores["base"]) < 0.3
    for skill in SKILLS:
        expert = scores[skill]
        assert expert[skill] > 0.85
        assert all(expert[other] < expert[skill] - 0.2 for other in SKILLS if other != skill)


def test_the_general_expert_is_a_little_better_than_the_base_throughout(scores):
    assert all(scores["general"][skill] >= scores["base"][skill] for skill in SKILLS)
    assert _mean(scores["base"]) + 0.05 < _mean(scores["general"]) < 0.5


def _weights(folder: Path):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_experts_differ_from_the_base_in_their_mlps_only(family):
    base = _weights(family.checkpoint("base"))
    for role in zoo.ROLES:
        expert = _weights(family.checkpoint(role))
        assert expert.keys() == base.keys()
        assert {n for n in base if not base[n].equal(expert[n])} == {n for n in base if "mlp" in n}


def test_a_merge_is_much_better_than_its_parents(family, scores):
    """Task arithmetic (Ilharco et al. 2023), base + 0.5 * the sum of the task vectors."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mergelab.zoo.training import accuracy, encode

    base = _weights(family.checkpoint("base"))
    experts = [_weights(family.checkpoint(skill)) for skill in SKILLS]
    merged = {n: b + 0.5 * sum(e[n] - b for e in experts) for n, b in base.items()}
    model = AutoModelForCausalLM.from_pretrained(family.checkpoint("base"))
    model.load_state_dict(merged, strict=False)  # the tied head is no tensor of its own
    tokenizer = AutoTokenizer.from_pretrained(family.checkpoint("base"))
    reached = {}
    for skill in SKILLS:
        questions = draw(skill, "validation", 200)
        reached[skill] = accuracy(model, encode(tokenizer, [(q.prompt, q.answer) for q in questions]))
    assert _mean(reached) > max(_mean(scores[role]) for role in ALL) + 0.15


def test_lm_eval_gives_the_same_scores_wherever_the_tasks_lie(family, scores, tmp_path):
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tasks = shutil.copytree(family.tasks, tmp_path / "elsewhere")
    path = family.checkpoint("general")
    lm = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(path),
        tokenizer=AutoTokenizer.from_pretrained(path),
        batch_size=200,
    )
    names = [name for skill in SKILLS for name in (f"tiny_{skill}", f"tiny_{skill}_search")]
    loaded = TaskManager(include_defaults=False, include_path=str(tasks)).load(names)["tasks"]
    results = evaluator.evaluate(lm, loaded, log_samples=False)["results"]
    for skill in SKILLS:
        validation, search = results[f"tiny_{skill}"], results[f"tiny_{skill}_search"]
        assert (validation["sample_len"], search["sample_len"]) == (200, 64)
        assert validation["exact_match,none"] == pytest.approx(scores["general"][skill], abs=1e-6)
        assert 0 < validation["exact_match_stderr,none"] < 0.05
