"""Every option of every group composes, quickly, and nothing that does not exist does."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from composing import composed
from omegaconf import OmegaConf

from mergelab.cli.help import GROUPS
from mergelab.core.conf_dir import CONF
from mergelab.schema import Run

OPTIONS = [
    (group.name, option.stem)
    for group in sorted(CONF.iterdir())
    if group.is_dir()
    for option in sorted(group.glob("[!_]*.yaml"))
]

HEAVY = ("torch", "transformers", "mergekit", "wandb", "lm_eval", "nevergrad", "datasets", "peft")


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda v: str(v))
def test_every_option_composes_to_a_typed_run(group: str, option: str) -> None:
    run = composed(f"{group}={option}")
    assert isinstance(run, Run)
    if group in ("model", "method", "job", "tracking", "search"):
        assert getattr(run, group).name == option


def test_help_knows_every_group() -> None:
    assert {g for g, _ in OPTIONS} == set(GROUPS)


def test_every_option_says_what_it_is_for_in_its_first_line() -> None:
    for group, option in OPTIONS:
        lines = (CONF / group / f"{option}.yaml").read_text(encoding="utf-8").splitlines()
        first = lines[lines[0] == "# @package _global_"]
        assert first.startswith("# ") and len(first) > 20, f"{group}/{option}: {first}"


def test_the_bare_command_is_the_tiny_family_with_dare_ties() -> None:
    run = composed()
    assert (run.model.name, run.method.name, list(run.experts)) == (
        "tiny", "dare_ties", ["math", "physics", "code", "japanese"],
    )  # fmt: skip
    assert run.job.steps == ["preflight", "merge", "verify", "evaluate", "routing", "report"]


def test_experts_are_overridden_added_and_left_out_by_name() -> None:
    run = composed("experts.math.weight=0.4", "~experts.code", "experts.mine={path: org/name, weight: 1}")
    assert list(run.experts) == ["math", "physics", "japanese", "mine"]
    assert run.experts["math"].weight == 0.4
    assert run.experts["mine"].path == "org/name"


def test_settings_may_be_gradients_and_filters() -> None:
    run = composed(
        "experts.math.density=[0.2,0.9]", "experts.code.weight={self_attn: 0.1, mlp: [0.3, 0.8], *: 0.5}"
    )
    assert run.experts["math"].density == [0.2, 0.9]
    assert run.experts["code"].weight == {"self_attn": 0.1, "mlp": [0.3, 0.8], "*": 0.5}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("flags", [["--help"], ["--cfg", "job"], ["--version"]], ids=lambda f: f[0])
def test_looking_at_the_command_loads_nothing_heavy(flags: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["mergelab", *{flags!r}]
from mergelab.cli.main import main
try:
    main()
except SystemExit as e:
    assert not e.code, e.code
print("loaded", sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    assert python(code).strip().endswith("loaded []")


def test_the_help_page_shows_every_option_and_five_examples() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mergelab", "--help"], capture_output=True, text=True, check=True
    )
    for _, option in OPTIONS:
        assert option in done.stdout
    assert done.stdout.count("python -m mergelab ") + done.stdout.count("python -m mergelab\n") >= 6
    assert "Exit status" in done.stdout


def test_a_user_keeps_groups_of_their_own(tmp_path: Path) -> None:
    for group, text in (
        ("model", "# Mine.\nname: mine\nbase: {path: org/base}\nroles: {math: {path: org/math}}\n"),
        ("experts", "# Mine too.\nmath: {weight: 0.3}\n"),
        ("method", "# And mine.\nname: task_arithmetic\nparameters: {lambda: 0.7}\n"),
    ):
        (tmp_path / group).mkdir()
        (tmp_path / group / "mine.yaml").write_text(text, encoding="utf-8")
    arguments = ["--config-dir", str(tmp_path), "model=mine", "experts=mine", "method=mine", "--cfg", "job"]
    done = subprocess.run(
        [sys.executable, "-m", "mergelab", *arguments], capture_output=True, text=True, check=True
    )
    run = OmegaConf.create(done.stdout)
    assert run.model.roles.math.path == "org/math"
    assert run.experts.math.weight == 0.3
    assert run.method.parameters["lambda"] == 0.7
    page = subprocess.run(
        [sys.executable, "-m", "mergelab", "--help", "--config-dir", str(tmp_path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "And mine." in page.stdout


LAYERS = {
    # what a part of the package imports of the rest; its own modules always
    "analysis": {
        "context", "core", "evaluation", "merging", "methods", "models", "preflight", "recipes", "report",
        "schema",
    },
    "api": {
        "composition", "context", "core", "evaluation", "execution", "jobs", "optimization", "preflight",
        "recipes", "report", "result", "schema",
    },
    "composition": {"config_errors", "core", "hydra", "jobs", "schema"},
    "config_errors": {"core", "hydra"},
    "context": {
        "core", "evaluation", "jobs", "merging", "preflight", "recipes", "report", "schema", "tracking",
        "zoo",
    },
    "core": set(),
    "evaluation": {"config_errors", "core", "models", "result", "schema"},
    "execution": {"composition", "core", "jobs", "merging", "report", "result", "schema"},
    "generation": {"context", "core", "evaluation", "models", "preflight", "report", "schema"},
    "hub": {"core", "models"},
    "jobs": {"core", "evaluation", "report", "schema", "tracking"},
    "lora": {"core", "merging", "models", "schema"},
    "measured_models": {"core", "evaluation", "jobs", "schema"},
    "merging": {"core", "methods", "models", "preflight", "recipes", "schema"},
    "methods": {"core"},
    "models": {"core"},
    "monitor": {"core", "report", "scheduling", "schema", "search_history"},
    "optimization": {
        "composition", "context", "core", "evaluation", "hydra", "jobs", "measured_models", "merging",
        "methods", "models", "plan_page", "preflight", "recipes", "report", "result", "scheduling", "schema",
        "search_history", "tracking",
    },
    "plan_page": {
        "context", "core", "evaluation", "merging", "preflight", "recipes", "report", "scheduling", "schema",
    },
    "preflight": {"core", "evaluation", "jobs", "methods", "models", "recipes", "schema"},
    "provenance": {"context", "core", "evaluation", "jobs", "methods", "recipes", "schema", "zoo"},
    "recipes": {"core", "methods", "models", "schema"},
    "report": {"core", "search_history"},
    "result": {"core"},
    "scheduling": {"composition", "core", "hydra", "jobs", "merging", "report", "schema", "tracking"},
    "schema": {"core"},
    "search_history": set(),
    "slurm": {"core", "scheduling", "schema"},
    "steps": {
        "analysis", "context", "core", "evaluation", "generation", "hub", "jobs", "lora", "measured_models",
        "merging", "models", "monitor", "plan_page", "preflight", "provenance", "recipes", "report", "schema",
        "zoo",
    },
    "tracking": {"core", "report", "schema"},
    "zoo": {"core"},
}  # fmt: skip


def imports_of(file: Path) -> set[str]:
    """Top-level parts of mergelab, and hydra, that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "mergelab":
                names = [f"mergelab.{a.name}" for a in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "mergelab" and len(parts) > 1:
                found.add(parts[1])
            if parts[0] in ("hydra", "hydra_plugins"):
                found.add("hydra")
    return found - {"__version__"}


def test_the_arrows_between_the_parts() -> None:
    package = Path(__file__).parents[2] / "mergelab"
    for part, allowed in LAYERS.items():
        files = list((package / part).rglob("*.py")) or [package / f"{part}.py"]
        for file in files:
            wrong = imports_of(file) - allowed - {part}
            assert not wrong, f"{file} imports {wrong}"


def test_the_parts_have_no_circle() -> None:
    package = Path(__file__).parents[2] / "mergelab"
    graph: dict[str, set[str]] = {}
    for file in package.rglob("*.py"):
        part = file.relative_to(package).parts[0].removesuffix(".py")
        graph.setdefault(part, set()).update(imports_of(file) - {part, "hydra"})
    TopologicalSorter(graph).prepare()  # raises CycleError, which names them


def test_no_file_is_long() -> None:
    package = Path(__file__).parents[2] / "mergelab"
    lines = {f: len(f.read_text(encoding="utf-8").splitlines()) for f in package.rglob("*.py")}
    assert {f.relative_to(package).as_posix(): n for f, n in lines.items() if n > 400} == {}


def test_only_a_few_files_know_hydra() -> None:
    package = Path(__file__).parents[2] / "mergelab"
    users = {f.relative_to(package).as_posix() for f in package.rglob("*.py") if "hydra" in imports_of(f)}
    assert users == {
        "cli/callbacks.py", "cli/hydra_app.py", "cli/main.py", "composition.py", "config_errors.py",
        "optimization/sweeper.py", "optimization/space_grammar.py", "scheduling/launcher.py",
    }  # fmt: skip


def test_what_is_wrong_is_printed_once() -> None:
    """In a process of its own, whose loggers nobody has set up."""
    command = [sys.executable, "-m", "mergelab", "serch=cma"]
    own = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}  # which commands here have set
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=own)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("✗ serch: there is no key 'serch'. Did you mean 'search'?")
    assert done.stderr.count("serch: there is no key") == 1
