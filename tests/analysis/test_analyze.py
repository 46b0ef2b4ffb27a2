"""job=analyze and the distances of job=check, as a user has them: tables, files, pictures, landscapes."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composing import composed
from conftest import Command, Outcome
from PIL import Image
from safetensors.torch import save_file
from weights import change

from mergelab import context, evaluation
from mergelab.analysis import distance, streaming
from mergelab.analysis.landscape import overrides
from mergelab.analysis.parameter_groups import Comparison
from mergelab.analysis.statistics import Statistics
from mergelab.models import checkpoint
from mergelab.report.analysis import files, style
from mergelab.report.analysis.data import Land
from mergelab.schema import Hardware

ROLES = ("math", "physics", "code", "japanese")
PICTURES = {"similarity.png", "by_layer.png", "by_kind.png", "agreement.png"}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def drawn(path: Path) -> Image.Image:
    """A picture that shows something: large enough, and neither empty nor of few colours."""
    image = Image.open(path)
    assert min(image.size) >= 280, (path.name, image.size)
    pixels = np.asarray(image.convert("RGB"))[::3, ::3].reshape(-1, 3)
    assert len({tuple(p) for p in pixels.tolist()}) > 50, path.name
    assert 0.01 < (pixels.min(axis=1) < 250).mean() < 0.95, path.name
    return image


@pytest.fixture(scope="module")
def compared(family: Any) -> Comparison:
    """The tiny family as the library has it."""
    base, *experts = (checkpoint.weights(family.checkpoint(r)) for r in ("base", *ROLES))
    return streaming.compare(base, dict(zip(ROLES, experts, strict=True)), hardware=Hardware(), top=0.1)


def value(text: str) -> float:
    return float(text) if text else math.nan


# ---------------------------------------------------------------- job=check


def test_check_shows_how_far_experts_are_from_their_base(mergelab: Command, compared: Comparison) -> None:
    out = mergelab("job=check")
    assert out.status == 0, out.err
    assert "5 models fit together" in out.out and "!" not in out.out
    found = compared.matrices
    for i, role in enumerate(ROLES):
        line = f"{found.whole.cosine_to_base[i]:.4f}  {found.whole.relative_norm[i]:.3f}"
        assert any(text.startswith(role) and line in text for text in out.out.splitlines()), line
    recorded = out.result["distance"]
    assert recorded == json.loads(json.dumps(distance.record(compared)))
    assert list(recorded) == ["whole", "embeddings", "layer 0", "layer 1"]
    assert recorded["whole"]["cosine"]["math"]["code"] == pytest.approx(found.whole.cosine[0, 2])


def models(sound: Path, **more: Path) -> list[str]:
    """Arguments that compose random models of the same architecture."""
    base, *experts = ({n: sound / n for n in ("base", "math", "physics")} | more).values()
    named = zip(("math", "physics"), experts, strict=True)
    return [
        f"model.base.path={base}", *(f"experts.{n}.path={p}" for n, p in named), "~experts.code",
        "~experts.japanese",
    ]  # fmt: skip


def test_check_warns_of_a_model_that_is_no_fine_tune(mergelab: Command, sound: Path) -> None:
    out = mergelab("job=check", *models(sound))
    assert out.status == 0, out.err
    for role in ("math", "physics"):
        far = out.result["distance"]["whole"]["relative_norm"][role]
        assert 1.3 < far < 1.5
        assert (
            f"! experts.{role}: it is not a fine-tune of this base: its matrices differ by {far:.2f}"
            in out.out
        )


def test_check_warns_of_a_wrong_base(mergelab: Command, sound: Path, make_model: Any, tmp_path: Path) -> None:
    physics = make_model(tmp_path / "physics", seed=1)
    change(physics, lambda tensors: [t.mul_(1.01) for t in tensors.values()])
    out = mergelab("job=check", *models(sound, physics=physics))
    assert out.status == 0, out.err
    assert "! model.base: it is not the base of these experts" in out.out
    out = mergelab("job=check", *models(sound, base=sound / "math", math=physics, physics=sound / "math"))
    assert "model.base" in out.err and out.status == 2  # the base as its own expert: preflight says so


def test_what_is_wrong_with_the_headers_is_told_before_weights_are_read(
    mergelab: Command, sound: Path, make_model: Any, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", seed=1, intermediate_size=64)
    out = mergelab("job=check", *models(sound, math=other))
    assert out.status == 2 and "intermediate_size" in out.err
    assert "distance" not in out.out and "distance" not in out.result


def test_check_without_weights(mergelab: Command) -> None:
    out = mergelab("job=check", "check.distance=false")
    assert out.status == 0 and "5 models fit together" in out.out
    assert "distance" not in out.out and "distance" not in out.result


def test_a_recipe_without_a_base_has_no_distances(mergelab: Command, sound: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "my.yaml"
    recipe.write_text(
        f"merge_method: linear\nmodels:\n- {{model: {sound}/math, parameters: {{weight: 1}}}}\n"
        f"- {{model: {sound}/physics, parameters: {{weight: 1}}}}\n"
    )
    out = mergelab("job=check", "method=mergekit", f"method.path={recipe}")
    assert out.status == 0, out.err
    assert "distances are those of experts from their base" in out.out and "distance" not in out.result


def lora(folder: Path) -> Path:
    """A LoRA for the tiny family's base."""
    folder.mkdir()
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(about | {"task_type": "CAUSAL_LM"}))
    place = "base_model.model.model.layers.{}.mlp.down_proj.lora_{}.weight"
    shapes = {"A": (2, 192), "B": (64, 2)}
    made = {place.format(i, n): torch.ones(s) for i in range(2) for n, s in shapes.items()}
    save_file(made, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def test_adapters_are_left_out_and_named(mergelab: Command, family: Any, tmp_path: Path) -> None:
    path = f"experts.math.path={family.checkpoint('base')}+{lora(tmp_path / 'lora')}"
    out = mergelab("job=check", "experts=math_code", path)
    assert out.status == 0, out.err
    assert "left out because they have an adapter: math" in out.out
    assert list(out.result["distance"]["whole"]["relative_norm"]) == ["code"]
    out = mergelab("job=analyze", "experts=math_code", path, "analyze.models=[math,code]")
    assert out.status == 2 and "analyze.models: math has an adapter" in out.err
    out = mergelab("job=analyze", "experts=math_code", "~experts.code", path)
    assert out.status == 0 and "there is no such pair" in out.out and "landscape" not in out.result


# ---------------------------------------------------------------- job=analyze


SHORT = ("eval.limit=16", "analyze.points=3")


@pytest.fixture(scope="module")
def plane(family: Any, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The analysis of the tiny family with a short plane, once."""
    from mergelab.cli.main import main

    folder, out, err = tmp_path_factory.mktemp("plane") / "run", io.StringIO(), io.StringIO()
    status: Any = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr("sys.argv", ["mergelab", "job=analyze", *SHORT, f"hydra.run.dir={folder}"])
        try:
            main()
        except SystemExit as e:
            status = e.code or 0
    assert status == 0, out.getvalue() + err.getvalue()
    return Outcome(status, out.getvalue(), err.getvalue(), folder)


@pytest.fixture
def only_landscapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn of similarities takes as long as a small landscape, and is looked at elsewhere."""
    monkeypatch.setattr(files, "similarity", lambda folder, compared: {})


def test_the_csv_has_the_numbers_that_were_computed(plane: Outcome, compared: Comparison) -> None:
    parts = {("whole", ""): compared.whole}
    for level, own in (("group", compared.groups), ("layer", compared.layers), ("kind", compared.kinds),
                       ("tensor", compared.tensors)):  # fmt: skip
        parts |= {(level, str(name)): sums for name, sums in own.items()}
    found = rows(plane.folder / "report" / "similarity.csv")
    assert len(found) == 6 * len(parts)
    for line in found:
        sums = parts[line["level"], line["part"]]
        i, j = ROLES.index(line["one"]), ROLES.index(line["other"])
        assert int(line["entries"]) == sums.entries
        for column, matrix in (("cosine", sums.cosine), ("sign agreement", sums.agreement),
                               ("overlap", sums.overlap),
                               ("chance overlap", sums.overlap_by_chance)):  # fmt: skip
            assert value(line[column]) == pytest.approx(matrix[i, j], abs=1e-12, nan_ok=True)
    parts["matrices", ""] = compared.matrices.whole
    found = rows(plane.folder / "report" / "distance.csv")
    assert len(found) == 4 * len(parts)
    for line in found:
        sums, i = parts[line["level"], line["part"]], ROLES.index(line["expert"])
        assert value(line["relative norm"]) == pytest.approx(sums.relative_norm[i], abs=1e-12)
        assert value(line["cosine with base"]) == pytest.approx(sums.cosine_to_base[i], abs=1e-12)


def test_the_tables_show_them_too(plane: Outcome, compared: Comparison) -> None:
    text = plane.out
    for title in ("cosine of task vectors", "sign agreement (by chance 0.5)",
                  "overlap of the largest 10 % (by chance 0.10)"):  # fmt: skip
        assert title in text
    whole = compared.whole
    for matrix in (whole.cosine, whole.agreement, whole.overlap):
        assert text.count(f"{matrix[2, 3]:.3f}") >= 2


def test_every_picture_shows_something(plane: Outcome) -> None:
    report = plane.folder / "report"
    assert {f.name for f in report.glob("*.png")} == PICTURES | {"landscape.png"}
    sizes = {f.name: drawn(f).size for f in report.glob("*.png")}
    assert sizes["landscape.png"][0] > 1000 and sizes["by_layer.png"][0] > 1000


def test_the_corners_of_the_landscape_are_the_models_themselves(plane: Outcome, family: Any) -> None:
    run = composed("job=analyze", *SHORT)
    wanted = evaluation.measures(run, "search")
    corners = plane.result["landscape"]["models"]
    assert list(corners) == ["base", "math", "physics"] and plane.result["landscape"]["split"] == "search"
    for name, corner in corners.items():
        own = context.evaluator(run).evaluate(family.checkpoint(name), wanted)
        assert {n: s["value"] for n, s in corner["scores"].items()} == {n: s.value for n, s in own.items()}
        assert corner["fitness"] == evaluation.fitness(own, wanted)
        assert corner["weights"] == {n: float(n == name) for n in ("math", "physics")}


def test_the_landscape_is_recorded_point_by_point(plane: Outcome, compared: Comparison) -> None:
    found, told = rows(plane.folder / "report" / "landscape.csv"), plane.result["landscape"]
    assert len(found) == told["points"] == 9 + 3
    best = max(found, key=lambda line: float(line["fitness"]))
    assert (
        float(best["fitness"]) == told["best"]["fitness"] > max(m["fitness"] for m in told["models"].values())
    )
    for line in found:
        scores = [float(line[f"score.{r}"]) for r in ROLES]
        assert float(line["fitness"]) == pytest.approx(sum(scores) / 4)
        # Where it lies is how far it is from the base.
        weights = np.array([float(line["weight.math"]), float(line["weight.physics"]), 0, 0])
        far = math.sqrt(weights @ compared.whole.dots[1:, 1:] @ weights / compared.whole.dots[0, 0])
        assert math.hypot(float(line["x"]), float(line["y"])) == pytest.approx(far)
    events = [json.loads(e) for e in (plane.folder / "events.jsonl").read_text().splitlines()]
    assert [e["fitness"] for e in events if e["event"] == "point"] == [float(f["fitness"]) for f in found]


def command_of(outcome: Outcome) -> list[str]:
    (line,) = (x for x in outcome.out.splitlines() if x.strip().startswith("python -m mergelab"))
    return shlex.split(line)[3:]


def test_the_command_that_is_printed_makes_the_best_model(plane: Outcome, mergelab: Command) -> None:
    arguments, told = command_of(plane), plane.result["landscape"]
    assert arguments == told["overrides"] and "method=task_arithmetic" in arguments
    out = mergelab(*arguments, "eval.baselines=false")
    assert out.status == 0, out.err
    assert out.result["fitness"] == {"value": told["best"]["fitness"], "split": "search"}
    scores = {n: s["value"] for n, s in out.result["metrics"]["merged"]["search"].items()}
    assert scores == {n: s["value"] for n, s in told["best"]["scores"].items()}


@pytest.mark.usefixtures("only_landscapes")
def test_two_experts_span_a_line(mergelab: Command) -> None:
    out = mergelab(
        "job=analyze", "experts=math_code", "eval.limit=8", "analyze.points=3", "analyze.margin=0.5"
    )
    assert out.status == 0, out.err
    found = rows(out.folder / "report" / "landscape.csv")
    assert [float(x["at.code"]) for x in found] == [-0.5, 0.0, 0.5, 1.0, 1.5]
    for line in found:
        assert float(line["weight.math"]) + float(line["weight.code"]) == pytest.approx(1)
        assert float(line["y"]) == 0
    drawn(out.folder / "report" / "landscape.png")
    assert "best of the line through math, code" in out.out
    again = mergelab(*command_of(out), "eval.baselines=false")
    assert again.result["fitness"]["value"] == out.result["landscape"]["best"]["fitness"]


def test_one_expert_and_its_base_span_a_line(mergelab: Command) -> None:
    out = mergelab("job=analyze", "experts=single_math", "eval.limit=4", "analyze.points=3")
    assert out.status == 0, out.err
    assert list(out.result["landscape"]["models"]) == ["base", "math"]
    assert {f.name for f in (out.folder / "report").iterdir()} == {
        "by_layer.png", "distance.csv", "landscape.csv", "landscape.png",
    }  # fmt: skip
    assert "cosine of task vectors" not in out.out


@pytest.mark.usefixtures("only_landscapes")
def test_three_experts_span_a_plane(mergelab: Command) -> None:
    out = mergelab("job=analyze", "analyze.models=[code,japanese,math]", "eval.limit=2", "analyze.points=3")
    assert out.status == 0, out.err
    found = rows(out.folder / "report" / "landscape.csv")
    assert all(
        sum(float(x[f"weight.{r}"]) for r in ("code", "japanese", "math")) == pytest.approx(1) for x in found
    )
    assert list(out.result["landscape"]["models"]) == ["code", "japanese", "math"]


@pytest.mark.usefixtures("only_landscapes")
def test_a_text_of_which_less_is_better(mergelab: Command, tmp_path: Path) -> None:
    text = tmp_path / "my.txt"
    text.write_text("12+34=64\n\n5+5=01\n\nabc>cba\n")
    out = mergelab(
        "job=analyze", "experts=math_code", "eval=perplexity", f"eval.text={text}", "analyze.points=3"
    )
    assert out.status == 0, out.err
    found, told = rows(out.folder / "report" / "landscape.csv"), out.result["landscape"]
    assert told["split"] == "validation"
    least = min(float(x["score.text"]) for x in found)
    assert told["best"]["fitness"] == -least
    drawn(out.folder / "report" / "landscape.png")


@pytest.mark.usefixtures("only_landscapes")
def test_models_without_usable_numbers_are_passed_over(mergelab: Command, tmp_path: Path) -> None:
    text = tmp_path / "my.txt"
    text.write_text("12+34=64\n")
    arguments = [
        "job=analyze",
        "experts=math_code",
        "eval=perplexity",
        f"eval.text={text}",
        "analyze.points=3",
    ]
    out = mergelab(*arguments, "analyze.margin=1e36")
    assert out.status == 0, out.err
    fitness = {x["at.code"]: x["fitness"] for x in rows(out.folder / "report" / "landscape.csv")}
    assert fitness["0.0"] and fitness["1.0"] and "" in fitness.values()
    drawn(out.folder / "report" / "landscape.png")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["eval=none"], "no landscape, for nothing is measured (eval=none)"),
        (["hardware.engine=mergekit"], "hardware.engine asks for it"),
        (["eval=lm_eval", "eval.tasks=[tiny_math]", "eval.include_path={tasks}"],
         "it would be measured on tiny_math, on which results are reported"),
        (["analyze.landscape=false"], ""),
    ],
)  # fmt: skip
def test_without_a_landscape(arguments: list[str], why: str, mergelab: Command, family: Any) -> None:
    out = mergelab("job=analyze", "experts=single_math", *(a.format(tasks=family.tasks) for a in arguments))
    assert out.status == 0, out.err
    assert why in " ".join(out.out.split()) and (why or "no landscape" not in out.out)
    assert "landscape" not in out.result
    assert {f.name for f in (out.folder / "report").iterdir()} == {"by_layer.png", "distance.csv"}


@pytest.mark.usefixtures("only_landscapes")
def test_what_results_are_reported_on_is_climbed_only_if_that_is_allowed(
    mergelab: Command, family: Any
) -> None:
    out = mergelab(
        "job=analyze", "experts=math_code", "eval=lm_eval", "eval.tasks=[tiny_math]",
        f"eval.include_path={family.tasks}", "eval.allow_test_split=true", "eval.limit=4", "analyze.points=3",
    )  # fmt: skip
    assert out.status == 0, out.err
    assert out.result["landscape"]["split"] == "validation" and "on the validation split" in out.out


def test_nan_values_of_one_expert_are_the_name_of_a_file(
    mergelab: Command, sound: Path, make_model: Any, tmp_path: Path
) -> None:
    bad = make_model(tmp_path / "bad", seed=3)
    change(bad, lambda t: t["model.norm.weight"].fill_(math.nan))
    out = mergelab("job=analyze", "eval=none", *models(sound, math=bad))
    assert (
        out.status == 1
        and f"model.norm.weight of math has entries that are NaN or infinite: {bad}" in out.err
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("analyze.top=0", "analyze.top: 0 is out of range"),
        ("analyze.top=1", "analyze.top: 1 is out of range"),
        ("analyze.points=2", "analyze.points: 2 is out of range; at least 3"),
        ("analyze.margin=-0.1", "analyze.margin: -0.1 is out of range"),
        ("analyze.margin=inf", "analyze.margin: inf is out of range"),
        ("analyze.models=[math,phsics]", "there is no 'phsics'. Did you mean 'physics'? There are base"),
        ("analyze.models=[math]", "it names 1; two models span a line, three a plane"),
        ("analyze.models=[base,math,code,physics]", "it names 4; two models span a line"),
        ("analyze.models=[math,math]", "it names one model twice"),
        ("analyze.models=[math,code] analyze.landscape=false", "no effect, because analyze.landscape=false"),
        ("analyze.models=[math,code] eval=none", "no effect, because nothing is measured"),
        ("analyze.point=9", "there is no key 'point'. Did you mean 'points'?"),
        ("analyze.models=[math,code] eval.kind=skils", "'skils' is not a kind of evaluation"),
    ],
)  # fmt: skip
def test_wrong_settings(arguments: str, said: str, mergelab: Command) -> None:
    out = mergelab("job=analyze", *arguments.split())
    assert out.status == 2 and said in out.err and "Traceback" not in out.err
    assert not (out.folder / "report").exists()


@pytest.mark.usefixtures("only_landscapes")
def test_models_that_span_no_plane(mergelab: Command, family: Any, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(family.checkpoint("math"), tmp_path / "copy")
    arguments = ["job=analyze", "experts=math_code", f"experts.code.path={copy}", "eval.limit=4"]
    out = mergelab(*arguments, "analyze.models=[math,code]")
    assert out.status == 2 and "analyze.models: math and code are the same weights" in out.err
    assert "! experts.code: its weights equal those of math, so they count twice" in out.out
    out = mergelab(*arguments)
    assert out.status == 0 and "no landscape, for math and code are the same weights" in out.out


# ---------------------------------------------------------------- the arguments that make the best


@pytest.mark.parametrize(
    "typed",
    [
        ["job=analyze", "analyze.points=9", "eval.limit=4"],
        ["job=analyze", "method=della", "method.parameters.lambda=0.5", "experts.math.density=0.3",
         "experts.code.weight=[0.1,0.2]", "experts.math.parameters={epsilon: 0.1}"],
        ["job=analyze", "experts=stem", "experts.mine={path: /models/x, weight: 0.9}", "~experts.physics"],
        ["job=analyze", "preset=qwen32b_experimental_multi_merge", "experts.code.path=/models/y"],
    ],
)  # fmt: skip
def test_the_arguments_compose_the_model_whatever_was_typed(typed: list[str]) -> None:
    before = composed(*typed)
    names = list(before.experts)[:2]
    run = composed(*overrides(typed, before, dict(zip(names, (0.25, -0.5), strict=True))))
    assert {n: e.weight for n, e in run.experts.items()} == dict(zip(names, (0.25, -0.5), strict=True))
    assert {n: e.path for n, e in run.experts.items()} == {n: before.experts[n].path for n in names}
    assert (run.method.name, run.method.parameters["normalize"], run.method.parameters["lambda"]) == (
        "task_arithmetic", False, 1.0,
    )  # fmt: skip
    assert run.job.name == "merge" and run.eval == before.eval and run.model == before.model
    assert all(e.parameters == {} for e in run.experts.values())


# ---------------------------------------------------------------- pictures


def invented(names: tuple[str, ...], layers: int) -> Comparison:
    """A comparison of experts that do not exist."""
    made = np.random.default_rng(len(names))

    def sums() -> Statistics:
        task = made.normal(size=(len(names), 64)) * 0.01
        dots = np.zeros((1 + len(names),) * 2)
        dots[0, 0], dots[1:, 1:] = 1.0, task @ task.T
        both = np.full((len(names),) * 2, 1000)
        tops = np.full(len(names), 100)
        chance = made.integers(0, 100, size=both.shape)
        return Statistics(
            1000, dots, both // 2 + chance, both, tops, chance + chance.T, np.outer(tops, tops) / 1000
        )

    parts = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm")
    tensors = [f"model.layers.{i}.{p}.weight" for i in range(layers) for p in parts]
    return Comparison(names, 0.1, {n: sums() for n in ("model.embed_tokens.weight", *tensors)})


NAMES = ("math", "数学", "medical_doctor_of_the_north", "日本語の一般", "code", "x", "$a_b$", "general")


@pytest.mark.parametrize("count", [2, 5, 8])
def test_pictures_of_few_and_many_experts(count: int, tmp_path: Path) -> None:
    made = invented(NAMES[:count], 3 if count == 2 else 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as of a letter that no font has
        placeholders = files.similarity(tmp_path, made)
    found = style.letters(NAMES[:count])
    assert placeholders == found.placeholders and (len(found.families) == 2) != bool(placeholders)
    for name in PICTURES:
        drawn(tmp_path / name)


def test_names_that_cannot_be_typed_or_drawn(
    mergelab: Command, family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(style.fontManager, "ttflist", [])
    (tmp_path / "conf" / "experts").mkdir(parents=True)
    mine = f"# Mine.\n数学: {{path: {family.checkpoint('math')}}}\ncode: {{}}\n"
    (tmp_path / "conf" / "experts" / "mine.yaml").write_text(mine, encoding="utf-8")
    out = mergelab(
        "--config-dir",
        str(tmp_path / "conf"),
        "job=analyze",
        "experts=mine",
        "eval.limit=4",
        "analyze.points=3",
    )
    assert out.status == 0, out.err
    assert "in the pictures #1 = 数学" in out.out
    assert "these weights in your experts' file" in out.out and "python -m mergelab" not in out.out
    assert {x["one"] for x in rows(out.folder / "report" / "similarity.csv")} == {"数学"}


def test_a_font_that_draws_boxes_is_not_taken_for_one_with_letters() -> None:
    assert not any(name.startswith(style.LAST_RESORT) for name in style.letters(["数学"]).families)


class Spot:
    """A point of an invented landscape."""

    def __init__(self, at: tuple[float, ...], value: float):
        self.at, self.weights = at, {"a": at[0], "b": 1 - at[0]}
        self.fitness = None if math.isnan(value) else value
        scores = {f"measure {i}": value * i for i in range(1, 3)}
        self.scores = {
            n: type("S", (), {"value": v, "stderr": 0.1 if "1" in n else None})() for n, v in scores.items()
        }


@pytest.mark.parametrize("shape", ["flat", "hill", "holes", "nothing but the best"])
def test_landscapes_of_any_shape(shape: str, tmp_path: Path) -> None:
    ticks = [-0.5, 0.0, 0.5, 1.0, 1.5]
    heights: Mapping[str, Callable[[float, float], float]] = {
        "flat": lambda a, b: 0.5,
        "hill": lambda a, b: -((a - 0.5) ** 2) - b**2,
        "holes": lambda a, b: math.nan if a < 0 else a,
        "nothing but the best": lambda a, b: 0.5 if a == b == 0 else math.nan,
    }
    points = [Spot((a, b), heights[shape](a, b)) for a in ticks for b in ticks]
    best = max((p for p in points if p.fitness is not None), key=lambda p: p.fitness or 0)
    land = Land(
        ("base", "a", "数学"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)], ticks, points,
        lambda at: (at[0] + 0.3 * at[1], 0.8 * at[1]), best, {"measure 1": True, "measure 2": False},
        {"measure 1": 1.0, "measure 2": 1.0}, "search",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files.landscape(tmp_path, land)
    drawn(tmp_path / "landscape.png")
    found = rows(tmp_path / "landscape.csv")
    assert [value(x["fitness"]) for x in found] == pytest.approx(
        [math.nan if p.fitness is None else p.fitness for p in points], nan_ok=True
    )
