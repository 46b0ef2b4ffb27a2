"""The engine as a user meets it: which one runs, what is left when it dies, and how it goes on."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from composing import METHODS, experts_for
from conftest import Command, Outcome
from forks import Forks
from weights import same_bits, weights

from mergelab.core import cache_dir
from mergelab.core.sizes import format_size
from mergelab.merging import kernels, resume, shards, streaming_engine, throughput_cache
from mergelab.models.checkpoint import TensorInfo
from mergelab.preflight import resources
from mergelab.recipes.tensor_plan import OutputTensor, SourceTensor
from mergelab.schema import Hardware


def engine_of(outcome: Outcome) -> tuple[str, str]:
    """Name and reason, of the plan that a run left."""
    engine = json.loads((outcome.folder / "plan.json").read_text(encoding="utf-8"))["engine"]
    return engine["name"], engine["why"]


# ---------------------------------------------------------------- which engine


@pytest.mark.parametrize(
    ("override", "name", "why"),
    [
        ("hardware.engine=auto", "fast", ""),
        ("hardware.engine=fast", "fast", ""),
        ("hardware.engine=mergekit", "mergekit", "hardware.engine asks for it"),
        ("model.tokenizer=union", "mergekit", "it has a tokenizer to build"),
        ("hardware.compute_dtype=bfloat16", "mergekit", "its arithmetic is in bfloat16"),
        ("hardware.compute_dtype=float64", "fast", ""),
        ("hardware.compute_dtype=null", "fast", ""),
    ],
)
def test_the_plan_says_which_engine_and_why(override: str, name: str, why: str, mergelab: Command) -> None:
    outcome = mergelab("job=plan", "method=ties", override)
    assert outcome.status == 0, outcome.err
    assert engine_of(outcome) == (name, why)
    assert f"engine      {name}: {why}" in outcome.out


def raw(tmp_path: Path, recipe: dict[str, Any]) -> list[str]:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return ["method=mergekit", f"method.path={tmp_path / 'mine.yaml'}", "eval=none"]


def test_slices_modules_and_bfloat16_of_a_file_go_through_mergekit(
    family: Any, mergelab: Command, tmp_path: Path
) -> None:
    math = str(family.checkpoint("math"))
    whole: dict[str, Any] = {"models": [{"model": math}], "base_model": math}
    slices = [{"sources": [{"model": math, "layer_range": [0, 2]}]}]
    for recipe, why in (
        ({"slices": slices}, "it has slices"),
        ({"modules": {"default": {"slices": slices}}}, "it has modules"),
        (whole | {"dtype": "bfloat16"}, "its arithmetic is in bfloat16"),
        (whole | {"dtype": "float32"}, ""),
    ):
        outcome = mergelab(*raw(tmp_path, {"merge_method": "passthrough"} | recipe), "job=plan")
        assert outcome.status == 0, outcome.err
        assert engine_of(outcome) == ("mergekit" if why else "fast", why)


def test_a_file_in_bfloat16_is_computed_in_float32_by_the_fast_engine(
    family: Any, mergelab: Command, tmp_path: Path
) -> None:
    models = [{"model": str(family.checkpoint(r)), "parameters": {"weight": 0.5}} for r in ("math", "code")]
    recipe = {"merge_method": "linear", "models": models, "dtype": "bfloat16"}
    outcome = mergelab(*raw(tmp_path, recipe), "hardware.engine=fast")
    assert outcome.status == 0, outcome.err
    merged = weights(outcome.folder / "model")
    one, two = (weights(family.checkpoint(r)) for r in ("math", "code"))
    for n, t in merged.items():
        assert t.dtype == torch.bfloat16
        assert torch.equal(t, ((one[n].float() * 0.5 + two[n].float() * 0.5) / 1.0).bfloat16())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hardware.engine=quick"], "hardware.engine: 'quick' is none of auto, fast, mergekit"),
        (["method.rescale=l2"], "method.rescale: 'l2' is none of l1, density"),
        (["hardware.devices=-1"], "hardware.devices: -1 is out of range"),
        (["hardware.memory=much"], "hardware.memory: 'much' is not a size"),
        (["hardware.engine=fast", "model.tokenizer=union"], "fast cannot do this recipe: it has a tokenizer"),
        (["method=ties", "method.rescale=density"], "method.rescale: it has no effect"),
        (["method=linear", "method.rescale=density"], "method.rescale: it has no effect"),
        (
            ["hardware.engine=mergekit", "method.rescale=density"],
            "method.rescale: mergekit, which merges because",
        ),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], message: str, mergelab: Command) -> None:
    outcome = mergelab(*arguments, "eval=none")
    assert outcome.status == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert not list(outcome.folder.glob("*model*"))


def test_rescale_by_density_is_another_model(mergelab: Command) -> None:
    arguments = ["experts=single_math", "method=dare_linear", "experts.math.density=0.5", "eval=none"]
    l1, density = (mergelab(*arguments, f"method.rescale={r}") for r in ("l1", "density"))
    assert (l1.status, density.status) == (0, 0), l1.err + density.err
    assert not same_bits(l1.folder / "model", density.folder / "model")
    assert l1.result["key"] != density.result["key"]


# ---------------------------------------------------------------- going on after a death


SLOW = """
import os, sys, time
from mergelab.merging import shards

write, finish = shards._write, shards.Writer.finish

def slow(fd, data, offset):
    time.sleep(0.004)
    write(fd, data, offset)

def logged(self, name, digest):
    finish(self, name, digest)
    with open(os.environ["FINISHED"], "a") as log:
        log.write(name + "\\n")

shards._write, shards.Writer.finish = slow, logged
"""


@pytest.fixture(scope="module")
def large(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that merge models of 300 tensors."""
    root = tmp_path_factory.mktemp("large")
    for seed, name in enumerate(("base", "math", "code")):
        make_model(root / name, seed=seed, num_hidden_layers=25, dtype="bfloat16")
    return [
        "experts=math_code", "method=dare_ties", "eval=none", f"model.base.path={root / 'base'}",
        f"experts.math.path={root / 'math'}", f"experts.code.path={root / 'code'}",
        "hardware.shard_size=30KB",
    ]  # fmt: skip


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_killed_again_and_again(large: list[str], mergelab: Command, warm: Forks, tmp_path: Path) -> None:
    """SIGKILL at random moments, each time in a new folder: the same bytes, and nothing done twice."""
    undisturbed = mergelab(*large)
    assert undisturbed.status == 0, undisturbed.err
    expected = {p.name: p.read_bytes() for p in (undisturbed.folder / "model").iterdir()}
    finished = tmp_path / "finished"
    environment = os.environ | {"FINISHED": str(finished)}
    chance, status, runs, total = random.Random(7), -9, 0, len(weights(undisturbed.folder / "model"))
    folder = tmp_path
    while status == -9:
        folder = tmp_path / f"killed{runs}"
        runs += 1
        out, err = tmp_path / f"out{runs}", tmp_path / f"err{runs}"
        typed = [str(tmp_path), SLOW, *large, f"hydra.run.dir={folder}"]
        process = warm.start(typed, environment, out, err)
        goal = lines(finished) + chance.randint(5, total // 2)
        while process.status is None and lines(finished) < goal:
            time.sleep(0.002)
        status = process.interrupt() if process.status is None else process.status
        assert status in (-9, 0), err.read_text(encoding="utf-8")
    assert runs > 2, "it was not killed often enough to show anything"
    assert "were there already" in out.read_text(encoding="utf-8")
    left = {p.name: p.read_bytes() for p in (folder / "model").iterdir()}
    assert left.keys() == expected.keys()
    for name in left.keys() - {"README.md"}:  # the card shows the command
        assert left[name] == expected[name], name
    done = finished.read_text(encoding="utf-8").splitlines()
    assert len(done) == len(set(done)), "a tensor was merged twice"
    assert not list(tmp_path.glob("killed*/.model.partial"))
    notes = [n.read_text(encoding="utf-8") for n in (cache_dir.home() / resume.KIND).glob("*.json")]
    assert not [n for n in notes if str(tmp_path) in n]


def output(name: str, size: int, file: str = "in") -> OutputTensor:
    header = TensorInfo("F32", (size,), file)
    return OutputTensor(name, "F32", (size,), None, (SourceTensor("m", name, header),), {"scale": [None]})


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., streaming_engine.Merge]:
    """`small()`: a merge that copies three tensors, in files of at most two."""
    from safetensors.torch import save_file

    tensors = {n: torch.arange(5.0) + i for i, n in enumerate("abc")}
    save_file(tensors, tmp_path / "in.safetensors")

    def make(**changes: Any) -> streaming_engine.Merge:
        outputs = [output(n, 5, str(tmp_path / "in.safetensors")) for n in "abc"]
        settings: dict[str, Any] = {"seed": 0, "rescale": "l1", "dtype": "float32"} | changes
        return streaming_engine.plan(
            "passthrough", outputs, {"m": "m"}, hardware=Hardware(shard_size="40B"), **settings
        )

    return make


def journal(folder: Path) -> list[dict[str, str]]:
    return [json.loads(x) for x in (folder / shards.JOURNAL).read_text(encoding="utf-8").splitlines()]


def run(merge: streaming_engine.Merge, folder: Path) -> int:
    folder.mkdir(exist_ok=True)
    return streaming_engine.run(merge, folder, hardware=Hardware())


def test_a_torn_last_line_is_no_line(small: Callable[..., streaming_engine.Merge], tmp_path: Path) -> None:
    merge, out = small(), tmp_path / "out"
    assert run(merge, out) == 0
    assert len(journal(out)) == 4
    text = (out / shards.JOURNAL).read_text(encoding="utf-8")
    (out / shards.JOURNAL).write_text(text[:-9], encoding="utf-8")
    before = weights(out)
    assert run(merge, out) == 2 * 20
    assert len(journal(out)) == 4
    assert all(torch.equal(t, before[n]) for n, t in weights(out).items())


def test_damaged_bytes_are_merged_again(small: Callable[..., streaming_engine.Merge], tmp_path: Path) -> None:
    merge, out = small(), tmp_path / "out"
    run(merge, out)
    before = weights(out)
    place = merge.layout.positions["b"]
    with (out / place.file).open("r+b") as f:
        f.seek(place.offset + 3)
        f.write(b"\0")
    assert run(merge, out) == 2 * 20
    assert all(torch.equal(t, before[n]) for n, t in weights(out).items())


@pytest.mark.parametrize("change", ["seed", "rescale", "dtype", "input"])
def test_another_merge_starts_anew(
    change: str, small: Callable[..., streaming_engine.Merge], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(small(), out)
    if change == "input":
        os.utime(tmp_path / "in.safetensors", (1, 1))
        other = small()
    else:
        other = small(**{change: {"seed": 1, "rescale": "density", "dtype": "float64"}[change]})
    assert run(other, out) == 0
    assert run(other, out) == 3 * 20


def test_files_are_what_the_library_reads(
    small: Callable[..., streaming_engine.Merge], tmp_path: Path
) -> None:
    merge, out = small(), tmp_path / "out"
    run(merge, out)
    assert sorted(p.name for p in out.glob("model*")) == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]  # fmt: skip
    index = json.loads((out / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == 60
    found = weights(out)
    assert sorted(found) == ["a", "b", "c"]
    assert all(torch.equal(found[n], torch.arange(5.0) + i) for i, n in enumerate("abc"))
    for file in merge.layout.headers:
        assert (out / file).stat().st_size == merge.layout.size(file)


def test_a_merge_that_is_worked_on_is_not_taken(tmp_path: Path) -> None:
    """Somebody else holds the lock: a second one of the same key begins in its own folder."""
    home, one, two = tmp_path / "home", tmp_path / "one", tmp_path / "two"
    hold = (
        "import sys; from pathlib import Path; from mergelab.merging import resume as u\n"
        "one, home = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "with u.resumable_folder(one, 'key', {}, home):\n"
        '    (one / u.JOURNAL).write_text(\'{"key": "key"}\\n{"tensor": "a"}\\n\')\n'
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", hold, str(one), str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with resume.resumable_folder(two, "key", {}, home):
        assert not resume.started(two)
        assert resume.started(one)
    process.kill()
    process.wait()
    resume.discard(two, home)
    (home / resume.KIND / "key.json").write_text(json.dumps({"folder": str(one), "recipe": ""}))
    with resume.resumable_folder(two, "key", {}, home):
        assert resume.started(two)
        assert not one.exists()


def test_interrupted_while_it_is_checked(
    large: list[str], mergelab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merge was complete: it is not done again."""

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mergelab.context.verify", interrupt)
        outcome = mergelab(*large, "seed=13")
    assert outcome.status == 130
    assert "The same command resumes from there." in outcome.err
    again = mergelab(*large, "seed=13")
    assert again.status == 0, again.err
    size = sum(t.numel() * t.element_size() for t in weights(again.folder / "model").values())
    assert f"({format_size(size)} were there already)" in again.out


@pytest.mark.parametrize("started", [True, False])
def test_interrupted(
    started: bool, large: list[str], mergelab: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ctrl-C keeps what is finished, says so, and the same command goes on."""
    from mergelab.merging.shards import Writer

    count, finish = 0, Writer.finish

    def interrupt(self: Writer, *arguments: str) -> None:
        nonlocal count
        count += 1
        if count > 40 * started:
            raise KeyboardInterrupt
        finish(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "finish", interrupt)
        outcome = mergelab(*large, "seed=11")
    assert outcome.status == 130
    assert outcome.result["status"] == "interrupted"
    partial = outcome.folder / ".model.partial"
    assert partial.exists() is started
    if started:
        assert f"interrupted; what is merged is kept in {partial}" in outcome.err
        assert "The same command resumes from there." in outcome.err
    again = mergelab(*large, "seed=11")
    assert again.status == 0, again.err
    assert ("were there already" in again.out) is started
    assert not partial.exists()
    assert same_bits(
        again.folder / "model", mergelab(*large, "seed=11", "hardware.threads=1").folder / "model"
    )


# ---------------------------------------------------------------- speed is not memory


def test_a_merge_loads_only_what_it_needs(large: list[str], tmp_path: Path) -> None:
    """transformers and peft take longer to import than a small model to merge."""
    script = (
        "import atexit, sys\n"
        "heavy = {'transformers', 'peft', 'lm_eval', 'wandb', 'datasets', 'mergekit.merge'}\n"
        "atexit.register(lambda: print('loaded', sorted(heavy & sys.modules.keys())))\n"
        "from mergelab.cli.main import main; main()\n"
    )
    arguments = [*large, "job.steps=[preflight,merge]", f"hydra.run.dir={tmp_path / 'run'}"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "✓ merge" in done.stdout
    assert "loaded []" in done.stdout


def test_buffers_stay_within_what_is_promised() -> None:
    """Whatever the method and however large the tensor."""
    from mergelab.methods import registry

    tensors = [torch.randn(600, 1000).bfloat16() for _ in range(4)]
    for name in kernels.KERNELS:
        buffers, d = kernels.Buffers(), registry.get(name)
        based = d.inputs.base == "required"
        count = experts_for(name) - (METHODS[name]["base"] == "first" and based)
        base = tensors[0] if based else None
        values = {"weight": 0.5, "density": 0.5, "t": 0.5, "select_topk": 0.5, "epsilon": 0.1}
        parameters: dict[str, Any] = {"rescale_to": "l1"}
        for p in d.parameters.values():
            value = values.get(p.name, p.default)
            parameters[p.name] = [value] * count if p.per_model else value
        group = kernels.Group("x", tensors[1 : 1 + count], base, buffers=buffers)
        for _ in kernels.merge(kernels.KERNELS[name], group, parameters):
            pass
        held = sum(t.numel() * t.element_size() for t in buffers._held.values())
        assert held <= streaming_engine.chunk_memory(count + 1, "float32", d.traits.buffers), name


@pytest.mark.parametrize(
    ("settings", "count"),
    [({"threads": 3}, 3), ({"threads": 8, "memory": "1MB"}, 1), ({"threads": 8, "memory": "60MB"}, 2)],
)
def test_workers_fit_threads_and_memory(settings: dict[str, Any], count: int) -> None:
    each = streaming_engine.chunk_memory(4, "float32", buffers=13)
    assert streaming_engine.workers(Hardware(**settings), each) == ["cpu"] * count


def test_every_gpu_gets_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert streaming_engine.workers(Hardware(device="cuda"), 1) == ["cuda:0"] * 2
    assert (
        streaming_engine.workers(Hardware(device="cuda:1", devices=2), 1) == ["cuda:1"] * 2 + ["cuda:2"] * 2
    )
    assert streaming_engine.workers(Hardware(device="cuda", devices=0), 1) == [
        f"cuda:{i}" for i in range(4) for _ in range(2)
    ]


def test_progress_counts_bytes_and_reaches_the_end(
    small: Callable[..., streaming_engine.Merge], tmp_path: Path
) -> None:
    told: list[tuple[str, int, int]] = []
    (tmp_path / "out").mkdir()
    streaming_engine.run(
        small(), tmp_path / "out", hardware=Hardware(), progress=lambda *step: told.append(step)
    )
    assert told[-1] == ("merge", 120, 120)


def test_the_plan_tells_the_time_of_a_merge_like_one_that_ran_here(
    large: list[str], mergelab: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: Any
) -> None:
    monkeypatch.setenv("MERGELAB_HOME", str(tmp_path / "home"))
    plan = [*large, "job=plan"]
    assert "time of the merge" not in mergelab(*plan).out
    assert mergelab(*large).status == 0
    assert throughput_cache.known(tmp_path / "home", "dare_ties", Hardware()) is None, (
        "too small to tell anything"
    )
    monkeypatch.setattr(throughput_cache, "MIN_BYTES", 1)
    assert mergelab(*large).status == 0
    rate = throughput_cache.known(tmp_path / "home", "dare_ties", Hardware())
    assert rate is not None
    assert rate > 0
    assert re.search(
        r"time of the merge +about \d+ s, at the [\d.]+ .B/s of the last dare_ties here", mergelab(*plan).out
    )
    assert "time of the merge" not in mergelab(*plan, "hardware.threads=7").out
    assert "time of the merge" not in mergelab(*plan, "method=ties").out


@pytest.mark.parametrize(
    ("device", "devices", "wrong"),
    [("cuda", 3, True), ("cuda", 2, False), ("cuda:1", 2, True), ("cuda:1", 0, False)],
)
def test_more_devices_than_there_are(
    device: str, devices: int, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = [f.place for f in resources.check_device(device, devices, "error")]
    assert found == ["hardware.devices"] * wrong


def test_the_bar_and_the_events_know_bytes(
    large: list[str], mergelab: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergelab.steps.merge.EVENTS", 0.0)
    outcome = mergelab(*large, "seed=12")
    assert outcome.status == 0, outcome.err
    text = (outcome.folder / "events.jsonl").read_text(encoding="utf-8")
    events = [json.loads(x) for x in text.splitlines()]
    progress = [e for e in events if e["event"] == "progress"]
    assert progress
    assert progress[-1]["bytes"] == progress[-1]["of"]
    assert re.search(r"merge +dare_ties, [\d.]+ kB", outcome.out)
