"""The report of a search: its numbers are the journal's, its pictures show something, its bytes are fixed."""

from __future__ import annotations

import csv
import html.parser
import io
import math
import random
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mergelab.report import evolution, pictures
from mergelab.report.evolution import data, plots, write_report
from mergelab.report.evolution.importance import importance
from mergelab.report.evolution.validation import validation

KEYS = [f"experts.{role}.{part}" for role in ("math", "code", "japanese") for part in ("weight", "density")]
PICTURES = {"fitness.png", "parameters.png", "parallel.png", "importance.png", "validation.png"}
TABLES = {"candidates.csv", "generations.csv", "importance.csv", "validation.csv"}


def score(value: float, higher: bool = True) -> dict[str, Any]:
    return {
        "value": value, "stderr": 0.03, "samples": 64, "metric": "exact_match", "higher_is_better": higher,
        "task": "t", "others": {},
    }  # fmt: skip


def candidate(number: int, genome: dict[str, Any], population: int, names: list[str]) -> dict[str, Any]:
    """One that is the fitter the larger its first gene, and the nearer its second is to the middle."""
    first, *rest = [v if isinstance(v, float) else float(len(v)) for v in genome.values()]
    fitness = 0.5 + 0.3 * first - (0.2 * (rest[0] - 0.5) ** 2 if rest else 0.0)
    return {
        "event": "candidate", "number": number, "generation": number // population, "genome": genome,
        "status": "done", "fitness": fitness, "reason": None,
        "scores": {n: score(fitness + (0.4 - 0.9 * first) * i) for i, n in enumerate(names)},
    }  # fmt: skip


def journal(
    keys: list[str] = KEYS,
    generations: int = 5,
    population: int = 8,
    names: list[str] = ["math", "code"],  # noqa: B006
) -> list[dict[str, Any]]:
    """That of a search whose generations narrow; the last but one failed, and the last was a repetition."""
    chance = random.Random(0)
    events: list[dict[str, Any]] = [{"event": "begin"}]
    for number in range(generations * population):
        width = 0.5 / (1 + number // population)
        genome = {k: round(min(1.0, max(0.0, 0.7 + chance.uniform(-width, width))), 4) for k in keys}
        events.append(candidate(number, genome, population, names))
    if len(events) > 3:
        events[-2] |= {"status": "failed", "fitness": None, "scores": {}, "reason": "out of <memory>"}
        events[-1] |= {k: events[3][k] for k in ("genome", "fitness", "scores")}
        events[-1] |= {"status": "repeated", "of": 2}
    return events


def done(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [e for e in events if e.get("status") == "done"]


def outcome(events: list[dict[str, Any]], names: list[str] = ["math", "code"]) -> dict[str, Any]:  # noqa: B006
    """The result of a finished search."""
    winner = max(done(events), key=lambda e: e["fitness"])
    keys = list(winner["genome"])
    preset = {k: 0.5 if isinstance(v, float) else v for k, v in winner["genome"].items()}
    levels = {
        "preset": 0.55,
        "winner": 0.71,
        "math": 0.6,
        "candidate 12": 0.7,
        "candidate 3": 0.69,
        "base": 0.3,
    }
    return {
        "status": "done",
        "command": "python -m mergelab -m search=cma 'x=<b>'",
        "search": {
            "name": "cma", "optimizer": "CMA", "budget": 40, "seed": 0, "sigma": None, "objectives": [],
            "space": dict.fromkeys(keys, "interval(0,1)"),
        },
        "winner": {k: winner[k] for k in ("number", "generation", "genome", "fitness")},
        "preset": {"genome": preset, "fitness": 0.62},
        "random": {"fitness": 0.63},
        "candidates": {"evaluated": 38, "repeated": 1, "failed": 1},
        "metrics": {m: {"validation": {n: score(v) for n in names}} for m, v in levels.items()},
        "shares": dict.fromkeys(names, 1.0),
        "verdict": "The winner beats the preset <clearly> & well.",
        "gain": {"against": "preset", "value": 0.16, "stderr": 0.02},
    }  # fmt: skip


class Page(html.parser.HTMLParser):
    """Which elements are open, and what they point to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.sources += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        self.text += text


def read_page(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert all(s.startswith("data:image/png;base64,") for s in page.sources)
    assert not {"script", "link", "iframe", "object"} & set(page.seen)
    assert "http://" not in text and "https://" not in text and "url(" not in text
    return page


def table(content: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content.decode())))


def check(files: dict[str, bytes], several: bool = False) -> Page:
    """Whatever the search was like: every file is there and whole."""
    extra = {"pareto.png", "pareto.csv"} if several else set()
    assert set(files) == PICTURES | TABLES | extra | {"index.html"}
    for name in (n for n in files if n.endswith(".png")):
        image = Image.open(io.BytesIO(files[name]))
        image.load()
        assert set(image.info) <= {"dpi"}
        assert image.width >= 7 * 144
        assert np.asarray(image.convert("L")).std() > 2, name
    return read_page(files["index.html"].decode())


def made(events: list[dict[str, Any]], result: dict[str, Any]) -> dict[str, bytes]:
    """The report, made without one warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return evolution.files(events, result)


@pytest.fixture(scope="module")
def usual() -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, bytes]]:
    events = journal()
    result = outcome(events)
    return events, result, made(events, result)


def test_page(usual: Any) -> None:
    _, result, files = usual
    page = check(files)
    assert '<html lang="en">' in files["index.html"].decode()
    assert page.seen.count("img") == len(PICTURES)
    for told in (
        result["verdict"], result["command"], "0.160 ±0.020", "0.710 ±0.030", "out of <memory>",
        "38 evaluated, 1 repeated, 1 failed", "experts.japanese.density", "Out-of-bag R²", "candidate 12",
    ):  # fmt: skip
        assert told in page.text, told


def test_numbers_are_the_journals(usual: Any) -> None:
    events, _, files = usual
    rows = table(files["candidates.csv"])
    for event, row in zip(events[1:], rows, strict=True):
        assert row["status"] == event["status"]
        assert int(row["generation"]) == event["generation"]
        assert row["fitness"] == ("" if event["fitness"] is None else repr(event["fitness"]))
        for key, value in event["genome"].items():
            assert float(row[key]) == value
        for name, found in event["scores"].items():
            assert float(row[f"score.{name}"]) == found["value"]
            assert float(row[f"stderr.{name}"]) == found["stderr"]
    generations = table(files["generations.csv"])
    so_far = -math.inf
    for row in generations:
        own = [e for e in events[1:] if e["generation"] == int(row["generation"])]
        known = [e["fitness"] for e in own if e["fitness"] is not None]
        so_far = max(so_far, *known)
        assert (float(row["best"]), float(row["best so far"])) == (max(known), so_far)
        assert float(row["mean"]) == pytest.approx(sum(known) / len(known))
    assert (generations[-1]["failed"], generations[-1]["repeated"]) == ("1", "1")


def test_validation(usual: Any) -> None:
    rows = table(usual[2]["validation.csv"])
    order = ["winner", "preset", "candidate 3", "candidate 12", "math", "base"]
    assert list(dict.fromkeys(r["model"] for r in rows)) == order
    mean = next(r for r in rows if (r["model"], r["measure"]) == ("winner", "mean"))
    assert float(mean["value"]) == pytest.approx(0.71)
    assert float(mean["stderr"]) == pytest.approx(0.03 / math.sqrt(2))


def test_importance(usual: Any) -> None:
    rows = table(usual[2]["importance.csv"])
    assert {r["gene"] for r in rows} == set(KEYS)
    assert rows[0]["gene"] == KEYS[0]
    assert float(rows[0]["spearman"]) > 0.9
    assert float(rows[0]["importance"]) > 5 * float(rows[2]["importance"])
    assert float(rows[0]["out-of-bag r2"]) > 0.5
    assert {r["candidates"] for r in rows} == {"38"}


def test_importance_of_noise_is_called_so() -> None:
    chance = random.Random(1)
    events = [e | {"fitness": chance.random()} for e in done(journal())]
    found = importance(data.read(events, {}))
    assert found.out_of_bag is not None and found.out_of_bag < 0.1


def test_the_same_bytes(usual: Any, tmp_path: Path) -> None:
    events, result, files = usual
    write_report(tmp_path, events, result)
    written = {p.name: p.read_bytes() for p in (tmp_path / "report").iterdir()}
    assert written == files
    assert {(tmp_path / "report" / n).stat().st_mode & 0o444 for n in files} == {0o444}


def test_the_users_style_does_not_matter(usual: Any) -> None:
    import matplotlib

    events, result, files = usual
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red"}):
        drawn = pictures.picture(
            plots.fitness, data.read(events, result), partial(pictures.fit, placeholders={})
        )
        assert drawn == files["fitness.png"]
        assert matplotlib.rcParams["font.size"] == 20


def test_nothing_has_finished() -> None:
    page = check(made([{"event": "begin"}], {"search": {"space": {KEYS[0]: "interval(0,1)"}}}))
    assert "No candidate has been evaluated yet." in page.text
    check(made([], {}))


def test_everything_failed() -> None:
    failed: dict[str, Any] = {"status": "failed", "fitness": None, "scores": {}, "reason": None}
    page = check(made([e | failed for e in done(journal())], {"candidates": None, "winner": None}))
    assert "0 evaluated, 0 repeated, 38 failed" in page.text


def test_a_running_search_shows_the_best_so_far() -> None:
    events = journal(generations=1, population=4)
    page = check(made(events, {"status": "running", "search": {}}))
    best = max(e["fitness"] for e in done(events))
    assert f"the best fitness so far is {best:.3f}" in page.text
    assert "at least 18 evaluated candidates" in page.text


def test_one_gene_one_candidate() -> None:
    events = [candidate(0, {KEYS[0]: 0.5}, 1, ["math"])]
    check(made(events, outcome(events, ["math"])))


def test_a_fitness_that_is_no_number_is_none() -> None:
    events = journal()
    events[5]["fitness"] = math.nan
    assert len(data.read(events, {}).measured) == 38


def test_forty_genes() -> None:
    keys = [f"experts.role{i}.weight" for i in range(40)]
    events = journal(keys, generations=2, population=10)
    page = check(made(events, outcome(events)))
    assert "at least 120 evaluated candidates, and there are 18" in page.text


def test_choices_and_a_logarithmic_gene() -> None:
    space = {"method": "choice(ties,dare)", "scale": "tag(log, interval(0.001, 1.0))"}
    chance = random.Random(0)
    events = []
    for i in range(14):
        genome = {"method": chance.choice(["ties", "dare_linear"]), "scale": 10 ** chance.uniform(-3, 0)}
        events.append(candidate(i, genome, 7, ["math"]))
    result = outcome(events, ["math"])
    result["search"]["space"] = space
    files = made(events, result)
    check(files)
    rows = {r["gene"]: r for r in table(files["importance.csv"])}
    assert rows["method"]["spearman"] == "" and rows["scale"]["spearman"]
    method, scale = data.read(events, result).genes
    assert method.categories == ("dare_linear", "ties")
    assert (scale.logarithmic, scale.low, scale.high) == (True, 0.001, 1.0)
    assert scale.height({"scale": 10**-1.5}) == pytest.approx(0.5)


def test_names_that_the_font_cannot_draw(capfd: pytest.CaptureFixture[str]) -> None:
    events = journal(
        ["experts.日本語.weight", "experts.$math_1$.weight", "experts.コード.密度"], names=["数学"]
    )
    result = outcome(events, ["数学"])
    page = check(made(events, result))
    assert "#1 = 日本語, #2 = コード, #3 = 密度, #4 = 数学" in page.text
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("text", "limit", "drawn"),
    [
        ("math weight", 26, "math weight"),
        ("math  layers\n0-7", 26, "math layers 0-7"),
        ("japanese_medical_12 weight", 20, "japane…cal_12 weight"),
        ("japanese_medical_13 日本", 14, "japan…al_13 #1"),
        ("a b c d e f g h", 5, "a b c d e f g h"),
        ("", 5, ""),
    ],
)
def test_names_are_cut_to_fit_in_their_middle(text: str, limit: int, drawn: str) -> None:
    assert pictures.fit(text, placeholders={"日本": "#1"}, limit=limit) == drawn


def test_short_names_stay_apart() -> None:
    keys = ["experts.math.weight", "math.weight", "experts.code.weight"]
    assert [g.label for g in data.read([], {"search": {"space": dict.fromkeys(keys, "")}}).genes] == keys
    genes = data.read([], {"search": {"space": dict.fromkeys(keys[1:], "")}}).genes
    assert [g.label for g in genes] == ["math weight", "code weight"]


def test_a_score_that_is_no_number_is_left_out() -> None:
    found = {"winner": {"validation": {"a": score(0.5), "b": score(0.5) | {"value": "nan"}}}, "base": {}}
    (model,) = validation(found, {})
    assert (model.name, list(model.scores), model.mean) == ("winner", ["a"], 0.5)


def test_measures_that_have_no_mean() -> None:
    events = journal()
    result = outcome(events)
    for splits in result["metrics"].values():
        splits["validation"]["code"] |= {"higher_is_better": False, "value": 12.5, "stderr": None}
    files = made(events, result)
    assert "code (lower is better)" in check(files).text
    assert not [r for r in table(files["validation.csv"]) if r["measure"] == "mean"]


def test_several_objectives() -> None:
    events = journal()
    result = outcome(events) | {"winner": None, "verdict": None}
    result["search"]["objectives"] = ["math", "code"]
    for e in events[1:]:
        e["fitness"] = None
    evolved = data.read(events, result)
    spots = {e["number"]: (e["scores"]["math"]["value"], e["scores"]["code"]["value"]) for e in done(events)}
    expected = [
        n
        for n, s in spots.items()
        if not any(o != s and o[0] >= s[0] and o[1] >= s[1] for o in spots.values())
    ]
    assert 1 < len(expected) < len(spots)
    assert evolved.front == expected
    told = result | {"pareto": expected[:2]}
    files = made(events, told)
    page = check(files, several=True)
    assert "Parameters of the front" in page.text
    assert "the first objective, math" in page.text
    rows = table(files["pareto.csv"])
    assert [int(r["number"]) for r in rows] == sorted(expected[:2])
    assert all((float(r["math"]), float(r["code"])) == spots[int(r["number"])] for r in rows)
    check(made([], told), several=True)


def test_less_is_better_in_an_objective() -> None:
    events = [candidate(i, {"x": i / 4}, 4, ["math", "loss"]) for i in range(4)]
    for e in events:
        e["scores"]["loss"] = score(3.0 + e["genome"]["x"], higher=False)
    assert data.read(events, {"search": {"objectives": ["math", "loss"]}}).front == [0, 1, 2, 3]
    for e in events:
        e["scores"]["loss"] = score(3.0 - e["genome"]["x"], higher=False)
    assert data.read(events, {"search": {"objectives": ["math", "loss"]}}).front == [3]
