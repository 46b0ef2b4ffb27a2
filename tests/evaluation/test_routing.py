"""Where a mixture sends the tokens of each task: against the routers themselves, and as a user sees it."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_tasks import write_task

from mergelab.core.errors import StepError
from mergelab.core.library_output import silence_libraries
from mergelab.evaluation import Evaluator, Measure, load, routing
from mergelab.report import routing as report
from mergelab.schema import Evaluation, Hardware
from mergelab.zoo.skills import SKILLS, draw

HARDWARE = Hardware(threads=1)
ONE_LENGTH = {"digits": ["123+4=", "998+1=", "555+2="], "letters": ["rev(a)", "abcdef", "xyzxyz"]}
LENGTHS = {"digits": ["1", "123+4=56", "99+1"], "letters": ["rev(abc)", "z", "some more words", "あい>"]}


def mixture(
    folder: Path, base: Path, experts: Sequence[Path], prompts: Mapping[str, Sequence[str]], *,
    gate: str = "hidden", per_token: int = 1, shared: bool = True, seed: int = 0,
) -> Path:  # fmt: skip
    """A mixture, made by mergekit, whose folder has its recipe as `mergekit-moe` would leave it."""
    from mergekit.merge import MergeOptions
    from mergekit.moe.config import MoEMergeConfig
    from mergekit.scripts.moe import build

    recipe: dict[str, Any] = {
        "base_model": str(base),
        "gate_mode": gate,
        "dtype": "float32",
        "experts_per_token": per_token,
        "experts": [
            {"source_model": str(path), "positive_prompts": list(own)}
            for path, own in zip(experts, prompts.values(), strict=True)
        ],
    }
    if shared:  # a Qwen2Moe has one, which adds nothing at this scale
        own = {"source_model": str(base), "residual_scale": 0.0, "positive_prompts": ["a"]}
        recipe |= {"architecture": "qwen", "shared_experts": [own]}
    folder.mkdir(parents=True)
    with silence_libraries(), torch.random.fork_rng():
        torch.manual_seed(seed)
        build(
            MoEMergeConfig.model_validate(recipe), str(folder), MergeOptions(quiet=True, copy_tokenizer=True)
        )
    (folder / "mergekit_moe_config.yml").write_text(json.dumps(recipe), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def asked() -> dict[str, list[str]]:
    """Prompts by which gates know the skills: of the training split, up to various places in the answer."""
    return {
        skill: [
            q.prompt + q.answer[: n % (len(q.answer) + 1)] for n, q in enumerate(draw(skill, "train", 16, 7))
        ]
        for skill in SKILLS
    }


@pytest.fixture(scope="module")
def skilled(
    family: Any, asked: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A mixture of the tiny family's experts by its gates, made once."""
    folder = tmp_path_factory.mktemp("mixtures")

    def make(gate: str, seed: int = 0) -> Path:
        out = folder / f"{gate}{seed}"
        experts = [family.checkpoint(skill) for skill in SKILLS]
        return (
            out
            if out.exists()
            else mixture(out, family.checkpoint("base"), experts, asked, gate=gate, seed=seed)
        )

    return make


@pytest.fixture(scope="module")
def kinds(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random mixture of each architecture, two experts of four for a token."""
    folder = tmp_path_factory.mktemp("kinds")
    prompts = dict(zip(SKILLS, (["12+3"], ["abc("], ["あ>"], ["km>m:"]), strict=True))
    out = {}
    for kind, dense in {"qwen2_moe": "qwen2", "mixtral": "llama", "qwen3_moe": "qwen3"}.items():
        models = [make_model(folder / f"{dense}{n}", dense, seed=n) for n in range(5)]
        made = mixture(
            folder / kind, models[0], models[1:], prompts,
            gate="random", per_token=2, shared=kind == "qwen2_moe",
        )  # fmt: skip
        out[kind] = made
    unnormalised = shutil.copytree(out["qwen3_moe"], folder / "unnormalised")
    change_config(unnormalised, norm_topk_prob=False)
    return out | {"unnormalised": unnormalised}


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes), encoding="utf-8")


def followed(folder: Path, prompts: Mapping[str, Sequence[str]], batch_size: int = 16) -> routing.Routing:
    return routing.follow(*load(folder, HARDWARE), prompts, SKILLS, hardware=HARDWARE, batch_size=batch_size)


@pytest.mark.parametrize("kind", ["qwen2_moe", "mixtral", "qwen3_moe", "unnormalised"])
def test_shares_and_weights_are_those_of_the_routers(kinds: dict[str, Path], kind: str) -> None:
    found = followed(kinds[kind], ONE_LENGTH)
    model, tokenizer = load(kinds[kind], HARDWARE)
    seen: list[tuple[Any, Any]] = []  # what goes into each layer's router, and what comes out for the experts
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
    assert found.layers == [0, 1, 2] and found.shares.shape == found.weights.shape == (2, 3, 4)
    for t, prompts in enumerate(ONE_LENGTH.values()):
        seen.clear()
        with torch.no_grad():
            model(tokenizer(prompts, return_tensors="pt")["input_ids"])
        for i, (hidden, (_, scores, indices)) in enumerate(seen):
            p = (hidden.reshape(-1, 32) @ model.model.layers[i].mlp.gate.weight.T).softmax(-1)
            places = p.argsort(-1, descending=True)[:, :2]
            weights = p.gather(1, places)
            if kind != "unnormalised":
                weights = weights / weights.sum(-1, keepdim=True)
            assert (indices == places).all() and torch.allclose(scores, weights)
            assert found.tokens[found.task == t].sum() == len(p)
            for e in range(4):
                mine = places == e
                assert found.shares[t, i, e] == pytest.approx(mine.sum().item() / mine.numel())
                assert found.weights[t, i, e] == pytest.approx(
                    (weights * mine).sum().item() / len(p), rel=1e-4
                )
    assert np.allclose(found.shares.sum(-1), 1)
    total = found.weights.sum(-1)
    assert (total < 1 - 1e-4).all() if kind == "unnormalised" else np.allclose(total, 1)


@pytest.mark.parametrize("kind", ["qwen2_moe", "mixtral", "qwen3_moe"])
def test_padding_is_not_counted(kinds: dict[str, Path], kind: str) -> None:
    single, padded = (
        followed(kinds[kind], LENGTHS, batch_size=1),
        followed(kinds[kind], LENGTHS, batch_size=5),
    )
    lengths = {
        len(ids)
        for ids in load(kinds[kind], HARDWARE)[1]([*LENGTHS["digits"], *LENGTHS["letters"]])["input_ids"]
    }
    assert len(lengths) > 3
    assert np.allclose(single.shares, padded.shares) and np.allclose(
        single.weights, padded.weights, rtol=1e-4
    )
    assert (single.chosen.sum(-1) == 2 * single.tokens[:, None]).all()


def test_layers_without_experts_keep_their_numbers(make_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_model(
        tmp_path / "m", "qwen3_moe", num_experts=4, num_experts_per_tok=1, moe_intermediate_size=16,
        num_hidden_layers=5, mlp_only_layers=[1], decoder_sparse_step=2,
    )  # fmt: skip
    found = followed(folder, ONE_LENGTH)
    assert found.layers == [3] and found.shares.shape == (2, 1, 4)


def test_of_a_prompt_longer_than_the_context_its_end_is_followed(kinds: dict[str, Path]) -> None:
    model, tokenizer = load(kinds["mixtral"], HARDWARE)

    def follow(text: str, **options: Any) -> routing.Routing:
        return routing.follow(
            model, tokenizer, {"t": [text]}, SKILLS, hardware=HARDWARE, batch_size=4, **options
        )

    assert follow("abc" * 99).tokens.tolist() == [64]
    assert follow("xyzabc", max_length=3).tokens.tolist() == [3]
    assert np.allclose(follow("xyzabc", max_length=3).weights, follow("abc").weights)
    with pytest.raises(StepError, match="the prompts of t have no tokens"):
        follow("")


def at(shares: Any, per_token: int = 1, prompts: int = 20) -> routing.Routing:
    """Routing in one layer with exactly these shares (tasks, experts), the same in each of some prompts."""
    shares = np.asarray(shares, float)
    chosen = np.repeat(shares, prompts, 0)[:, None] * 60 * per_token
    task = np.repeat(np.arange(len(shares)), prompts)
    names = [*SKILLS, "math 2"][: shares.shape[1]]
    return routing.Routing(
        names,
        list(SKILLS[: len(shares)]),
        [0],
        per_token,
        task,
        np.full(len(task), 60.0),
        chosen,
        chosen / per_token,
    )


def test_information_is_the_mutual_information_of_task_and_expert() -> None:
    alike, apart = np.full((4, 1, 4), 0.25), np.eye(4)[:, None]
    assert routing.information(alike) == pytest.approx(0)
    assert routing.information(apart) == pytest.approx(2)
    assert routing.information(np.concatenate([alike, apart], 1)) == pytest.approx(1)
    mixed = [[0.6, 0.4], [0.1, 0.9]]
    joint = np.array(mixed) / 2
    by_hand = sum(p * math.log2(p / 0.5 / q) for row in joint for p, q in zip(row, joint.sum(0), strict=True))
    assert routing.information(np.array(mixed)[:, None]) == pytest.approx(by_hand)


def test_the_most_that_can_be_told_depends_on_how_many_experts_a_token_goes_to() -> None:
    best = at([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], per_token=2).summary()["information"]
    assert (best["bits"], best["at_most"], best["nothing"]) == (pytest.approx(1), 1, False)
    cyclic = [[0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0.5, 0.5], [0.5, 0, 0, 0.5]]
    assert at(cyclic, per_token=2).summary()["information"]["bits"] == pytest.approx(1)
    assert at(np.eye(4)).summary()["information"]["at_most"] == 2
    assert at(np.full((3, 4), 0.25)).summary()["information"]["at_most"] == pytest.approx(math.log2(3))


def test_where_a_token_goes_to_every_expert_their_weights_are_told() -> None:
    found = at([[0.5, 0.5], [0.5, 0.5]], per_token=2)
    found = replace(found, weight=np.repeat([[[0.9 * 60, 0.1 * 60]], [[0.1 * 60, 0.9 * 60]]], 20, 0))
    told = found.summary() | {"prompts_of": "tasks"}
    assert told["information"]["bits"] == pytest.approx(1 + 0.9 * math.log2(0.9) + 0.1 * math.log2(0.1))
    assert told["information"]["at_most"] == 1 and told["own"]["share"] == pytest.approx(0.9)
    assert [[c.strip() for c in row] for row in report.rows(told)[1]] == [
        ["math", "0.90 *", "0.10"], ["physics", "0.10", "0.90 *"],
    ]  # fmt: skip


def test_what_noise_can_do_is_no_information() -> None:
    rng = np.random.default_rng(1)
    noisy = at(np.full((4, 4), 0.25), prompts=8)
    noisy = replace(noisy, chosen=rng.multinomial(60, [0.25] * 4, size=(32, 1)).astype(float))
    told = noisy.summary()
    assert told["information"]["nothing"] and 0 < told["information"]["bits"] < 0.02
    tilted = at(
        [[0.4, 0.2, 0.2, 0.2], [0.2, 0.4, 0.2, 0.2], [0.2, 0.2, 0.4, 0.2], [0.2, 0.2, 0.2, 0.4]], prompts=8
    )
    chosen = np.stack([rng.multinomial(60, p / p.sum()) for p in tilted.chosen[:, 0]])[:, None].astype(float)
    assert not replace(tilted, chosen=chosen).summary()["information"]["nothing"]


def test_experts_of_one_model_are_both_its_tasks_own() -> None:
    told = at([[0.3, 0.1, 0.1, 0.1, 0.4], [0.1, 0.6, 0.1, 0.1, 0.1]]).summary()
    assert told["tasks"]["math"]["own"] == ["math", "math 2"] and told["tasks"]["physics"]["own"] == [
        "physics"
    ]
    assert told["own"] == {
        "share": pytest.approx((0.7 + 0.6) / 2),
        "even": pytest.approx((2 / 5 + 1 / 5) / 2),
    }
    assert report.rows(told)[1][0][-1] == "0.40 *"


def test_gates_that_mistake_the_experts_are_doubted_too() -> None:
    turned = at(np.roll(np.eye(4), 1, axis=1)).summary()
    assert turned["information"]["bits"] == pytest.approx(2)
    assert "do not know the experts" in report.doubt(turned)
    assert report.doubt(at(np.eye(4)).summary()) == ""
    assert report.line(at([[0.5, 0.5]]).summary()) == "1 task on 2 experts"


def test_of_many_experts_the_table_shows_those_that_get_the_most() -> None:
    shares = np.full(128, 0.4 / 125)
    shares[[7, 90, 3]] = 0.3, 0.2, 0.1
    names = [f"expert {i}" for i in range(128)]
    found = {
        "experts": names, "per_token": 1,
        "tasks": {"gsm8k": {"own": [], "shares": dict(zip(names, shares, strict=True))}},
    }  # fmt: skip
    heads, body = report.rows(found)
    assert len(heads) == 4 and body == [["gsm8k", "expert 7 0.30", "expert 90 0.20", "expert 3 0.10"]]


def test_hidden_gates_know_the_skills_better_than_random_ones(
    skilled: Callable[..., Path], asked: dict[str, list[str]]
) -> None:
    new = {skill: [q.prompt for q in draw(skill, "validation", 32)] for skill in SKILLS}
    for prompts in (asked, new):
        hidden = followed(skilled("hidden"), prompts).summary()
        assert not hidden["information"]["nothing"] and report.doubt(hidden) == ""
        for seed in (0, 1):
            random = followed(skilled("random", seed), prompts).summary()
            assert hidden["information"]["bits"] > random["information"]["bits"]
            assert hidden["own"]["share"] > random["own"]["share"]


def evaluator(tasks: Path, **settings: Any) -> Evaluator:
    return Evaluator(Evaluation(kind="tasks", **settings), hardware=HARDWARE, tasks_path=tasks)


@pytest.mark.parametrize("settings", [{}, {"num_fewshot": 2}, {"chat_template": True}, {"limit": 3}], ids=str)
def test_prompts_are_those_that_the_model_is_asked(
    tmp_path: Path, kinds: dict[str, Path], monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    from mergelab.evaluation.lm_eval_adapter import CountingLM

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    seen: list[str] = []
    answer = CountingLM.generate_until

    def noting(self: Any, requests: Any, **options: Any) -> Any:
        seen.extend(r.args[0] for r in requests)
        return answer(self, requests, **options)

    monkeypatch.setattr(CountingLM, "generate_until", noting)
    rows = [{"prompt": f"{n}+1=", "answer": f"{n + 1}"} for n in range(9)]
    task = write_task(tmp_path / "tasks", "sums", rows)
    model, tokenizer = load(kinds["mixtral"], HARDWARE)
    tokenizer.chat_template = "{% for m in messages %}<{{m.role[0]}}>{{m.content}}{% endfor %}!"
    bench = evaluator(tmp_path / "tasks", **settings)
    measures = [Measure("sums", task)]
    found = bench.prompts(model, tokenizer, measures, most=5)["sums"]
    bench.score(model, tokenizer, measures)
    assert found == seen[:5] and len(found) == settings.get("limit", 5)
    assert ("<u>" in found[0]) == settings.get("chat_template", False)
    assert not any(
        f"{row['prompt']}{row['answer']}" in text.splitlines()[-1]
        for row, text in zip(rows, found, strict=False)
    )


def test_a_choice_of_answers_is_one_prompt_and_a_group_shares_out_its_number(
    tmp_path: Path, kinds: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "tasks"
    for name in ("left", "right"):
        write_task(
            folder, name, [{"prompt": f"{name} {n}", "answer": 0} for n in range(9)],
            output_type="multiple_choice", doc_to_target="{{answer}}", doc_to_choice=["yes", "no"],
            generation_kwargs=None,
            metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        )  # fmt: skip
    group = {"group": "both", "task": ["left", "right"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "both.yaml").write_text(json.dumps(group), encoding="utf-8")
    measures = [Measure("left", "left"), Measure("both", "both")]
    found = evaluator(folder).prompts(*load(kinds["mixtral"], HARDWARE), measures, most=4)
    assert found == {
        "left": ["left 0", "left 1", "left 2", "left 3"], "both": ["left 0", "left 1", "right 0", "right 1"],
    }  # fmt: skip


# ---------------------------------------------------------------- as a user sees it


def evaluate(mergelab: Callable[..., Any], path: Path, *more: str) -> Any:
    return mergelab("job=evaluate", f"evaluate.path={path}", "eval.baselines=false", *more)


def test_the_step_leaves_a_table_numbers_and_a_picture(
    mergelab: Callable[..., Any], skilled: Callable[..., Path]
) -> None:
    from matplotlib.image import imread

    done = evaluate(mergelab, skilled("hidden"), "eval.limit=24")
    assert done.status == 0, done.err
    told = done.result["routing"]
    assert told["experts"] == list(SKILLS) == list(told["tasks"]) and told["prompts_of"] == "tasks"
    assert (told["per_token"], told["layers"]) == (1, 2)
    assert all(of["prompts"] == 24 and of["tokens"] > 24 for of in told["tasks"].values())
    assert f"4 tasks on 4 experts, {told['information']['bits']:.2g} of 2 bits" in done.out
    assert "routing: share of tokens by expert" in done.out and "prompts of each task: 24" in done.out
    math = next(line for line in done.out.splitlines() if line.startswith("math "))
    assert math.split()[1:3] == [f"{told['tasks']['math']['shares']['math']:.2f}", "*"]
    assert "the gates do" not in done.out
    with (done.folder / "report" / "routing.csv").open(encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ["task", "layer", "expert", "share", "weight"] and len(rows) == 4 * 2 * 4
    for task, of in told["tasks"].items():
        for measure in ("share", "weight"):
            layers = [[float(r[measure]) for r in rows if (r["task"], r["layer"]) == (task, n)] for n in "01"]
            assert [sum(own) for own in layers] == pytest.approx([1, 1], abs=1e-4)
            assert np.mean(layers, 0) == pytest.approx([of[f"{measure}s"][e] for e in SKILLS], abs=1e-4)
    picture = imread(done.folder / "report" / "routing.png")
    assert (
        picture.shape[0] > 200
        and picture.shape[1] > 600
        and len(np.unique(picture.reshape(-1, 4), axis=0)) > 50
    )
    assert not list((done.folder / "report").glob(".*"))


def test_gates_that_are_all_the_same_are_told_to_do_nothing(
    mergelab: Callable[..., Any], skilled: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(skilled("hidden"), tmp_path / "same")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in [n for n in tensors if n.endswith(".gate.weight")]:
        tensors[name] = tensors[name][:1].expand_as(tensors[name]).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    done = evaluate(mergelab, folder, "eval.limit=24")
    assert done.status == 0, done.err
    assert done.result["routing"]["information"]["bits"] < 0.01
    assert "! the gates do nothing that 24 prompts of a task could show" in done.out


def test_without_tasks_the_experts_own_prompts_are_followed(
    mergelab: Callable[..., Any], skilled: Callable[..., Path], tmp_path: Path
) -> None:
    done = evaluate(mergelab, skilled("hidden"), "eval=none")
    told = done.result["routing"]
    assert told["prompts_of"] == "gates" and told["tasks"]["math"]["prompts"] == 16
    assert "prompts that were given to the gates, of each expert: 16" in done.out
    assert "whose gates are random" in report.words(told | {"prompts_of": "recipe"})[0]
    bare = shutil.copytree(skilled("hidden"), tmp_path / "bare")
    (bare / "mergekit_moe_config.yml").unlink()
    done = evaluate(mergelab, bare, "eval=none")
    assert done.status == 0 and "routing" not in done.result and "routing" not in done.out
    done = evaluate(mergelab, bare, "eval.limit=4")
    assert done.result["routing"]["experts"] == ["expert 0", "expert 1", "expert 2", "expert 3"]


def test_experts_have_the_names_that_the_run_gave_them(mergelab: Callable[..., Any]) -> None:
    made = mergelab(
        "method=moe", "experts=math_code", "eval=none", 'experts.more={path: "zoo:math", prompts: ["1+1="]}'
    )
    assert made.status == 0, made.err
    assert list(made.result["routing"]["tasks"]) == ["math", "code", "more"]
    for path in (made.folder, made.folder / "model"):
        done = evaluate(mergelab, path, "eval.limit=4")
        assert done.result["routing"]["experts"] == ["math", "code", "more"]


def test_a_model_that_occurs_again_has_a_number() -> None:
    from mergelab.core.plan_file import PlannedModel
    from mergelab.steps.routing import _names

    models = [
        PlannedModel(n, r, None, None, None, None, f"/m/{r}")
        for n, r in (("base", "b"), ("math", "x"), ("own", "b"))
    ]
    assert _names(["/m/x", "/m/b", "/m/x", "org/new", "/m/x", "org/new"], models) == [
        "math", "own", "math 2", "new", "math 3", "new 2",
    ]  # fmt: skip


def test_dense_models_have_no_such_step(mergelab: Callable[..., Any], family: Any) -> None:
    done = evaluate(mergelab, family.checkpoint("math"), "eval.limit=4")
    assert done.status == 0 and "routing" not in done.result and "routing" not in done.out
    done = mergelab("method=linear", "experts=math_code", "eval=none")
    assert done.status == 0 and "routing" not in done.out and not (done.folder / "report").exists()


def test_a_mixture_of_another_kind_is_left_alone_in_words(
    mergelab: Callable[..., Any], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "m", "olmoe", num_experts=4, num_experts_per_tok=2)
    done = evaluate(mergelab, folder, "eval.limit=2")
    assert done.status == 0, done.err
    assert "not supported for olmoe, only for mixtral, qwen2_moe, qwen3_moe" in done.out
    assert "routing" not in done.result


@pytest.mark.parametrize(("layers", "experts"), [(2, 4), (48, 8), (64, 128)])
def test_in_the_picture_every_word_has_its_place(layers: int, experts: int) -> None:
    from matplotlib.text import Text

    from mergelab.report import pictures

    names = [f"expert {n}" for n in range(experts)]
    tasks = {f"a task's name {t}": {"own": names[t : t + 1]} for t in range(5)}
    found = {"experts": names, "per_token": 2, "own": True, "tasks": tasks}
    drawn: list[Any] = []

    def draw(*arguments: Any) -> Any:
        drawn.append(report.draw(*arguments))
        return drawn[0]

    even = np.full((5, layers, experts), 1 / experts)
    pictures.picture(draw, found, range(layers), even, lambda text, limit=26: text)
    texts = [t for t in drawn[0].findobj(Text) if t.get_visible() and t.get_text()]
    boxes = [t.get_window_extent() for t in texts if t.axes is None or t.axes.get_visible()]
    assert len(boxes) > 5 + min(experts, 16)
    width, height = drawn[0].bbox.size
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        assert not any(box.overlaps(other) for other in boxes[:i])
